"""The native operator: the loop's numbers in every shape, built once, and absent without harm."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from coterie.core.context import Context
from coterie.experts import ExpertLayerConfig, ExpertPool, dispatch
from coterie.experts.dispatch import available, choose, native, plan_choices
from coterie.experts.dispatch.native import build, op
from coterie.experts.kinds import ExpertKind, GeluMLP, SwiGLU

needs_operator = pytest.mark.skipif(not native.library().ready, reason=native.library().reason)

KINDS = {
    "swiglu": SwiGLU,
    "geglu": lambda **size: SwiGLU(activation="gelu", **size),
    "geglu_tanh": lambda **size: SwiGLU(activation="gelu_tanh", **size),
    "gelu_mlp": GeluMLP,
}
# rows, experts, choices, width, hidden: one row, odd sizes, more experts than rows, experts of more
# rows than a block or a part, hidden units in several chunks, experts of some ten rows
SHAPES = (
    (1, 1, 1, 16, 8),
    (7, 4, 2, 16, 12),
    (64, 4, 4, 33, 19),
    (9, 40, 6, 24, 17),
    (700, 2, 1, 24, 40),
    (1300, 3, 2, 20, 36),
    (90, 5, 3, 12, 900),
    (40, 3, 2, 800, 20),
    (23, 4, 2, 20, 13),
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    kind: ExpertKind, shape: tuple[int, ...], load: str = "even", seed: int = 0
) -> tuple[ExpertPool, Tensor, Tensor, Tensor]:
    """A pool with random biases, x, ids with a tenth of nobody, gates."""
    rows, experts, k, width, _ = shape
    rng = torch.Generator().manual_seed(seed)
    pool = ExpertPool(kind, experts, width)
    with torch.no_grad():
        for stack in pool.parameters():
            scale = stack.shape[-1] ** -0.5 if stack.dim() == 3 else 1.0
            stack.normal_(0.0, scale, generator=rng)
    ids = torch.rand(rows, experts, generator=rng).argsort(dim=1)[:, :k]
    ids[torch.rand(rows, k, generator=rng) < 0.1] = experts
    if load == "skewed":
        ids[:, 1:][ids[:, 1:] == 0] = experts
        ids[:, 0] = 0
    x = torch.randn(rows, width, generator=rng)
    return pool, x, ids, torch.rand(rows, k, generator=rng)


def results(
    pool: ExpertPool, x: Tensor, ids: Tensor, gates: Tensor, backend: str
) -> dict[str, Tensor]:
    """The answer, and the gradient of a random projection of it for all that has one."""
    leaves = {"x": x.clone().requires_grad_(), "gates": gates.clone().requires_grad_()}
    made = plan_choices(ids, leaves["gates"], pool.num_experts)
    y = dispatch(leaves["x"], made, pool, backend)
    leaves |= {name: stack for name, stack in pool.stacks().items() if stack.requires_grad}
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad(y, list(leaves.values()), towards)
    return {"y": y.detach(), **dict(zip(leaves, grads))}


def check_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 0.1)  # one gradient may cancel to almost 0
        torch.testing.assert_close(
            ours[name] / scale, value / scale, atol=5e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


FEWER_THAN_THREADS = ((1, 1, 1, 64, 2048), (11, 1, 1, 64, 2048), (5, 2, 2, 64, 2048))
"""Experts so large and so few that threads share the weights of each."""
SHARED = (SHAPES[3], SHAPES[5], (600, 16, 2, 24, 40), (90, 1, 1, 24, 40), *FEWER_THAN_THREADS)


@needs_operator
@pytest.mark.parametrize("load", ["even", "skewed"])
@pytest.mark.parametrize("shape", (*SHAPES, *FEWER_THAN_THREADS))
@pytest.mark.parametrize("kind", KINDS)
def test_operator_equals_the_loop(kind: str, shape: tuple[int, ...], load: str) -> None:
    pool, x, ids, gates = make(KINDS[kind](hidden=shape[4]), shape, load)
    assert "native" in available(x, plan_choices(ids, gates, shape[1]), pool)
    check_close(results(pool, x, ids, gates, "native"), results(pool, x, ids, gates, "loop"))


@needs_operator
@pytest.mark.parametrize("load", ["even", "skewed"])
@pytest.mark.parametrize("kind", ["gelu_mlp", "swiglu"])
@pytest.mark.parametrize("shape", SHARED)
def test_results_do_not_depend_on_the_number_of_threads(
    kind: str, shape: tuple[int, ...], load: str
) -> None:
    pool, x, ids, gates = make(KINDS[kind](hidden=shape[4]), shape, load)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(pool, x, ids, gates, "native"))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@needs_operator
def test_relu_experts_equal_torch() -> None:
    """No kind has them yet: the operator itself, as numbered in its header."""
    rng = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=rng) for s in ((9, 16), (1, 24, 16), (1, 16, 24)))
    x.requires_grad_()
    ids, gates = torch.zeros(9, 1, dtype=torch.long), torch.ones(9, 1)
    with torch.no_grad():
        y, saved = op.run_forward(x, gates, ids, w1, None, w2, None, 3, False, True)
    expected = (x @ w1[0].T).relu() @ w2[0].T
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    dy = torch.randn(9, 16, generator=rng)
    (dx,) = torch.autograd.grad(expected, x, dy)
    with torch.no_grad():
        made = op.run_backward(dy, saved, x, gates, ids, w1, None, w2, None, 3, False, True, False)
    torch.testing.assert_close(made[0], dx, atol=1e-5, rtol=1e-5)
    assert made[2].numel() == 0  # weights were not asked for


@needs_operator
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("rows", "slots", "nobody"), [(0, 2, 0), (5, 0, 0), (5, 2, 7), (5, 1, -1), (5, 1, 3)]
)
def test_where_nobody_is_chosen_all_is_zero(rows: int, slots: int, nobody: int, count: int) -> None:
    """No rows, no choices, ids past the experts: memory is filled, whatever was there."""
    torch.set_num_threads(count)
    rng = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, rows, 16, generator=rng)
    w1, w2 = torch.randn(3, 16, 16, generator=rng), torch.randn(3, 16, 8, generator=rng)
    ids, gates = torch.full((rows, slots), nobody), torch.ones(rows, slots)
    weights = (w1, torch.ones(3, 16), w2, torch.ones(3, 16))
    y, saved = op.run_forward(x, gates, ids, *weights, 0, True, True)
    found = op.run_backward(dy, saved, x, gates, ids, *weights, 0, True, True, True)
    assert [v.shape for v in found] == [v.shape for v in (x, gates, *weights)]
    assert not any(bool(value.any()) for value in (y, *found))


@needs_operator
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, -1e30])
def test_extreme_rows_stay_their_own(value: float) -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    expected = dispatch(x, plan_choices(ids, gates, 4), pool, "native")
    x[3] = value
    y = dispatch(x, plan_choices(ids, gates, 4), pool, "native")
    reference = dispatch(x, plan_choices(ids, gates, 4), pool, "loop")
    others = torch.arange(7) != 3
    assert torch.equal(y[others], expected[others])
    assert torch.equal(y[3].isfinite(), reference[3].isfinite())


@needs_operator
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_frozen_weights_get_no_gradient(name: str) -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    getattr(pool, name).requires_grad_(False)
    ours = results(pool, x, ids, gates, "native")
    assert name not in ours
    check_close(ours, results(pool, x, ids, gates, "loop"))


@needs_operator
def test_rows_without_gradient_and_expanded_gradients_are_served() -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    dispatch(x, plan_choices(ids, gates, 4), pool, "native").sum().backward()
    ours = pool.down.grad
    pool.zero_grad()
    dispatch(x, plan_choices(ids, gates, 4), pool, "loop").sum().backward()
    torch.testing.assert_close(ours, pool.down.grad, atol=1e-5, rtol=1e-5)


@needs_operator
@pytest.mark.parametrize("kind", [SwiGLU(hidden=12), GeluMLP(hidden=12)])
def test_gradients_have_gradients(kind: ExpertKind) -> None:
    pool, x, ids, gates = make(kind, SHAPES[1])
    x.requires_grad_()
    gates.requires_grad_()

    def second(backend: str) -> list[Tensor]:
        y = dispatch(x, plan_choices(ids, gates, 4), pool, backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        leaves = [x, gates, *(s for s in pool.stacks().values() if s.dim() == 3)]
        return list(torch.autograd.grad(grad.square().sum(), leaves))

    for ours, expected in zip(second("native"), second("loop")):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@needs_operator
def test_forward_mode_and_function_transforms_give_way() -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    made = plan_choices(ids, gates, 4)

    def answer(x: Tensor, backend: str) -> Tensor:
        return dispatch(x, made, pool, backend)

    for transform in (
        lambda run: torch.func.jvp(run, (x,), (torch.ones_like(x),))[1],
        lambda run: torch.func.vjp(run, x)[1](torch.ones_like(x))[0],
    ):
        ours, expected = (transform(lambda x, b=b: answer(x, b)) for b in ("native", "loop"))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@needs_operator
def test_what_the_operator_cannot_read_gives_way() -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    made = plan_choices(ids, gates, 4)
    assert choose(x, made, pool) == "native"
    assert "native" not in available(x.double(), made, pool.double())
    pool.float()
    pool.down.data = pool.down.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert "native" not in available(x, made, pool)
    assert torch.equal(dispatch(x, made, pool, "native"), dispatch(x, made, pool, "sorted"))


@needs_operator
def test_strided_rows_and_samples_equal_the_loop() -> None:
    pool, _, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    wide = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))[:, ::2]
    check_close(*(results(pool, wide, ids, gates, name) for name in ("native", "loop")))
    samples = torch.randn(7, 5, 16, generator=torch.Generator().manual_seed(3))
    made = plan_choices(ids, gates, 4, unit="sample")
    ours, expected = (dispatch(samples, made, pool, name) for name in ("native", "loop"))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@needs_operator
def test_compiled_without_a_break_and_known_to_torch() -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    leaves = [x.requires_grad_(), gates.requires_grad_(), *pool.parameters()]

    def run(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return dispatch(x, plan_choices(ids, gates, 4), pool)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, ours = run(x, ids, gates), compiled(x, ids, gates)
    assert torch.equal(ours, expected)
    for one, other in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, expected))):
        assert torch.equal(one, other)
    call = (x, gates, ids, pool.gate_up, None, pool.down, None, 0, True, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.native_experts, call, test_utils=tests)


@needs_operator
def test_compiled_layer_equals_eager() -> None:
    config = ExpertLayerConfig(num_experts=4, experts={"kind": "swiglu", "hidden": 16})
    layer, h = config.build(16), torch.randn(2, 9, 16)
    ctx = Context(2, 9)
    compiled = torch.compile(lambda x: layer(x, ctx).y, backend="eager")
    torch.testing.assert_close(compiled(h), layer(h, ctx).y, atol=1e-6, rtol=1e-6)


@needs_operator
def test_products_are_counted() -> None:
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = dispatch(x, plan_choices(ids, gates, 4), pool, "native")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 7 * 2 * 3 * 16 * 12
    assert counter.get_total_flops() == 3 * forward


@needs_operator
@pytest.mark.parametrize("width", [4, 16])
def test_registers_of_other_widths_give_the_same_numbers(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    target = tmp_path / "other.so"
    build.compile_to(target, compiler, ("-O0", *build.FLAGS[1:], f"-DCOTERIE_VW={width}"))
    handle = ctypes.CDLL(str(target))
    other = build.Library(handle, "", native.library().openmp)
    assert other.vector == width
    monkeypatch.setattr(op, "library", lambda: other)
    for shape in (SHAPES[2], SHAPES[3], SHAPES[5], (40, 2, 2, 16, 150)):
        pool, x, ids, gates = make(GeluMLP(hidden=shape[4]), shape)
        check_close(results(pool, x, ids, gates, "native"), results(pool, x, ids, gates, "loop"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a compiler that is quick rather than good."""
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))
    return tmp_path / "native"


def test_absent_compiler_and_failed_builds_are_told_not_raised(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: cannot do that' >&2\nexit 1\n")
    broken.chmod(0o755)
    for name, value, reason in (
        ("COTERIE_NATIVE", "0", "off: COTERIE_NATIVE=0"),
        ("CC", "no-such-compiler", "off: no C compiler found"),
        ("CC", str(broken), "cannot do that"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            found = build.library.__wrapped__()
        assert not found.ready and reason in found.reason
    assert not list(own_cache.glob("*.so"))
    monkeypatch.setattr(native, "library", lambda: found)
    pool, x, ids, gates = make(SwiGLU(hidden=12), SHAPES[1])
    made = plan_choices(ids, gates, 4)
    assert "native" not in available(x, made, pool) and choose(x, made, pool) != "native"
    assert torch.equal(dispatch(x, made, pool, "native"), dispatch(x, made, pool, "sorted"))


@needs_operator
def test_built_once_and_again_where_the_file_is_damaged(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    made = own_cache / f"experts-{build.key(compiler)}.so"
    own_cache.mkdir()
    made.write_bytes(b"half of a library")
    assert build.library.__wrapped__().ready
    assert sorted(path.suffix for path in own_cache.iterdir()) == [".lock", ".so"]

    def never(*call: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "compile_to", never)
    assert build.library.__wrapped__().reason == f"compiled by {compiler}"
    monkeypatch.setattr(build, "FLAGS", ("-O2", *build.FLAGS[1:]))
    assert build.key(compiler) not in made.name
