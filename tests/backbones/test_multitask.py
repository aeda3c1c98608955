"""Shared-bottom, MMoE, CGC, PLE and HoME are configurations of one backbone: against plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones import FieldConfig, LevelConfig, MultiTask, MultiTaskConfig
from coterie.backbones.levels import Party, lay_out
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.experts.kinds import NormMLP
from coterie.nn.fields import FieldEmbedding

FIELDS = (FieldConfig(name="user", size=5), FieldConfig(name="tags", size=4, columns=2))
TASKS = ("a", "b", "c")
GROUPS = {"first": ("a", "b"), "second": ("c",)}
GATED = NormMLP(norm="batch", activation="silu", feature_rank=2)
HOME: dict[str, Any] = {
    "groups": GROUPS,
    "levels": (
        LevelConfig(shared=2, group=2, width=6, readers="groups"),
        LevelConfig(shared=1, group=1, task=1, width=5),
    ),
    "expert": GATED,
    "self_gate": True,
}
PLE: dict[str, Any] = {
    "levels": (LevelConfig(shared=1, task=2, width=6), LevelConfig(shared=2, task=1, width=5)),
    "gates": "own",
}


def config(**fields: Any) -> MultiTaskConfig:
    return MultiTaskConfig.from_dict({"fields": FIELDS, "tasks": TASKS, "embedding": 4, **fields})


def build(seed: int = 0, **fields: Any) -> MultiTask:
    """Every parameter moved, as after some training."""
    torch.manual_seed(seed)
    model = config(**fields).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        model.embedding.weight[0].zero_()
    return model.eval()


def batch(count: int = 12) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    users = torch.randint(5, (count, 1), generator=rng)
    first = torch.randint(4, (count, 1), generator=rng)
    return torch.cat([users, first, torch.randint(-1, 4, (count, 1), generator=rng)], dim=1)


def ask(model: MultiTask, x: Tensor, tasks: list[int] | None = None) -> Any:
    ctx = Context(batch=len(x), tokens=0, training=model.training)
    return model(x, ctx, Condition(), tasks)


def level(model: MultiTask, number: int) -> Any:
    return model.levels[number].experts


def gate(model: MultiTask, number: int, reader: int) -> Tensor:
    """[E, D] of one reader."""
    layer = level(model, number)
    weight: Tensor = layer.router(0).score.proj.weight
    return weight.unflatten(0, (-1, layer.pool.num_experts))[reader]


def tower(model: MultiTask, task: int, z: Tensor) -> Tensor:
    return z @ model.towers.weight[task, 0] + model.towers.bias[task, 0]


# The baselines, written out


def test_shared_bottom_is_one_network_below_the_towers() -> None:
    model = build(levels=(LevelConfig(shared=1, width=6),))
    x = batch()
    (bottom,) = level(model, 0).pool.unpack()
    z = bottom(model.embedding(x))
    expected = torch.stack([tower(model, task, z) for task in range(3)], dim=1)
    assert torch.allclose(ask(model, x).sample, expected, atol=1e-5)


def test_mmoe_gates_all_experts_for_each_task() -> None:
    model = build(levels=(LevelConfig(shared=4, width=6),))
    x = batch()
    v = model.embedding(x)
    answers = torch.stack([expert(v) for expert in level(model, 0).pool.unpack()], dim=1)
    expected = [
        tower(model, t, ((v @ gate(model, 0, t).T).softmax(1)[..., None] * answers).sum(1))
        for t in range(3)
    ]
    assert torch.allclose(ask(model, x).sample, torch.stack(expected, dim=1), atol=1e-5)


def test_cgc_gates_shared_experts_and_the_tasks_own() -> None:
    model = build(levels=(LevelConfig(shared=2, task=2, width=6),))
    x = batch()
    v = model.embedding(x)
    answers = torch.stack([expert(v) for expert in level(model, 0).pool.unpack()], dim=1)
    expected = []
    for task in range(3):
        seen = [0, 1, 2 + 2 * task, 3 + 2 * task]
        weights = (v @ gate(model, 0, task)[seen].T).softmax(1)
        expected.append(tower(model, task, (weights[..., None] * answers[:, seen]).sum(1)))
    assert torch.allclose(ask(model, x).sample, torch.stack(expected, dim=1), atol=1e-5)


def test_ple_stacks_levels_and_its_shared_gate_sees_all() -> None:
    model = build(**PLE)
    x = batch()
    v = model.embedding(x)
    first = torch.stack([expert(v) for expert in level(model, 0).pool.unpack()], dim=1)
    streams = []
    for reader in range(4):
        seen = [0, 1 + 2 * reader, 2 + 2 * reader] if reader < 3 else list(range(7))
        weights = (v @ gate(model, 0, reader)[seen].T).softmax(1)
        streams.append((weights[..., None] * first[:, seen]).sum(1))
    above = level(model, 1).pool.unpack()
    expected = []
    for task in range(3):
        reads = [(above[0], streams[3]), (above[1], streams[3]), (above[2 + task], streams[task])]
        answers = torch.stack([expert(z) for expert, z in reads], dim=1)
        seen = [0, 1, 2 + task]
        weights = (streams[task] @ gate(model, 1, task)[seen].T).softmax(1)
        expected.append(tower(model, task, (weights[..., None] * answers).sum(1)))
    assert torch.allclose(ask(model, x).sample, torch.stack(expected, dim=1), atol=1e-5)


def test_home_is_what_its_equations_say() -> None:
    model = build(**HOME)
    x = batch()
    v = model.embedding(x)
    below, above = (level(model, number) for number in (0, 1))
    first = torch.stack([expert(v) for expert in below.pool.unpack()], dim=1)
    streams = []
    for reader, seen in enumerate(([0, 1, 2, 3], [0, 1, 4, 5], list(range(6)))):
        weights = (v @ gate(model, 0, reader)[seen].T).softmax(1)
        z = (weights[..., None] * first[:, seen]).sum(1)
        if reader < 2:  # groups have two experts of their own: a softmax
            own = below.self_gate.proj.weight.unflatten(0, (3, 2))[reader]
            z = z + ((v @ own.T).softmax(1)[..., None] * first[:, seen[2:]]).sum(1)
        streams.append(z)
    experts = above.pool.unpack()
    expected = []
    for task, group in enumerate((0, 0, 1)):
        z = streams[group]
        answers = [experts[0](streams[2]), experts[1 + group](z), experts[3 + task](z)]
        seen = [0, 1 + group, 3 + task]
        weights = (v @ gate(model, 1, task)[seen].T).softmax(1)
        out = (weights[..., None] * torch.stack(answers, dim=1)).sum(1)
        own = above.self_gate.proj.weight[task]  # one expert of its own: a sigmoid
        out = out + (z @ own).sigmoid()[:, None] * answers[2]
        expected.append(tower(model, task, out))
    assert torch.allclose(ask(model, x).sample, torch.stack(expected, dim=1), atol=1e-5)


# Each is a configuration of the next


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(
            # HoME with one category, one level, no mask beyond the tasks, no gates
            {"groups": {"all": TASKS}, "levels": (LevelConfig(shared=1, group=1, task=1),)},
            {"levels": (LevelConfig(shared=2, task=1),)},
            id="home-cgc",
        ),
        pytest.param(
            {"levels": (LevelConfig(shared=2, task=0),), "mask": True},
            {"levels": (LevelConfig(shared=2),), "mask": False},
            id="cgc-mmoe",
        ),
        pytest.param(
            {"levels": (LevelConfig(shared=2, task=1),), "mask": False},
            {"levels": (LevelConfig(shared=5),)},
            id="all-ones-mask-mmoe",
        ),
        pytest.param(
            {"levels": (LevelConfig(group=1),)}, {"levels": (LevelConfig(shared=1),)}, id="bottom"
        ),
    ],
)
def test_one_mixture_is_a_case_of_the_other(ours: dict, theirs: dict) -> None:
    first, second = build(seed=1, **ours), build(seed=2, **theirs)
    second.load_state_dict(first.state_dict())
    assert torch.equal(ask(first, batch()).sample, ask(second, batch()).sample)


def test_without_gates_and_norm_home_is_hierarchical_cgc() -> None:
    """A feature gate at zero is none; a self gate adds."""
    plain = {**HOME, "expert": GATED.replace(feature_rank=None), "self_gate": False}
    first, second = build(**{**HOME, "self_gate": False}), build(**plain)
    with torch.no_grad():
        for number in (0, 1):
            level(first, number).pool.expand.zero_()
    state = {k: v for k, v in first.state_dict().items() if "reduce" not in k and "expand" not in k}
    second.load_state_dict(state)
    assert torch.allclose(ask(first, batch()).sample, ask(second, batch()).sample, atol=1e-6)


# Invariants


def test_gates_sum_to_one_over_what_is_seen_and_are_zero_elsewhere() -> None:
    routings = ask(build(**HOME), batch()).routings
    assert [r.batch for r in routings] == [(12, 3), (12, 3)]
    assert [(r.slot, r.layer) for r in routings] == [("level", 0), ("level", 1)]
    sees = [[[0, 1, 2, 3], [0, 1, 4, 5], [*range(6)]], [[0, 1, 3], [0, 1, 4], [0, 2, 5]]]
    # Three tasks, then two groups, then the shared reader.
    for routing, lists, who in zip(routings, sees, ([3, 4, 5], [0, 1, 2])):
        assert torch.equal(routing.task, torch.tensor(who).expand(12, 3))
        probs = routing.probs.unflatten(0, (12, 3))
        assert torch.allclose(probs.sum(2), torch.ones(12, 3), atol=1e-6)
        for reader, seen in enumerate(lists):
            closed = [e for e in range(6) if e not in seen]
            assert (probs[:, reader, seen] > 0).all()
            assert torch.equal(probs[:, reader, closed], torch.zeros(12, len(closed)))


@pytest.mark.parametrize("self_gate", [True, False])
def test_a_task_teaches_only_what_it_may_see(self_gate: bool) -> None:
    model = build(**{**HOME, "self_gate": self_gate}).train()
    ask(model, batch()).sample[:, 2].sum().backward()  # task c, of the second group
    reached = level(model, 1).pool.down.grad.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [True, False, True, False, False, True]
    gates = gate(model, 1, 0), level(model, 1).router(0).score.proj.weight.grad.unflatten(0, (3, 6))
    assert (gates[1][:2] == 0).all() and gates[1][2].abs().sum() > 0


def test_every_parameter_learns() -> None:
    for fields in (HOME, PLE, {"levels": (LevelConfig(shared=3),), "tower": 4}):
        model = build(**fields).train()
        ask(model, batch(40)).sample.square().sum().backward()
        dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert dead == []


def test_levels_normalise_over_the_batch() -> None:
    model = build(**HOME).train()
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("variance")}
    ask(model, batch(50))
    assert len(before) == 2
    for name, buffer in model.named_buffers():
        if name in before:
            assert not torch.equal(buffer, before[name])
    model.eval()
    whole = ask(model, batch()).sample
    assert torch.allclose(ask(model, batch()[3:4]).sample, whole[3:4], atol=1e-6)


@pytest.mark.parametrize("fields", [HOME, PLE, {**PLE, "gates": "shared_own"}])
def test_a_single_task_is_answered_alone(fields: dict) -> None:
    model = build(**fields)
    whole = ask(model, batch())
    for tasks in ([2], [1, 0]):
        found = ask(model, batch(), tasks)
        assert torch.allclose(found.sample, whole.sample[:, tasks], atol=1e-6)
        assert found.routings[-1].task[0].tolist() == tasks


def test_what_a_single_task_does_not_need_is_not_computed() -> None:
    model = build(**HOME).train()
    means = [level(model, number).pool.statistics()["mean"].clone() for number in (0, 1)]
    ask(model, batch(), [0])
    moved = [
        (level(model, n).pool.statistics()["mean"] != means[n]).any(1).tolist() for n in (0, 1)
    ]
    assert moved[1] == [True, True, False, True, False, False]
    assert moved[0] == [True] * 6  # the shared reader sees both groups
    assert ask(model, batch(), [0]).routings[0].task[0].tolist() == [3, 5]  # nobody asks group 1


def test_an_empty_batch_has_an_answer() -> None:
    model = build(**HOME)
    assert ask(model, batch()[:0]).sample.shape == (0, 3)
    model.train()
    ask(model, batch()[:0]).sample.sum().backward()


def test_balance_losses_read_the_levels() -> None:
    model = build(levels=(LevelConfig(shared=4),), balance=({"kind": "switch", "weight": 0.1},))
    (aux,) = model.aux_losses(ask(model, batch()).routings)
    assert aux.layer == 0 and aux.weight == 0.1 and aux.value.requires_grad


# Fields


def test_a_set_is_the_mean_of_its_members_and_nothing_is_zero() -> None:
    embed = FieldEmbedding([(5, 1), (4, 2)], 3)
    rows = embed.weight.detach()
    found = embed(torch.tensor([[1, 0, 3], [4, 2, -1], [0, -1, -1]]))
    expected = torch.cat([rows[[2, 5, 1]], torch.zeros(3, 3)], dim=1)
    expected[0, 3:] = (rows[6] + rows[9]) / 2
    expected[1, 3:] = rows[8]
    assert torch.allclose(found, expected)
    found.sum().backward()
    assert torch.equal(embed.weight.grad[0], torch.zeros(3))


@pytest.mark.parametrize(
    ("x", "message"), [([[5, 0, 0]], "column 0: 5"), ([[0, 0, 4]], "column 2")]
)
def test_ids_that_a_field_does_not_have_are_named(x: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ask(build(levels=(LevelConfig(shared=1),)), torch.tensor(x))
    with pytest.raises(DataError, match=r"x: \(1, 2\)"):
        ask(build(levels=(LevelConfig(shared=1),)), torch.tensor([[0, 1]]))


# What cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": {"first": ("a", "b")}}, "each task is in one group"),
        ({"groups": {"x": ("a", "b"), "y": ("b", "c")}}, "each task is in one group"),
        ({"levels": (LevelConfig(shared=1, readers="groups"),)}, "the towers of the tasks read"),
        ({"levels": (LevelConfig(),)}, "every reader needs an expert that it may see"),
        ({"expert": NormMLP(out=3)}, "expert.out: 3"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_groups_are_numbered_by_their_tasks_whatever_their_names() -> None:
    named = {"zebra": ("a", "b"), "ape": ("c",)}
    assert config(**{**HOME, "groups": named}).group_of == (0, 0, 1)
    again = MultiTaskConfig.from_json(config(**{**HOME, "groups": named}).to_json())
    assert list(again.groups) == ["ape", "zebra"] and again.group_of == (0, 0, 1)
    assert config(levels=(LevelConfig(shared=1),)).group_of == (0, 0, 0)


def test_a_level_without_shared_experts_needs_own_ones() -> None:
    with pytest.raises(ConfigError, match=r"levels\.1"):
        lay_out([(1, 0, 0, "groups"), (0, 0, 0, "tasks")], (0, 0, 1), True)
    (plan,) = lay_out([(0, 1, 0, "tasks")], (0, 1), True)
    assert plan.sees(Party("task", 1)) == (1,)


def test_towers_are_separate() -> None:
    model = build(levels=(LevelConfig(shared=1, width=6),), tower=4)
    x = batch()
    before = ask(model, x).sample.clone()
    with torch.no_grad():
        model.towers.inner[1].add_(1.0)
    after = ask(model, x).sample
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(after[:, 1], before[:, 1])
    assert isinstance(model.towers.inner, nn.Parameter)
