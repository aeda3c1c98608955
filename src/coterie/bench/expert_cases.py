"""Sizes at which expert layers are timed, and what one is timed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coterie.bench.timing import Place
from coterie.core.routing import Routing
from coterie.experts.dispatch import DispatchPlan, available, dispatch, plan
from coterie.experts.kinds import ExpertPool, SwiGLU


@dataclass(frozen=True)
class Case:
    """SwiGLU experts of inner size ``hidden``; ``train`` False: forward only (decoding)."""

    name: str
    tokens: int
    width: int
    hidden: int
    num_experts: int
    top_k: int
    train: bool = True


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("S2", 2048, 384, 1536, 8, 2),
        Case("S2-b32", 8192, 384, 1536, 8, 2),
        Case("B2", 1024, 768, 3072, 16, 2),
        Case("fine64", 2048, 384, 256, 64, 6),
        Case("small", 2048, 192, 384, 16, 2),
        Case("decode8", 8, 768, 3072, 16, 2, train=False),
        Case("fine-decode16", 16, 384, 256, 64, 6, train=False),
    )
}


def make_routing(case: Case, device: str = "cpu") -> Routing:
    """Random choices with a mildly skewed load, gates that ask for a gradient."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(case.tokens, case.num_experts, generator=rng)
    logits += torch.linspace(0.0, 0.5, case.num_experts)
    probs = logits.softmax(dim=1)
    gates, ids = (value.to(device) for value in probs.topk(case.top_k, dim=1))
    gates.requires_grad_()
    probs, logits = probs.to(device), logits.to(device)
    return Routing("token", case.num_experts, ids, gates, probs, logits, (1, case.tokens))


class Call(NamedTuple):
    """``run() -> [T, D]`` and the tensors whose gradients a training step makes."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]

    def forward(self) -> None:
        with torch.no_grad():
            self.run()

    def train(self, grad: Tensor) -> None:
        """Forward and backward from ``grad`` [T, D]; gradients are made anew, as after
        ``zero_grad(set_to_none=True)``."""
        torch.autograd.grad(self.run(), self.leaves, grad)


class Setup:
    """One case: random rows x [T, D], the choices of each, a pool, and a gradient of the answer."""

    def __init__(self, case: Case, place: Place) -> None:
        self.case = case
        pool = ExpertPool(SwiGLU(hidden=case.hidden), case.num_experts, case.width)
        self.pool = pool.to(place.device, place.dtype)
        self.routing = make_routing(case, place.device)
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(case.tokens, case.width, generator=rng).to(place.device, place.dtype)
        self.grad = torch.randn(x.shape, generator=rng).to(x)
        self.x = x.requires_grad_()
        self.plan: DispatchPlan = plan(self.routing)

    def leaves(self, *modules: nn.Module) -> list[Tensor]:
        """x, the gates and the parameters of the modules."""
        return [self.x, self.routing.gates, *(p for m in modules for p in m.parameters())]

    def backends(self) -> dict[str, Call]:
        """Every dispatch backend that can serve the case, and ``auto``; the plan is made anew in
        each call, as it is in a model."""
        case = self.case
        names = [n for n in available(self.x, self.plan, self.pool) if n != "dense"]
        if case.num_experts <= 2 * case.top_k:
            names.append("dense")
        leaves = self.leaves(self.pool)

        def call(name: str) -> Call:
            return Call(lambda: dispatch(self.x, plan(self.routing), self.pool, name), leaves)

        return {name: call(name) for name in [*names, "auto"]}
