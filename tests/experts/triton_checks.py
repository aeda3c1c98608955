"""Checks of the Triton kernels, each a function: ``python triton_checks.py NAME``.

A process of their own, because Triton decides once, when it is imported, whether it interprets.
On a CUDA device if there is one, else interpreted on the CPU; ``hopper`` compiles without a device.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and sys.argv[1:] != ["hopper"]:
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from coterie.core.routing import Routing  # noqa: E402
from coterie.experts import ExpertLayerConfig, ExpertPool, dispatch  # noqa: E402
from coterie.experts.dispatch import BACKENDS, DispatchPlan, available, choose  # noqa: E402
from coterie.experts.dispatch.triton import backward, kernels, launch, op, tiles  # noqa: E402
from coterie.experts.kinds import Affine, ExpertKind, GeluMLP, SwiGLU  # noqa: E402

SHARED_MEMORY = 227 * 1024  # bytes a program may use on compute capability 9.0


def choices(rows: int, num_experts: int, k: int, load: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(rows + k)
    score = torch.rand(rows, num_experts, generator=rng)
    if load == "skewed":  # almost all rows choose expert 0; the last third is never chosen
        score[:, 0] += 0.95
        score[:, -(num_experts // 3) :] -= 1.0
    ids = score.argsort(dim=1, descending=True)[:, :k]
    if load == "nobody":
        ids = torch.full_like(ids, num_experts)
    elif load == "sentinels":
        ids[torch.rand(rows, k, generator=rng) < 0.3] = num_experts
    gates = torch.rand(rows, k, generator=rng).masked_fill(ids == num_experts, 0.0)
    return ids.to(DEVICE), gates.to(DEVICE)


def make_pool(kind: ExpertKind, num_experts: int, width: int, dtype: torch.dtype) -> ExpertPool:
    pool = ExpertPool(kind, num_experts, width)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for stack in pool.parameters():
            stack.normal_(0.0, 0.3, generator=rng)
    return pool.to(DEVICE, dtype)


def answers(
    pool: ExpertPool, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, backend: str
) -> list[torch.Tensor]:
    """The output and all gradients, for a fixed gradient of the output."""
    x, gates = x.detach().clone().requires_grad_(), gates.clone().requires_grad_()
    unit = "token" if x.dim() == 2 else "sample"
    y = BACKENDS[backend](x, DispatchPlan(unit, ids, gates, pool.num_experts), pool, False)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).sin().view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, gates, *pool.parameters()], dy.to(y.dtype))]


def check(
    kind: ExpertKind,
    shape: tuple[int, ...],
    num_experts: int,
    k: int,
    load: str = "even",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-6,
) -> None:
    """Relative error of the output and of each gradient against the loop in float64."""
    ids, gates = choices(shape[0], num_experts, k, load)
    pool = make_pool(kind, num_experts, shape[-1], dtype)
    exact = ExpertPool(kind, num_experts, shape[-1]).to(DEVICE, torch.float64)
    exact.load_state_dict(pool.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    for value in (ids, gates, x):
        assert value.device.type == DEVICE
    made = answers(pool, x, ids, gates, "triton")
    expected = answers(exact, x.double(), ids, gates, "loop")
    for place, (ours, true) in enumerate(zip(made, expected, strict=True)):
        error = (ours.double() - true).norm()
        assert error <= tolerance * true.norm(), (kind, shape, load, place, float(error))


def float32() -> None:
    check(SwiGLU(hidden=24), (37, 20), 5, 2, "skewed")
    check(SwiGLU(hidden=8), (9, 16), 3, 2, "nobody")
    check(GeluMLP(hidden=20), (21, 24), 6, 3, "sentinels")
    check(SwiGLU(hidden=64), (70, 64), 3, 2)  # whole blocks
    check(SwiGLU(hidden=8, activation="gelu"), (1, 16), 4, 1)
    check(GeluMLP(hidden=16), (5, 16), 32, 6)
    check(SwiGLU(hidden=16), (3, 7, 16), 4, 2, "sentinels")  # a routing for each of 3 samples


def half() -> None:
    check(SwiGLU(hidden=40), (30, 48), 4, 3, "sentinels", torch.bfloat16, 1.5e-2)
    check(GeluMLP(hidden=40), (30, 48), 4, 3, "sentinels", torch.float16, 2e-3)


def activations() -> None:
    """Values and slopes of each activation, over a range, as torch gives them."""

    @triton.jit
    def both(x, value, slope, KIND: triton.language.constexpr) -> None:
        i = triton.language.arange(0, 64)
        at = triton.language.load(x + i)
        triton.language.store(value + i, kernels.activate(at, KIND))
        triton.language.store(slope + i, backward.slope(at, KIND))

    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.nn.functional.relu,
    }
    for name, function in functions.items():
        x = torch.linspace(-9, 9, 64, device=DEVICE)
        value, slope = torch.empty_like(x), torch.empty_like(x)
        both[(1,)](x, value, slope, KIND=name)
        exact = x.double().requires_grad_()
        true = function(exact)
        (true_slope,) = torch.autograd.grad(true.sum(), exact)
        torch.testing.assert_close(value.double(), true, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(slope.double(), true_slope, atol=2e-6, rtol=2e-6)


def layer() -> None:
    """In the expert layer, through torch.compile, and as torch's own operator check sees it."""
    config = ExpertLayerConfig(num_experts=4, experts={"kind": "swiglu", "hidden": 16})
    made = [config.replace(dispatch=name).build(16).to(DEVICE) for name in ("loop", "triton")]
    made[1].load_state_dict(made[0].state_dict())
    from coterie.core.context import Context

    h = torch.randn(2, 9, 16, device=DEVICE)
    expected, ours = (one(h, Context(2, 9)).y for one in made)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)

    ids, gates = choices(12, 4, 2, "sentinels")
    pool = make_pool(SwiGLU(hidden=16), 4, 16, torch.float32)
    x = torch.randn(12, 16, device=DEVICE)
    plan = DispatchPlan("token", ids, gates, 4)
    assert "triton" in available(x, plan, pool)
    assert (choose(x, plan, pool) == "triton") == (DEVICE == "cuda")
    affine = ExpertPool(Affine(), 4, 16).to(DEVICE)
    assert "triton" not in available(x, plan, affine)
    assert "triton" not in available(x.double(), plan, pool)

    def run(x: torch.Tensor, gates: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return dispatch(x, DispatchPlan("token", ids, gates, 4), pool, "triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), gates.requires_grad_(), pool.gate_up]
    found = []
    for call in (run, compiled):
        y = call(*leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(run(*leaves).sum(), leaves)
    assert counter.get_total_flops() == 3 * 2 * 24 * 3 * 16 * 16  # 24 choices, each slot counted
    tangent = torch.func.jvp(lambda x: run(x, gates, pool.gate_up), (x,), (torch.ones_like(x),))[1]
    assert tangent.isfinite().all()  # by other backends: the kernels have no such rule
    arguments = (
        x, gates, ids, *plan.segments, pool.gate_up, pool.down,
        None, None, "silu", True, False, True,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.triton_experts, arguments, test_utils=checks)


def edges() -> None:
    """What nobody chose is not read; frozen weights get no gradient; sums in float32 on request."""
    pool = make_pool(SwiGLU(hidden=8), 3, 16, torch.float32)
    x = torch.randn(4, 16, device=DEVICE)
    x[1] = float("nan")
    x.requires_grad_()
    ids = torch.tensor([[0, 1], [3, 3], [2, 3], [1, 0]], device=DEVICE)
    gates = torch.rand(4, 2, device=DEVICE).masked_fill(ids == 3, 0.0)
    y = dispatch(x, DispatchPlan("token", ids, gates, 3), pool, "triton")
    y.sum().backward()
    assert y.isfinite().all() and y[1].abs().max() == 0
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[1].abs().max() == 0
    assert all(stack.grad.isfinite().all() for stack in pool.parameters())

    pool.requires_grad_(False)
    expected, x.grad = x.grad.clone(), None
    dispatch(x, DispatchPlan("token", ids, gates, 3), pool, "triton").sum().backward()
    torch.testing.assert_close(x.grad, expected)
    with torch.no_grad():
        again = dispatch(x, DispatchPlan("token", ids, gates, 3), pool, "triton")
    assert torch.equal(again, y.detach())  # no sum depends on an order

    pool = ExpertPool(GeluMLP(hidden=16), 16, 16).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        pool.up.zero_()
        pool.down_bias.fill_(0.5)
        pool.down_bias[0] = 256.0
    routing = Routing(
        "token", 16, *(torch.arange(16).expand(5, 16).to(DEVICE), torch.ones(5, 16, device=DEVICE)),
        torch.ones(5, 16), torch.ones(5, 16), (1, 5),
    )  # fmt: skip
    plan = DispatchPlan("token", routing.ids, routing.gates, 16)
    zeros = torch.zeros(5, 16, dtype=torch.bfloat16, device=DEVICE)
    assert (dispatch(zeros, plan, pool, "triton", float32=True) == 264.0).all()


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


class Recorder:
    """In the place of a kernel: compiles what a launch asks for, without a device."""

    def __init__(self, kernel: Any, found: dict[str, Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        if self.kernel.__name__ in self.found and not named.get("GATED"):
            return  # one variant of each, two of those that know a gate
        options = {key: named.pop(key) for key in ("num_warps", "num_stages") if key in named}
        values = dict(zip(self.kernel.arg_names, args)) | named
        signature, constants, hints = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
                continue
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = POINTERS[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, signature, constants, hints)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        made = triton.compile(source, target=target, options=options)
        self.found.setdefault(self.kernel.__name__, []).append(made)


def hopper() -> None:
    """Every kernel compiles for compute capability 9.0, fits its shared memory and, with a product,
    uses the matrix units: an interpreter does not see types that do not match, nor sizes."""
    found: dict[str, list[Any]] = {}
    for module in (kernels, backward, tiles):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), found))
    for kind, rows in ((GeluMLP(hidden=256), 2048), (SwiGLU(hidden=64), 8)):
        pool = ExpertPool(kind, 8, 128).bfloat16()
        made = kind.feed_forward()
        stacks = {**pool.stacks(), None: None}
        plan = DispatchPlan(
            "token", torch.zeros(rows, 2, dtype=torch.int64), torch.ones(rows, 2), 8
        )
        names = (made.up, made.down, made.up_bias, made.down_bias)
        x = torch.zeros(rows, 128, dtype=torch.bfloat16)
        call = launch.Call(
            x, plan.gates, plan.ids, *plan.segments,
            *(stacks[name] for name in names), made.activation, made.gated,
        )  # fmt: skip
        y, hidden = launch.forward(call, True, torch.bfloat16)
        launch.gradients(call, hidden, y, True, True)
    expected = {"hidden", "answer", "hidden_grad", "weight_grad"}
    assert {name.removesuffix("_kernel") for name in found} > expected
    for name, variants in found.items():
        assert all(one.metadata.shared <= SHARED_MEMORY for one in variants), name
        if name.removesuffix("_kernel") in expected:
            assert "wgmma.mma_async" in variants[0].asm["ptx"], name


CHECKS = {one.__name__: one for one in (float32, half, activations, layer, edges, hopper)}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for name in sys.argv[1:]:
            CHECKS[name]()
