"""Every backend gives the loop's numbers, outputs and all gradients, in every configuration."""

from __future__ import annotations

import pytest
import torch
from expert_cases import BATCH, CASES, WIDTH, build, config, context, inputs, run

from coterie.core.context import Context
from coterie.core.routing import Routing
from coterie.experts import ExpertLayerConfig, ExpertPool, dispatch, plan
from coterie.experts.dispatch import BACKENDS, available, choose
from coterie.experts.dispatch.expert_weights import SortedExperts
from coterie.experts.kinds import Affine, SwiGLU

BACKENDS_OF_A_CONFIG = ("dense", "sorted", "grouped", "native", "auto")


def check_equal(name: str, tokens: int, dtype: torch.dtype, tolerance: float, mask=None) -> None:
    ctx = context(tokens, mask=mask)
    expected_y, expected = run(
        build(name, dtype, dispatch="loop"), inputs(tokens, dtype=dtype), ctx
    )
    for backend in BACKENDS_OF_A_CONFIG:
        y, grads = run(build(name, dtype, dispatch=backend), inputs(tokens, dtype=dtype), ctx)
        torch.testing.assert_close(y, expected_y, atol=tolerance, rtol=tolerance, msg=backend)
        assert grads.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                grads[key], value, atol=tolerance, rtol=tolerance, msg=f"{backend} {key}"
            )


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("name", CASES)
def test_backends_equal_the_loop_in_float32(name: str, tokens: int) -> None:
    few = tokens == 1 and config(name).kind.batch_statistics  # gradients that cancel to almost 0
    check_equal(name, tokens, torch.float32, 2e-4 if few else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_backends_equal_the_loop_in_float64(name: str) -> None:
    check_equal(name, 7, torch.float64, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_backends_equal_the_loop_with_padding(name: str) -> None:
    mask = torch.ones(BATCH, 9, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :2] = False
    check_equal(name, 9, torch.float32, 1e-5, mask)


def routing_of(ids: torch.Tensor, gates: torch.Tensor, num_experts: int) -> Routing:
    rows = ids.shape[0]
    flat = torch.full((rows, num_experts), 1.0 / num_experts)
    return Routing("token", num_experts, ids, gates, flat, flat.log(), (1, rows))


def random_routing(rows: int, num_experts: int, k: int, seed: int) -> Routing:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, num_experts, generator=rng).argsort(dim=1)[:, :k]
    gates = torch.rand(rows, k, generator=rng)
    return routing_of(ids, gates, num_experts)


def reference(x: torch.Tensor, routing: Routing, pool: ExpertPool) -> torch.Tensor:
    """Double loop over rows and choices, on plain modules: shares no code with the backends."""
    modules = pool.unpack()
    rows = []
    for r in range(x.shape[0]):
        y = torch.zeros(x.shape[1])
        for expert, gate in zip(routing.ids[r].tolist(), routing.gates[r].tolist()):
            if expert < pool.num_experts:
                y = y + gate * modules[expert](x[r])
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


@pytest.mark.parametrize("backend", ["loop", "dense", "sorted", "grouped", "native"])
@pytest.mark.parametrize("num_experts, k", [(1, 1), (4, 1), (4, 2), (4, 4), (16, 3)])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
def test_backend_equals_a_double_loop_over_plain_modules(backend, num_experts, k, rows) -> None:
    pool = ExpertPool(SwiGLU(hidden=8), num_experts, WIDTH)
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    routing = random_routing(rows, num_experts, k, seed=rows + num_experts)
    y = dispatch(x, plan(routing), pool, backend)
    torch.testing.assert_close(y, reference(x, routing, pool), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "dense", "sorted", "grouped", "native"])
def test_one_expert_takes_all_and_others_get_zero_gradient(backend: str) -> None:
    pool = ExpertPool(SwiGLU(hidden=8), 4, WIDTH)
    x = torch.randn(9, WIDTH)
    routing = routing_of(torch.full((9, 1), 2), torch.rand(9, 1), 4)
    y = dispatch(x, plan(routing), pool, backend)
    torch.testing.assert_close(y, reference(x, routing, pool), atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    for name in pool.names:
        grad = getattr(pool, name).grad
        assert grad[2].abs().max() > 0
        assert grad[[0, 1, 3]].abs().max() == 0


@pytest.mark.parametrize("backend", ["loop", "dense", "sorted", "grouped", "native"])
def test_rows_of_nobody_are_never_read(backend: str) -> None:
    pool = ExpertPool(SwiGLU(hidden=8), 3, WIDTH)
    x = torch.randn(4, WIDTH)
    x[1] = float("nan")
    x.requires_grad_()
    ids = torch.tensor([[0, 1], [3, 3], [2, 3], [1, 0]])
    gates = torch.rand(4, 2).masked_fill(ids == 3, 0.0)
    y = dispatch(x, plan(routing_of(ids, gates, 3)), pool, backend)
    y.sum().backward()
    assert y.isfinite().all() and y[1].abs().max() == 0
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[1].abs().max() == 0
    assert all(getattr(pool, name).grad.isfinite().all() for name in pool.names)


def test_sum_backward_through_the_grouped_product() -> None:
    """Its backward rejects the expanded gradient that a plain sum sends."""
    pool = ExpertPool(SwiGLU(hidden=8), 3, WIDTH)
    x = torch.randn(6, WIDTH, requires_grad=True)
    made = plan(random_routing(6, 3, 2, 0))
    dispatch(x, made, pool, "grouped").sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    rows = x.detach()[made.rows]
    SortedExperts(pool, made, 1).linear(rows, "gate_up").sum().backward()
    assert pool.gate_up.grad is not None and pool.gate_up.grad.abs().max() > 0


def test_grouped_gives_way_where_torch_cannot() -> None:
    routing = random_routing(6, 3, 2, 0)
    for width, hidden, dtype in ((16, 8, torch.float64), (6, 8, torch.float32), (16, 5, None)):
        pool = ExpertPool(SwiGLU(hidden=hidden), 3, width).to(dtype or torch.float32)
        x = torch.randn(6, width, dtype=dtype or torch.float32, requires_grad=True)
        made = plan(routing)
        assert "grouped" not in available(x, made, pool)
        y = dispatch(x, made, pool, "grouped")
        assert torch.equal(y, dispatch(x, made, pool, "sorted"))
        y.sum().backward()


def test_compiled_layer_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build("dit_moe", dispatch="grouped")
    ctx, h = context(7), inputs(7)
    expected = layer(h, ctx).y
    compiled = torch.compile(lambda x: layer(x, ctx).y, backend="eager")
    torch.testing.assert_close(compiled(h), expected, atol=1e-5, rtol=1e-5)


def test_slots_sharing_a_tensor_compute_it_once_with_gates_added() -> None:
    routing = routing_of(
        torch.tensor([[0, 2, 1], [1, 3, 3]]), torch.tensor([[1.0, 2, 4], [8, 0, 0]]), 3
    )
    made = plan(routing, slot_map=(0, 1, 0), num_experts=2)
    assert made.ids.tolist() == [[0, 2, 1], [1, 2, 2]]
    assert made.gates.tolist() == [[3, 0, 4], [8, 0, 0]]
    assert made.counts == [1, 2]


def test_merged_layer_equals_a_routed_layer_with_copied_experts() -> None:
    merged = build("merged_slots", dispatch="loop")
    plain = build("merged_slots", slot_map=None, dispatch="loop")
    plain.routers.load_state_dict(merged.routers.state_dict())
    for slot, tensor in enumerate(merged.config.slot_map or ()):
        plain.pool.load_expert_state(slot, merged.pool.expert_state(tensor))
    ctx, h = context(7), inputs(7)
    torch.testing.assert_close(merged(h, ctx).y, plain(h, ctx).y, atol=1e-5, rtol=1e-5)


def test_folded_samples_equal_the_loop_and_serve_samples_only() -> None:
    layer = build("switch_dit", dispatch="loop")
    h, ctx = inputs(32), context(32)
    routing = layer.routers[0](h, ctx)
    made = plan(routing)
    assert "fold" in available(h, made, layer.pool)
    assert choose(h, made, layer.pool) == "fold"
    y = BACKENDS["fold"](h, made, layer.pool, False)
    torch.testing.assert_close(
        y, BACKENDS["loop"](h, made, layer.pool, False), atol=1e-5, rtol=1e-5
    )
    tokens = ExpertLayerConfig(num_experts=3, experts={"kind": "affine"}).build(WIDTH)
    flat = h.flatten(0, 1)
    token_plan = plan(tokens.routers[0](h, ctx))
    assert "fold" not in available(flat, token_plan, tokens.pool)


def test_channel_windows_are_broadcast_over_tokens_without_a_copy() -> None:
    layer = build("dtr")
    y = layer.combine(inputs(32).detach(), layer.routers[0](inputs(32), context(32)))
    assert y.shape == (BATCH, 32, WIDTH) and y.stride(1) == 0


@pytest.mark.parametrize("backend", ["loop", "sorted", "dense"])
def test_low_precision_sums_can_accumulate_in_float32(backend: str) -> None:
    """256 + 15 * 0.5: in bfloat16 each half is rounded away."""
    pool = ExpertPool(Affine(), 16, WIDTH).bfloat16()
    with torch.no_grad():
        pool.bias.fill_(0.5)
        pool.bias[0] = 256.0
    ids = torch.arange(16).expand(5, 16)
    made = plan(routing_of(ids, torch.ones(5, 16), 16))
    y = dispatch(torch.zeros(5, WIDTH, dtype=torch.bfloat16), made, pool, backend, float32=True)
    assert y.dtype == torch.bfloat16 and (y == 264.0).all()
    assert (dispatch(torch.zeros(5, WIDTH).bfloat16(), made, pool, "loop") == 256.0).all()


@pytest.mark.parametrize("name", CASES)
def test_autocast_keeps_the_type_and_stays_close(name: str) -> None:
    h, ctx = inputs(7), context(7)
    for backend in ("loop", *BACKENDS_OF_A_CONFIG):
        layer = build(name, dispatch=backend)
        exact = layer(h, ctx).y
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(h, ctx)
        assert out.y.dtype == torch.float32
        if layer.config.rounds == 1:  # later rounds route what earlier ones rounded
            torch.testing.assert_close(out.y, exact, atol=0.05, rtol=0.05)
        if out.y.requires_grad:
            out.y.sum().backward()
            assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_expert_tokens_count_once_per_choice() -> None:
    made = plan(random_routing(10, 4, 2, 3))
    assert sum(made.counts) == 20
    assert made.offsets.tolist() == torch.tensor(made.counts).cumsum(0).tolist()
    assert torch.equal(made.sorted_ids, made.sorted_ids.sort().values)


def test_empty_batch_keeps_every_parameter_in_the_graph() -> None:
    for backend in ("auto", "loop"):
        layer = build("dit_moe", dispatch=backend)
        layer(torch.zeros(0, 7, WIDTH), Context(0, 7)).y.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in layer.parameters())
