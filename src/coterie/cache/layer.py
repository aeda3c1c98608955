"""An expert layer with one fused expert per step in place of its router and experts.

Shapes: B samples, N tokens, D width, E experts, K choices, S steps, C rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coterie.cache.schedule import Steps, current
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, SharedExperts, plan
from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.single_expert import run_one

NOISE_LEVEL = frozenset({"noise", "step_index", "time_embedding"})
"""Fields of the Context that are the same wherever the noise level is."""

_FIELDS = ("ids", "gates", "probs", "logits")
_KEPT = 256  # routings


def check_foldable(layer: ExpertLayer, name: str) -> None:
    """ConfigError, with the layer's name, if its choices depend on more than the noise level."""
    router = layer.config.router
    score = router.score_part
    known = NOISE_LEVEL if layer.config.noise_tasks is None else NOISE_LEVEL | {"task"}
    by_noise = set(score.reads) and set(score.reads) <= known
    if score.reads_rows or router.routed_unit != "sample" or not by_noise:
        hint = "its choices depend on more than the noise level"
        raise ConfigError(describe(f"{name}: score", score.kind, "noise_level, noise_window", hint))
    for field, kind, reads in router.reads:
        if not set(reads) <= known:
            hint = f"it reads {', '.join(reads)}"
            raise ConfigError(describe(f"{name}: {field}", kind, "parts that read none", hint))
    if layer.self_gate is not None:
        hint = "it reads what the experts read"
        raise ConfigError(describe(f"{name}: self_gate", layer.config.self_gate, "null", hint))


class FoldedLayer(ExpertLayer):
    """``layer(h, ctx) -> ExpertOutput`` as the original layer, at the steps of a grid.

    ``recorded``: its routings at S samples, one per step, a list per round. Stem, adaptor and
    shared experts that cannot be fused are those of ``layer``.
    """

    def __init__(self, layer: ExpertLayer, recorded: Sequence[Routing], name: str) -> None:
        nn.Module.__init__(self)
        self.config, self.width, self.pool_layers = layer.config, layer.width, layer.pool_layers
        self.owner = layer.owner
        self.num_experts = recorded[0].num_experts
        self.stem, self.adaptor = layer.stem, layer.adaptor
        always, self.shared = _always(layer)
        self._kept: dict[tuple[int, tuple[int, ...]], Routing] = {}
        self._experts: dict[tuple[int, int], OneExpert] = {}
        self._widths: list[list[int]] = []  # experts used, by round and step
        for routing in recorded:
            self._record(routing)
        self._places: list[list[dict[str, str] | None]] = []
        self.num_tensors = 0
        for routing in recorded:
            try:
                self._places.append(self._fuse(layer, routing, always))
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None

    def _record(self, routing: Routing) -> None:
        for field in _FIELDS:
            self.register_buffer(f"{field}{routing.round}", getattr(routing, field).detach())
        self._widths.append((routing.ids < routing.num_experts).sum(dim=1).tolist())
        table = None if routing.table is None else routing.table.detach()
        self.register_buffer(f"table{routing.round}", table)

    @torch.no_grad()
    def _fuse(
        self, layer: ExpertLayer, routing: Routing, always: list[tuple[float, dict[str, Tensor]]]
    ) -> list[dict[str, str] | None]:
        """Name of a parameter -> buffer that holds it, for every step of one round.

        What steps have in common is stored once: all of it where they agree in choice and gates,
        what no gate enters where they agree in choice.
        """
        made = plan(routing, layer._slots, layer.pool.num_experts)
        tables = dict(layer.pool.named_buffers(recurse=False))
        stacks = {**layer.pool.adapted().stacks(), **tables}
        known: dict[tuple[int, ...], dict[str, str]] = {}
        out: list[dict[str, str] | None] = []
        for ids, gates in zip(made.ids.tolist(), made.gates):
            pairs = sorted((e, place) for place, e in enumerate(ids) if e < made.num_experts)
            chosen = tuple(e for e, _ in pairs)
            experts = [{n: stack[e] for n, stack in stacks.items()} for e in chosen]
            experts += [weights for _, weights in always]
            kept = [gates[place] for _, place in pairs]
            kept += [gates.new_tensor(gate) for gate, _ in always]
            if not experts:
                out.append(None)
                continue
            fused = layer.pool.kind.fuse(experts, torch.stack(kept))
            known[chosen] = self._store(fused, known.get(chosen, {}))
            out.append(known[chosen])
        return out

    def _store(self, fused: dict[str, Tensor], before: dict[str, str]) -> dict[str, str]:
        places = {}
        for name, value in fused.items():
            place = before.get(name)
            if place is None or not torch.equal(self.get_buffer(place), value):
                place = f"{name}_{self.num_tensors}"
                self.register_buffer(place, value.detach(), persistent=False)
                self.num_tensors += 1
            places[name] = place
        return places

    def experts_used(self, step: int) -> int:
        """Over all rounds."""
        return sum(widths[step] for widths in self._widths)

    def fused(self) -> list[Tensor]:
        """Every tensor made from experts."""
        places = {p for steps in self._places for step in steps for p in (step or {}).values()}
        return [self.get_buffer(place) for place in sorted(places)]

    def _route(self, x: Tensor, ctx: Context, before: list[Routing]) -> Routing:
        """What the router answered when it ran, for the samples at hand."""
        some = None if ctx.token_mask is None else ctx.token_mask.any(dim=1)
        if some is not None and not bool(some.all()):
            raise DataError("token_mask: a sample without tokens has no routing to look up")
        tokens = x[0, 0].numel() if self.config.kind.grid else x.shape[1]
        return self._of_steps(ctx.round).replace(
            batch=(x.shape[0], tokens),
            mask=some,
            slot=ctx.slot,
            layer=ctx.layer,
            name=ctx.name,
            pool_layers=ctx.pool_layers,
            noise=ctx.noise,
            step_index=ctx.step_index,
            label=ctx.label,
            task=ctx.task,
            sample_ids=ctx.sample_ids,
        )

    def _of_steps(self, round: int) -> Routing:
        """The routing of the steps in progress but for its place. Kept: the samples of a batch
        stand at the same steps in run after run."""
        steps = current()
        key = (round, steps.of_rows)
        made = self._kept.get(key)
        if made is None:
            with torch.inference_mode(False):  # what is kept may meet gradients later
                ids, gates, probs, logits = (
                    self._recorded(f"{name}{round}", steps) for name in _FIELDS
                )
            widest = max([1, *(self._widths[round][step] for step, _ in steps.groups)])
            made = Routing(
                unit="sample",
                num_experts=self.num_experts,
                ids=ids[:, :widest],
                gates=gates[:, :widest],
                probs=probs,
                logits=logits,
                batch=(len(steps.of_rows), 0),
                round=round,
                table=self._buffers[f"table{round}"],
            )
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[key] = made
        return made

    def _recorded(self, name: str, steps: Steps) -> Tensor:
        """Rows of a recorded table [S, ...], one per sample; a view where they are all the same."""
        table = cast(Tensor, self._buffers[name])
        if len(steps.groups) == 1:
            step = steps.of_rows[0]
            return table[step : step + 1].expand(len(steps.of_rows), -1)
        return table[list(steps.of_rows)]

    def combine(self, x: Tensor, routing: Routing) -> Tensor:
        """The fused experts' answer plus that of what is always on; x [B, N, D] or [B, C, H, W]."""
        u = x if self.stem is None else self.stem(x)
        groups = current().groups
        if len(groups) <= 1:  # none: an empty batch
            y = self._answer(u, routing.round, groups[0][0] if groups else 0)
        else:
            rows = [torch.tensor(rows, device=x.device) for _, rows in groups]
            parts = [
                self._answer(u.index_select(0, own), routing.round, step)
                for own, (step, _) in zip(rows, groups)
            ]
            y = torch.cat(parts).index_select(0, torch.cat(rows).argsort())
        if self.adaptor is not None:
            y = self.adaptor(y)
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        return y if self.shared is None else y + self.shared(x)

    def _answer(self, u: Tensor, round: int, step: int) -> Tensor:
        places = self._places[round][step]
        kind = self.config.kind
        if places is None:
            return u.new_zeros(kind.output_shape(u.shape))
        made = self._experts.get((round, step))
        if made is None:
            tensors = {name: cast(Tensor, self._buffers[place]) for name, place in places.items()}
            made = self._experts[round, step] = OneExpert(tensors, tensors)
        return run_one(kind, u, made)

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedLayer:
        super()._apply(fn, recurse)
        self._kept.clear()
        self._experts.clear()
        return self

    def extra_repr(self) -> str:
        return f"{self.config.kind.kind}, steps={len(self._places[0])}, tensors={self.num_tensors}"


def _always(
    layer: ExpertLayer,
) -> tuple[list[tuple[float, dict[str, Tensor]]], nn.Module | None]:
    """What is always on, as (gate, weights) to be fused with the chosen; else the module itself."""
    shared = layer.shared
    if shared is None:
        return [], None
    if layer.stem is not None or layer.adaptor is not None:
        return [], shared  # it reads and adds beside both
    if isinstance(shared, SharedExperts):
        if shared.gate is not None:
            return [], shared  # its gate reads the input
        return [(shared.scale, {n: s[0] for n, s in shared.pool.adapted().stacks().items()})], None
    weights = layer.pool.kind.weights_of(shared)
    return ([], shared) if weights is None else ([(1.0, weights)], None)
