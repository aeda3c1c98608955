"""What expert layers are timed beside: the least that must be computed, and other libraries.

``dense_layer``: one SwiGLU network of equal active cost. ``floor``: every expert, products and
activation, on rows that lie sorted already; nothing gathered, weighed or scattered. ``products``:
the same without the activation. ``transformers-*``: the experts of Mixtral in each implementation
that runs here, with the same weights and choices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.bench.expert_cases import Call, Setup
from coterie.core.errors import CoterieError
from coterie.experts.kinds import SwiGLU

DENSE_LAYER = "dense_layer"
FLOOR = "floor"
PRODUCTS = "products"
PACKAGE = "transformers"
EAGER = f"{PACKAGE}-eager"
ONE_THREAD = "auto, one thread"
_COPIED_BYTES = 2 * 2**30  # weights that batched_mm copies, a set for every choice of every row
_TOLERANCE = 1e-4


def dense_layer(setup: Setup) -> Call:
    case = setup.case
    wide = SwiGLU(hidden=case.hidden * case.top_k).module(case.width).to(setup.x)
    return Call(lambda: wide(setup.x), [setup.x, *wide.parameters()])


class Sorted:
    """Rows, gradients and weights of each expert that has rows, sorted before the clock starts."""

    def __init__(self, setup: Setup) -> None:
        made = setup.plan
        weights = [(own["gate_up"].detach(), own["down"].detach()) for own in setup.pool.unbind()]
        x = setup.x.detach().index_select(0, made.rows).split(made.counts)
        grad = setup.grad.index_select(0, made.rows).split(made.counts)
        used = [e for e, count in enumerate(made.counts) if count]
        self.parts = [(x[e], grad[e], *weights[e]) for e in used]

    @torch.no_grad()
    def products(self) -> None:
        """Two products for every expert."""
        for x, _, gate_up, down in self.parts:
            inner = x @ gate_up.T
            _ = inner[:, : down.shape[1]] @ down.T

    @torch.no_grad()
    def products_train(self) -> None:
        """The two, and for each the product that makes either gradient; those of weights stay."""
        kept = []
        for x, grad, gate_up, down in self.parts:
            wide = x @ gate_up.T
            inner = wide[:, : down.shape[1]]
            _ = (inner @ down.T, grad @ down, wide @ gate_up)
            kept.append((grad.T @ inner, wide.T @ x))

    @torch.no_grad()
    def forward(self) -> None:
        for x, _, gate_up, down in self.parts:
            gate, up = (x @ gate_up.T).chunk(2, dim=1)
            _ = (F.silu(gate) * up) @ down.T

    @torch.no_grad()
    def train(self) -> None:
        """Forward and backward by hand: no graph, no gates. Gradients of weights stay."""
        kept = []
        for x, grad, gate_up, down in self.parts:
            gate, up = (x @ gate_up.T).chunk(2, dim=1)
            opened = F.silu(gate)
            inner = opened * up
            _ = inner @ down.T
            back = grad @ down
            wide = torch.cat([_silu_backward(back * up, gate), back * opened], dim=1)
            _ = wide @ gate_up
            kept.append((grad.T @ inner, wide.T @ x))


_silu_backward = torch.ops.aten.silu_backward


def transformers_calls(setup: Setup) -> dict[str, Call]:
    """Mixtral's experts with our weights, checked against ours; {} if not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return {}
    names = ["eager", "grouped_mm"]
    per_choice = sum(stack[0].numel() * stack.itemsize for stack in setup.pool.stacks().values())
    if not setup.case.train and setup.routing.ids.numel() * per_choice < _COPIED_BYTES:
        names.append("batched_mm")
    return {f"{PACKAGE}-{name}": _mixtral(setup, name) for name in names}


def _mixtral(setup: Setup, implementation: str) -> Call:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    case, pool = setup.case, setup.pool
    config = MixtralConfig(
        hidden_size=case.width,
        intermediate_size=case.hidden,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    stacks = pool.stacks()
    experts.gate_up_proj = nn.Parameter(_contiguous(stacks["gate_up"]))
    experts.down_proj = nn.Parameter(_contiguous(stacks["down"]))

    def run() -> Tensor:
        return experts(setup.x, setup.routing.ids, setup.routing.gates.to(setup.x.dtype))

    _same(run, setup, f"{PACKAGE}-{implementation}")
    return Call(run, setup.leaves(experts))


def _contiguous(stack: Tensor) -> Tensor:
    """The layout the peer stores; shared with ours where it is the same."""
    return stack.detach().contiguous()


def _same(run: Callable[[], Tensor], setup: Setup, name: str) -> None:
    with torch.no_grad():
        ours, theirs = setup.backends()["auto"].run(), run()
        error = float((ours - theirs).abs().max() / ours.abs().max())
    if error > _TOLERANCE and setup.x.dtype == torch.float32:
        raise CoterieError(f"{name} answers otherwise than ours at {setup.case.name}: {error:.1e}")


def is_limit(name: str) -> bool:
    """A way to read memory, which no layer that reads as much can undercut by much."""
    return name.startswith("read: ")


def is_peer(name: str) -> bool:
    """A way that others have: the plain loop, torch's grouped product, another library."""
    return name in ("loop", "grouped") or name.startswith(PACKAGE)
