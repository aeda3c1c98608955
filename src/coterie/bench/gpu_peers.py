"""Expert layers of others on a GPU, with our weights and choices; what is missing is named.

``cublas``: the products alone, batched over experts with equally many rows each: what no layer that
sorts real choices undercuts by much. ``liger``: the fused layer of liger-kernel. ``sonicmoe``:
SonicMoE (arXiv:2512.14080). ``scattermoe``: ScatterMoE (arXiv:2403.08245). The others are those of
``expert_peers``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.bench.expert_cases import Call, Setup
from coterie.bench.expert_peers import DENSE_LAYER, dense_layer, transformers_calls

CUBLAS = "cublas"
PEERS = (
    "grouped",
    "transformers-eager",
    "transformers-grouped_mm",
    "liger",
    "sonicmoe",
    "scattermoe",
)
"""Layers of others that ours is held against; ``grouped`` is torch's product in our layer."""


class Balanced:
    """x [E, A / E, D], weights [E, ...]: batched products, forward and for every gradient."""

    def __init__(self, setup: Setup) -> None:
        case = setup.case
        rows = max(1, case.tokens * case.top_k // case.num_experts)
        stacks = {name: stack.detach() for name, stack in setup.pool.stacks().items()}
        self.up, self.down = stacks["gate_up"], stacks["down"]
        shape = (case.num_experts, rows, case.width)
        self.x = torch.randn(shape, device=setup.x.device, dtype=setup.x.dtype)

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        wide = self.x @ self.up.mT
        inner = wide[..., : self.down.shape[2]]
        return wide, inner, inner @ self.down.mT

    @torch.no_grad()
    def train(self) -> None:
        wide, inner, y = self.forward()
        _ = (y @ self.down, y.mT @ inner, wide @ self.up, wide.mT @ self.x)


def _liger(setup: Setup) -> dict[str, Call]:
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    stacks, ids = setup.pool.stacks(), setup.routing.ids.int()

    def run() -> Tensor:
        gates = setup.routing.gates.to(setup.x.dtype)
        made: Tensor = function.apply(setup.x, stacks["gate_up"], stacks["down"], ids, gates)
        return made

    return {"liger": Call(run, setup.leaves(setup.pool))}


def _sonicmoe(setup: Setup) -> dict[str, Call]:
    """Its entry that takes choices as they are; weights are views [2F, D, E] of ours."""
    layer = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    case, stacks = setup.case, setup.pool.stacks()
    rows = torch.arange(case.tokens, dtype=torch.int32, device=setup.x.device)
    rows = rows.repeat_interleave(case.top_k)
    ids = setup.routing.ids.flatten().int()
    up, down = (stacks[name].permute(1, 2, 0) for name in ("gate_up", "down"))
    stream = torch.cuda.current_stream().cuda_stream

    def run() -> Tensor:
        gates = setup.routing.gates.flatten()
        made = layer(
            setup.x, gates, rows, ids, up, None, down, None, case.num_experts, stream, swiglu,
            concat_layout=True,
        )  # fmt: skip
        y: Tensor = made[0]
        return y

    return {"sonicmoe": Call(run, setup.leaves(setup.pool))}


def _scattermoe(setup: Setup) -> dict[str, Call]:
    layer = importlib.import_module("scattermoe.mlp").GLUMLP
    case, stacks = setup.case, setup.pool.stacks()
    made: Any = layer(case.width, case.hidden, case.num_experts, case.top_k)
    gate, up = stacks["gate_up"].detach().chunk(2, dim=1)
    made.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
    made.output_experts.weight = nn.Parameter(stacks["down"].detach().clone())

    def run() -> Tensor:
        y: Tensor = made(setup.x, setup.routing.gates.to(setup.x.dtype), setup.routing.ids)
        return y

    return {"scattermoe": Call(run, setup.leaves(made))}


_KERNELS: dict[str, Callable[[Setup], dict[str, Call]]] = {
    "liger": _liger,
    "sonicmoe": _sonicmoe,
    "scattermoe": _scattermoe,
}


def reason(error: BaseException) -> str:
    """One line that says why a peer has no figures."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error.name})"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else 'no message'}"


def candidates(setup: Setup) -> tuple[dict[str, Call], dict[str, str]]:
    """Every layer that can be built here, ours among them; and why the others cannot."""
    calls = {DENSE_LAYER: dense_layer(setup)}
    calls |= {name: call for name, call in setup.backends().items() if name != "loop"}
    missing: dict[str, str] = {}
    builders = {"transformers": transformers_calls, **_KERNELS}
    for name, build in builders.items():
        try:
            calls |= build(setup)
        except Exception as error:  # whatever a peer does here, the others are still measured
            missing[name] = reason(error)
    if "transformers-batched_mm" not in calls:
        per_choice = sum(
            stack[0].numel() * stack.itemsize for stack in setup.pool.stacks().values()
        )
        copied = setup.routing.ids.numel() * per_choice / 2**30
        missing["transformers-batched_mm"] = f"would copy {copied:.3g} GiB of weights in a call"
    if "triton" not in calls:
        missing["triton"] = "no CUDA device, or triton is not installed"
    return calls, missing
