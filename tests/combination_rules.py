"""Which parameters a training step must reach, derived from what the layers did in it.

Every parameter gets a gradient, except where nothing that it does reaches the loss:

* an expert that no row chose with a gate other than 0, or only rows without a gradient (a masked
  text learns nothing from the last layer's answer at a token it was shown);
* a router whose gates are constant (``weight`` one; a single choice renormalised; a softmax over
  a single candidate) and that no balance loss teaches;
* the recurrent weights of a memory that was empty whenever it was used;
* what leads only to experts that ignore their input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, plan
from coterie.experts.routers.recurrent import RecurrentModule

NOISE = 1e-5
"""A gradient below this share of the largest one is rounding, where none is due."""

Place = tuple[str, int, int]  # slot, layer, round
Taught = dict[Place, set[str]]  # what of a routing record a loss reaches: logits, gates, ...


@dataclass(eq=False)
class Call:
    """One round of one layer: what it read, how it was routed, the gradient of its answer."""

    layer: ExpertLayer
    x: Tensor  # [B, N, D]
    routing: Routing
    grad: Tensor | None = None

    @property
    def place(self) -> Place:
        return self.routing.slot, self.routing.layer, self.routing.round

    @property
    def ignores_input(self) -> bool:
        return self.layer.pool.kind.input_free

    def live(self) -> Tensor:
        """bool [R]: rows whose answer the loss depends on."""
        if self.grad is None:
            return torch.zeros(len(self.routing.ids), dtype=torch.bool)
        by_row = self.grad.flatten(0, 1) if self.routing.unit == "token" else self.grad
        return (by_row.flatten(1) != 0).any(dim=1)

    def used(self) -> Tensor:
        """bool [E]: tensors of the pool that live rows use with a gate other than 0."""
        made = plan(self.routing, self.layer._slots, self.layer.pool.num_experts)
        return (made.dense_gates()[self.live()] != 0).any(dim=0)

    def varies(self) -> Tensor:
        """bool [R]: rows whose gates depend on the router."""
        router, routing = self.layer.config.router, self.routing
        made = plan(routing, self.layer._slots, self.layer.pool.num_experts)
        choices = (made.ids < made.num_experts).sum(dim=1)
        fewest = 1
        if router.weight == "renorm" or router.when == "after":
            fewest = 2
        elif router.probability == "softmax":
            choices = choices * ((routing.logits > float("-inf")).sum(dim=1) > 1)
        learnt = router.weight != "one"
        return routing.rows_mask() & (choices >= fewest) & learnt

    def gates_learn(self) -> bool:
        """Whether the loss depends on the router through the gates of some row."""
        return bool((self.live() & self.varies()).any())

    def scales_learn(self) -> bool:
        """Whether a live row uses an expert that the router chose (not a reserved one)."""
        rows = (self.routing.gates != 0).any(dim=1) & self.routing.rows_mask()
        return bool((rows & self.live()).any())


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Call]]:
    """Every round of every expert layer inside the block, in order."""
    calls: list[Call] = []
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]

    def watch(layer: ExpertLayer) -> None:
        def combine(x: Tensor, routing: Routing) -> Tensor:
            y = ExpertLayer.combine(layer, x, routing)
            call = Call(layer, x.detach(), routing)
            calls.append(call)
            if y.requires_grad:
                y.register_hook(lambda grad: setattr(call, "grad", grad.detach()))
            return y

        layer.__dict__["combine"] = combine

    for layer in layers:
        watch(layer)
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.__dict__["combine"]


def taught_by_losses(model: Any, calls: Sequence[Call], routings: Sequence[Routing]) -> Taught:
    """Where a balance loss has a gradient at what the router made, and at what of it: asked of
    copies of the records that are leaves."""
    by_place = {call.place: call for call in calls}
    copies, leaves = [], []
    for routing in routings:
        call = by_place[routing.slot, routing.layer, routing.round]
        scores, probs = scores_behind(routing, call.layer.config.router.probability)
        inputs = None if routing.inputs is None else routing.inputs.detach()
        own = {"logits": routing.logits, "gates": routing.gates, "prototypes": routing.prototypes}
        own = {k: v.detach().requires_grad_() for k, v in own.items() if v is not None}
        copies.append(routing.detach().replace(inputs=inputs, probs=probs, **own))
        leaves.append((call, {**own, "scores": scores}))
    terms = [aux.weight * aux.value for aux in model.aux_losses(copies)]
    terms = [term for term in terms if term.requires_grad]
    if terms:
        torch.stack(terms).sum().backward()
    found = {call.place: what_is_taught(call, own) for call, own in leaves}
    return {place: names for place, names in found.items() if names}


def scores_behind(routing: Routing, probability: str) -> tuple[Tensor, Tensor]:
    """A leaf, and the probabilities made of it, equal to the recorded ones. What a softmax gave to
    candidates that were closed after it is one more score."""
    probs = routing.probs.detach()
    if probability == "softmax":
        rest = (1 - probs.sum(dim=1, keepdim=True)).clamp_min(0)
        scores = torch.cat([probs, rest], dim=1).log().requires_grad_()
        return scores, scores.softmax(dim=1)[:, :-1]
    scores = (probs.logit() if probability == "sigmoid" else probs.clone()).requires_grad_()
    return scores, scores.sigmoid() if probability == "sigmoid" else scores


def what_is_taught(call: Call, leaves: dict[str, Tensor]) -> set[str]:
    found = set()
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            grad = leaf.grad[call.varies()] if name == "gates" else leaf.grad
            if bool((grad.nan_to_num().abs() > 1e-7).any()):
                found.add(name)
    return found


def due(model: Any, calls: Sequence[Call], taught: Taught) -> Iterator[nn.Parameter]:
    """Parameters outside the pools that one forward pass must have reached."""
    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    inside = {id(p) for layer in layers for p in (*layer.parameters(), *layer.pool.parameters())}
    idle = {id(p) for p in unread_norms(model, calls, taught)}
    for parameter in model.parameters():
        if id(parameter) not in inside | idle:
            yield parameter
    for number, call in enumerate(calls):
        if call.live().any():
            yield from around_experts(call)
        yield from of_router(call, calls[:number], calls[number:], taught)


def around_experts(call: Call) -> Iterator[nn.Parameter]:
    for name, part in call.layer.named_children():
        if name not in ("routers", "pool") and (name != "stem" or call.used().any()):
            unfed = part.up.weight if name == "adaptor" and not answered(call) else None
            yield from (p for p in part.parameters() if p is not unfed)


def answered(call: Call) -> bool:
    """Whether anything but 0 came out of the experts, so that an adaptor has something to read."""
    return call.layer.shared is not None or bool(call.used().any())


def of_router(
    call: Call, before: Sequence[Call], after: Sequence[Call], taught: Taught
) -> Iterator[nn.Parameter]:
    """``after`` begins with the call itself: a memory passes the gradient of later layers on."""
    router = call.layer.router(call.routing.round)
    if router.expert_scale is not None and call.scales_learn():
        yield router.expert_scale
    same = [later for later in after if later.place[0] == call.place[0]]
    learns = [later.gates_learn() or later.place in taught for later in same]
    score = router.score
    if call.gates_learn() or taught.get(call.place, set()) - {"prototypes"}:
        yield from router.edits.parameters()  # they change logits, which prototypes come before
    if learns[0] and not isinstance(score, RecurrentModule):
        yield from score.parameters()
    if isinstance(score, RecurrentModule):
        fed = score.config.start == "time" or any(b.place[0] == call.place[0] for b in before)
        if learns[0]:
            yield score.proj.weight
        if any(learns[: 1 if score.config.detach else None]):
            yield score.inner.weight
            for name, parameter in score.memory.named_parameters():
                if fed or name != "cell.weight_hh":
                    yield parameter


def reads_input(call: Call, taught: Taught) -> bool:
    """Whether the loss depends on what the layer read, through this round of it."""
    layer, router = call.layer, call.layer.config.router
    learns = call.gates_learn() or call.place in taught
    scored = router.score_part.reads_rows and layer.config.router_reads != "stream"
    asks = learns and (scored or layer.self_gate is not None)
    if layer.config.answer == "output" and layer.config.inner_residual:
        return True
    if call.routing.round and layer.config.round_routing == "frozen":
        return asks
    if call.routing.round and not layer.config.inner_residual:
        return False
    return asks or layer.shared is not None or bool(call.used().any() and not call.ignores_input)


def unread_norms(model: Any, calls: Sequence[Call], taught: Taught) -> Iterator[nn.Parameter]:
    """Norms before an ``ffn`` whose experts ignore their input, where nothing else reads it."""
    read = {call.place[:2] for call in calls if reads_input(call, taught)}
    for slot, layer in {call.place[:2] for call in calls} - read:
        if slot == "ffn":
            yield from model.backbone.trunk.blocks[layer].norm2.parameters()


def cut_off(model: Any, calls: Sequence[Call], taught: Taught) -> Iterator[nn.Parameter]:
    """What comes before a layer whose answer replaces the stream and does not depend on it (all its
    gates are 0): a gradient reaches it by other ways or not at all."""
    read = {call.place[:2] for call in calls if reads_input(call, taught)}
    replaced = {slot.slot for slot in model.config.backbone.trunk.slots if not slot.residual}
    ends = [layer for slot, layer in {call.place[:2] for call in calls} - read if slot in replaced]
    if not ends:
        return
    block = model.backbone.trunk.blocks[max(ends)]
    last = {id(p) for p in block.parameters()}
    own = {id(p) for p in block.ffn.parameters()}
    reached = False
    for parameter in model.parameters():
        reached = reached or id(parameter) in last
        if reached and id(parameter) not in last:
            return
        if id(parameter) not in own:
            yield parameter


class Gradients:
    """The largest gradient of each parameter over some steps, and which were due."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.largest = {name: torch.zeros(()) for name in self.names.values()}
        self.due: set[str] = set()
        self.free: set[str] = set()  # cut off in some step
        self.experts: dict[str, Tensor] = {}  # [E], largest of each expert
        self.used: dict[str, Tensor] = {}  # bool [E]
        self.wrong: set[str] = set()

    def collect(self, calls: Sequence[Call], routings: Sequence[Routing]) -> None:
        """Once after each step, with its calls."""
        for call in calls:
            for parameter in call.layer.pool.parameters():
                name, used = self.names[id(parameter)], call.used()
                self.used[name] = self.used.get(name, used) | used
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self._count(name, parameter.grad.abs())
        taught = taught_by_losses(self.model, calls, routings)
        if hasattr(self.model.config.backbone, "trunk"):
            self.free |= {self.names[id(p)] for p in cut_off(self.model, calls, taught)}
        self.due |= {self.names[id(p)] for p in due(self.model, calls, taught)}

    def _count(self, name: str, grad: Tensor) -> None:
        if not grad.isfinite().all():
            self.wrong.add(f"{name}: gradient is not finite")
        self.largest[name] = torch.maximum(self.largest[name], grad.max())
        if name in self.used:
            each = grad.flatten(1).amax(dim=1)
            self.experts[name] = torch.maximum(self.experts.get(name, each), each)

    def problems(self) -> list[str]:
        """Parameters without the gradient they are due, or with one that they are not."""
        wrong = sorted(self.wrong)
        noise = NOISE * max(self.largest.values())
        for name, largest in self.largest.items():
            if name in self.used:
                if not torch.equal(self.experts[name] > 0, self.used[name]):
                    gradients = [f"{value:.0e}" for value in self.experts[name].tolist()]
                    wrong.append(f"{name}: {gradients} for use {self.used[name].tolist()}")
            elif name in self.free and largest == 0:
                continue
            elif (name in self.due) != bool(largest > (0 if name in self.due else noise)):
                wrong.append(f"{name}: gradient {largest:.0e}, due: {name in self.due}")
        return wrong
