"""Normalised experts, feature gates, self gates, and one input with several routings (HoME)."""

from __future__ import annotations

import pytest
import torch
from expert_cases import WIDTH, build, context, inputs, run
from torch import nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayerConfig, ExpertPool
from coterie.experts.dispatch import DispatchPlan, plan
from coterie.experts.dispatch.auto import dispatch
from coterie.experts.dispatch.backends import BACKENDS, available, run_once
from coterie.experts.dispatch.expert_weights import BatchedExperts, experts_of
from coterie.experts.dispatch.plan import plan_choices
from coterie.experts.kinds import NormMLP


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return 3 + 2 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def moved_pool(kind: NormMLP, num_experts: int = 3) -> ExpertPool:
    """Parameters and statistics as after some training."""
    pool = ExpertPool(kind, num_experts, WIDTH)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in pool.tensors().values():
            tensor.add_(torch.rand(tensor.shape, generator=rng))
    return pool


def tasks(num: int, batch: int, **changes: object) -> Context:
    """Every sample is asked the same ``num`` tasks."""
    task = torch.arange(num).expand(batch, num)
    return Context(batch=batch, tokens=num, task=task, training=True).replace(**changes)


# Batch statistics


def test_training_normalises_each_unit_over_the_rows_of_its_expert() -> None:
    pool = ExpertPool(NormMLP(out=5, activation="relu"), 2, WIDTH).train()
    seen = []
    kind = pool.kind.replace(activation="silu")
    for weights in experts_of(pool):
        before = weights.linear(rows(200), "down")
        seen.append(weights.normalise(before, kind.momentum, kind.eps))
    for x in seen:
        assert x.mean(0).abs().max() < 1e-3
        assert (x.var(0, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped", "once"])
def test_every_backend_equals_torchs_batch_norm(backend: str) -> None:
    """Answers, gradients and running statistics, where each expert has rows of its own."""
    pool = moved_pool(NormMLP(hidden=8, feature_rank=4)).train()
    plain = [module.train() for module in pool.unpack()]
    x = rows(20).requires_grad_()
    ids = torch.arange(3).repeat(20, 1) if backend == "once" else (torch.arange(20) % 3)[:, None]
    gates = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2))
    made = plan_of(ids, gates)
    y = BACKENDS_AND_ONCE[backend](x, made, pool, False)
    expected = torch.zeros(20, WIDTH)
    for e, module in enumerate(plain):
        own, slot = (ids == e).nonzero(as_tuple=True)
        expected = expected.index_add(0, own, gates[own, slot, None] * module(x[own]))
    assert torch.allclose(y, expected, atol=1e-5)
    (grad,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(grad, wanted, atol=1e-4)
    for e, module in enumerate(plain):
        assert isinstance(module.norm, nn.BatchNorm1d)
        assert torch.allclose(pool.statistics()["mean"][e], module.norm.running_mean, atol=1e-5)
        assert torch.allclose(pool.statistics()["variance"][e], module.norm.running_var, atol=1e-5)


def plan_of(ids: torch.Tensor, gates: torch.Tensor) -> DispatchPlan:
    return plan_choices(ids, gates, 3)


BACKENDS_AND_ONCE = {**BACKENDS, "once": run_once}


def test_a_batch_of_rows_that_chose_others_is_none_of_an_experts() -> None:
    pool = moved_pool(NormMLP()).train()
    ids = torch.tensor([[0], [0], [1], [1]])
    made = plan_of(ids, torch.ones(4, 1))
    assert "dense" not in available(rows(4), made, pool)
    assert "dense" in available(rows(4), made, pool.eval())


@pytest.mark.parametrize("backend", ["loop", "sorted", "grouped"])
def test_a_single_row_has_no_statistics(backend: str) -> None:
    """It uses the running ones, and does not move them."""
    pool = moved_pool(NormMLP())
    made = plan_of(torch.tensor([[0], [1], [1]]), torch.ones(3, 1))
    x = rows(3)
    expected = dispatch(x, made, pool.eval(), "loop")[0]
    before = {name: value.clone() for name, value in pool.statistics().items()}
    found = BACKENDS[backend](x, made, pool.train(), False)
    assert torch.allclose(found[0], expected, atol=1e-5)
    for name, value in pool.statistics().items():
        assert torch.equal(value[[0, 2]], before[name][[0, 2]])
        assert not torch.equal(value[1], before[name][1])


def test_evaluation_uses_the_running_statistics_row_by_row() -> None:
    layer = build("batch_norm")
    for _ in range(30):
        layer(inputs(40), context(40))
    layer.eval()
    h, ctx = inputs(40).detach(), context(40).replace(training=False)
    before = {name: value.clone() for name, value in layer.pool.statistics().items()}
    whole = layer(h, ctx).y
    alone = layer(h[:1], context(40, batch=1, null=()).replace(training=False)).y
    assert torch.allclose(whole[:1], alone, atol=1e-6)
    assert all(torch.equal(v, before[n]) for n, v in layer.pool.statistics().items())


@pytest.mark.parametrize("hidden", [None, 8])
def test_folding_keeps_the_answer(hidden: int | None) -> None:
    kind = NormMLP(hidden=hidden, out=6, feature_rank=2)
    pool = moved_pool(kind).eval()
    folded = ExpertPool(kind.folded(), 3, WIDTH).eval()
    stacks = kind.fold(pool.tensors())
    assert set(stacks) == set(folded.names)
    with torch.no_grad():
        for name, stack in folded.stacks().items():
            stack.copy_(stacks[name])
    for ours, theirs in zip(experts_of(folded), experts_of(pool)):
        x = rows(50)
        wanted = kind.forward(x, theirs)
        assert torch.allclose(folded.kind.forward(x, ours), wanted, atol=1e-5)


def test_statistics_travel_with_the_expert() -> None:
    pool, other = moved_pool(NormMLP()), ExpertPool(NormMLP(), 3, WIDTH)
    other.load_expert_state(2, pool.expert_state(1))
    assert torch.equal(other.statistics()["variance"][2], pool.statistics()["variance"][1])
    assert torch.equal(other.statistics()["variance"][1], torch.ones(WIDTH))
    other.reset_parameters()
    assert torch.equal(other.statistics()["variance"][2], torch.ones(WIDTH))


# Feature gate


def test_the_feature_gate_is_the_identity_at_first_and_stays_between_0_and_2() -> None:
    kind = NormMLP(norm="none", feature_rank=3)
    pool, plain = ExpertPool(kind, 2, WIDTH), ExpertPool(kind.replace(feature_rank=None), 2, WIDTH)
    with torch.no_grad():
        plain.down.copy_(pool.down)
    x = rows(9)
    for ours, theirs in zip(experts_of(pool), experts_of(plain)):
        assert torch.equal(kind.forward(x, ours), plain.kind.forward(x, theirs))
    gate = pool.unpack()[0].gate
    with torch.no_grad():
        gate.expand.weight.normal_(generator=torch.Generator().manual_seed(0))
    factor = gate(x) / x
    assert factor.min() >= 0 and factor.max() <= 2 and factor.std() > 0.1


def test_every_expert_has_a_feature_gate_of_its_own() -> None:
    pool = moved_pool(NormMLP(feature_rank=3))
    assert pool.reduce.shape == (3, 3, WIDTH) and pool.expand.shape == (3, WIDTH, 3)


# Streams


def test_an_expert_reads_its_stream_alone() -> None:
    kind = NormMLP(streams=2, reads=(1, 0, 1), out=4)
    pool = moved_pool(kind).eval()
    x = rows(6).requires_grad_()
    weights = BatchedExperts(pool.stacks(), dict(pool.named_buffers()))
    every = kind.forward_all(x, weights, range(3))
    for e, (own, module) in enumerate(zip(experts_of(pool), pool.unpack())):
        y = kind.forward(x, own)
        assert torch.allclose(every[e], y, atol=1e-6)
        assert torch.allclose(module(x.unflatten(1, (2, -1))[:, kind.reads[e]]), y, atol=1e-6)
        (grad,) = torch.autograd.grad(y.sum(), x)
        other = grad.unflatten(1, (2, -1))[:, 1 - kind.reads[e]]
        assert grad.abs().sum() > 0 and torch.equal(other, torch.zeros_like(other))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streams": 2}, "say for each expert which of the streams it reads"),
        ({"reads": [0]}, "with several streams"),
        ({"streams": 2, "reads": [0, 2]}, r"each in 0\.\.1"),
    ],
)
def test_streams_must_be_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormMLP.from_dict(fields)


def test_streams_must_divide_the_row_and_answers_must_fit() -> None:
    layer = ExpertLayerConfig.from_dict(
        {"num_experts": None, "experts": {"kind": "norm_mlp", "streams": 3, "reads": [0, 1, 2]}}
    )
    with pytest.raises(ConfigError, match="a divisor of the width 16"):
        layer.build(WIDTH)
    for changes in ({"rounds": 2}, {"adaptor": 1.0}, {"answer": "output"}):
        fields = {"experts": {"kind": "norm_mlp", "out": 5}, **changes}
        with pytest.raises(ConfigError, match="experts answer 5 values to 16"):
            ExpertLayerConfig.from_dict(fields).build(WIDTH)


@pytest.mark.parametrize("tokens", [(), (7,)])
def test_every_backend_serves_answers_of_another_size(tokens: tuple[int, ...]) -> None:
    pool = moved_pool(NormMLP(out=8)).eval()
    x = torch.randn(9, *tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    unit = "sample" if tokens else "token"
    made = plan_choices((torch.arange(9) % 3)[:, None], torch.rand(9, 1), 3, unit=unit)
    expected = BACKENDS["loop"](x, made, pool, False)
    assert expected.shape == (9, *tokens, 8)
    names = available(x, made, pool)
    assert {"dense", "sorted", "grouped"} <= set(names)
    for name in names:
        assert torch.allclose(BACKENDS[name](x, made, pool, False), expected, atol=1e-5), name


# Self gate


def test_self_gates_are_a_sigmoid_for_one_and_sum_to_one_for_several() -> None:
    layer = build("home").eval()
    h, ctx = inputs(4), context(4)
    routing = layer(h, ctx.replace(step_index=torch.tensor([3, 40]))).routings[0]
    assert routing.task.tolist() == [0, 1]
    added = routing.gates - routing.probs  # dense: a column per candidate
    first, second = added[:4], added[4:]
    assert (first[:, 1] > 0).all() and (first[:, 1] < 1).all()
    assert torch.equal(first[:, [0, 2, 3, 4, 5]], torch.zeros(4, 5))
    assert torch.allclose(second[:, [4, 5]].sum(1), torch.ones(4), atol=1e-6)
    assert torch.allclose(second[:, [0, 1, 2, 3]], torch.zeros(4, 4), atol=1e-6)
    assert torch.allclose(routing.probs.sum(1), torch.ones(8), atol=1e-6)


@pytest.mark.parametrize("self_gate", [True, False])
def test_own_experts_learn_through_the_self_gate_alone(self_gate: bool) -> None:
    """The router's gate is forced to the shared expert 0."""
    change = {} if self_gate else {"self_gate": None}
    layer = build("home", **change).eval()
    with torch.no_grad():
        weight = layer.router(0).score.proj.weight.unflatten(0, (2, 6))
        weight.zero_()
        weight[:, 0] = 200.0
    h = inputs(4).detach().abs()
    layer(h, context(4)).y.square().sum().backward()
    reached = layer.pool.down.grad.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [True, self_gate, False, False, self_gate, self_gate]


def test_a_task_teaches_no_masked_expert() -> None:
    layer = build("home")
    out = layer(inputs(4), context(4).replace(step_index=torch.tensor([3, 40])))
    out.y[0].square().sum().backward()  # task 0 sees experts 0, 1, 2
    reached = layer.pool.down.grad.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [True, True, True, False, False, False]
    closed = out.routings[0].ids[:4, 3:]
    assert (closed == 6).all() and torch.equal(out.routings[0].gates[:4, 3:], torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self_gate": {"by_task": [[3], [4]]}}, r"task 0 has candidates \(0, 1, 2\)"),
        ({"self_gate": {"by_task": [[1], [6]]}}, r"each in 0\.\.5"),
        ({"self_gate": {"by_task": [[], []]}}, "own experts of some task"),
        ({"self_gate": {"by_task": [[1, 1], []]}}, "each expert once"),
        (
            {"experts": {"kind": "norm_mlp", "streams": 2, "reads": [0, 0, 0, 0, 1, 0]}},
            "the gate reads what they read",
        ),
        ({"router": {"select": {"kind": "top_k", "k": 2}}}, "is not selected does not answer"),
        ({"router": {"select": "dense", "partition": "null_label"}}, "no task's own"),
    ],
)
def test_self_gates_that_could_not_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("home", **changes)


# One input, several routings


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_one_are_answered_once(training: bool) -> None:
    """The same numbers and gradients as rows that are copied."""
    layers = [build("home", noise_tasks=None).train(training) for _ in range(2)]
    x = inputs(1, batch=12)
    ctx = tasks(2, len(x), training=training)
    found = run(layers[0], x.expand(-1, 2, -1).detach(), ctx)
    copied = x.expand(-1, 2, -1).detach().clone(memory_format=torch.contiguous_format)
    expected = run(layers[1], copied, ctx)
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    for name, grad in expected[1].items():
        if name != "h":
            assert torch.allclose(found[1][name], grad, atol=1e-4), name
    means = [layer.pool.statistics()["mean"] for layer in layers]
    assert torch.allclose(*means, atol=1e-6)


def test_experts_that_nobody_asks_for_are_not_run() -> None:
    layer = build("home", noise_tasks=None).train()
    before = layer.pool.statistics()["mean"].clone()
    x = inputs(1, batch=8).detach()
    ctx = tasks(2, 8).replace(task=torch.zeros(8, 2, dtype=torch.long))
    layer(x.expand(-1, 2, -1), ctx)
    changed = (layer.pool.statistics()["mean"] != before).any(1)
    assert changed.tolist() == [True, True, True, False, False, False]


def test_an_explicit_backend_serves_repeated_rows_too() -> None:
    layer = build("home", noise_tasks=None).eval()
    x, ctx = inputs(1).detach(), tasks(2, 2)
    routing = layer(x.expand(-1, 2, -1), ctx).routings[0]
    made = plan(routing)
    answers = [dispatch(x[:, 0], made, layer.pool, name) for name in ("auto", "loop", "sorted")]
    assert all(torch.allclose(answer, answers[0], atol=1e-5) for answer in answers)
    empty = dispatch(x[:0, 0], plan_of(torch.zeros(0, 1).long(), torch.zeros(0, 1)), layer.pool)
    assert empty.shape == (0, WIDTH)


# Noise levels as tasks


def test_noise_levels_are_tasks_in_equal_parts_of_the_grid() -> None:
    layer = build("home", noise_tasks=2)
    assert {names for _, _, names in layer.config.reads} == {("step_index",)}
    ctx = context(3, batch=4).replace(step_index=torch.tensor([0, 24, 25, 49]))
    assert layer(inputs(3, batch=4), ctx).routings[0].task.tolist() == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match="a step of the noise grid"):
        layer(inputs(3), context(3).replace(step_index=None))
