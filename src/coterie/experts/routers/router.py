"""The router module of every configuration. Legend: R rows, E experts, K choices, B, N, D."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from coterie.core.context import NULL_LABEL, Context
from coterie.core.routing import Routing
from coterie.core.tensors import stands_still
from coterie.experts.routers.base import EditPart, Scored, mean_tokens

if TYPE_CHECKING:
    from coterie.experts.routers.config import RouterConfig


class Router(nn.Module):
    """A router: ``router(h [B, N, D], ctx) -> Routing``. Float32 throughout, also under autocast.

    With a partition, ``Routing.num_experts`` includes the reserved expert, whose columns hold
    probability 0 and logit -inf; ``Routing.num_reserved`` is their number.
    """

    selection_bias: Tensor | None
    expert_scale: Tensor | None

    def __init__(
        self, config: RouterConfig, width: int, num_experts: int, time_width: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.score = config.score_part.build(width, num_experts, time_width)
        self.edits = nn.ModuleList(cast(EditPart, e).build(num_experts) for e in config.edits)
        bias = torch.zeros(num_experts) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)
        scale = nn.Parameter(torch.ones(num_experts)) if config.expert_scale else None
        self.register_parameter("expert_scale", scale)
        self.reset_parameters()

    def reset_parameters(self, rng: Generator | None = None) -> None:
        """Initialise the score; edits and the selection bias become 0, the experts' scales 1."""
        if any(parameter.device.type == "meta" for parameter in self.parameters()):
            return
        self.score.reset_parameters(rng)
        with torch.no_grad():
            for parameter in self.edits.parameters():
                parameter.zero_()
            if self.selection_bias is not None:
                self.selection_bias.zero_()
            if self.expert_scale is not None:
                self.expert_scale.fill_(1.0)

    def after_step(self) -> None:
        """Update buffers that change per optimiser step, unless the router is frozen."""
        for part in (self.score, *self.edits):
            move = getattr(part, "after_step", None)
            if move is not None and not stands_still(part, self):
                move()

    def forward(self, h: Tensor, ctx: Context) -> Routing:
        with torch.autocast(device_type=h.device.type, enabled=False):
            return self._route(h, ctx)

    def _route(self, h: Tensor, ctx: Context) -> Routing:
        # A router in eval mode inside a model that trains is frozen, and explores no more.
        ctx = self._drawing(ctx.replace(training=ctx.training and self.training))
        shape = (h.shape[0], h.shape[1])
        x, real = self._rows(h, ctx)
        null = null_rows(ctx, x) if self.config.num_reserved else None
        scored_rows = real if null is None else (~null if real is None else real & ~null)
        scored = self.score(x, ctx)
        logits = self._edit(scored.logits, ctx, masks="logits")
        probs = self._probabilities(logits)
        if self.config.probability == "softmax_tokens":
            probs = softmax_tokens(logits, shape, scored_rows)
        if any(cast(EditPart, part).masks == "probs" for part in self.config.edits):
            # The other probabilities stay as they are: nothing is normalised again.
            logits = self._edit(logits, ctx, masks="probs")
            probs = probs.masked_fill(logits == float("-inf"), 0.0)
        keys = self.keys(logits, probs)
        ids = self.config.select_part.select(keys, ctx, shape, scored_rows)
        gates = self.gates(ids, probs, logits)
        if scored_rows is not None:
            ids = ids.masked_fill(~scored_rows[:, None], self.num_experts)
        gates = gates.masked_fill(ids == self.num_experts, 0.0)
        if self.config.num_reserved:
            assert null is not None
            taken = null if real is None else null & real
            ids, gates = send_to_reserved(ids, gates, taken, self.num_experts)
            logits = F.pad(logits, (0, 1), value=float("-inf"))
            probs = F.pad(probs, (0, 1))
        return self._record(ctx, shape, x, scored, ids, gates, probs, logits, scored_rows)

    def _drawing(self, ctx: Context) -> Context:
        """With a generator of this place in this pass, where any part draws."""
        own = ctx.drawing() if self.config.draws else None
        if own is None:
            return ctx
        seed = ctx.pass_seed
        return ctx.replace(rng=own, seed=lambda: seed)

    def _rows(self, h: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """What is scored, f32 [R, D], and which rows are real (None = all)."""
        mask = ctx.token_mask
        if mask is not None:
            # Padding may hold anything, also NaN, which would reach the weights' gradient.
            h = h.masked_fill(~mask[:, :, None], 0.0)
        if self.config.routed_unit == "token":
            return h.float().flatten(0, 1), None if mask is None else mask.flatten()
        if not self.config.score_part.reads_rows:
            return h.new_zeros(h.shape[0], 0, dtype=torch.float32), _any(mask)
        return mean_tokens(h, mask), _any(mask)

    def _edit(
        self, logits: Tensor, ctx: Context, masks: Literal["logits", "probs"], table: bool = False
    ) -> Tensor:
        """Edits that act before (``logits``) or after (``probs``) the probabilities are made."""
        for config, edit in zip(self.config.edits, self.edits):
            part = cast(EditPart, config)
            if part.masks == masks and (part.for_table or not table):
                logits = edit(logits, ctx)
        return logits

    def _probabilities(self, logits: Tensor) -> Tensor:
        if self.config.probability == "softmax":
            return logits.softmax(dim=-1)
        if self.config.probability == "sigmoid":
            return logits.sigmoid()
        return logits

    def keys(self, logits: Tensor, probs: Tensor) -> Tensor:
        """f32 [R, E]: the values that experts are selected by; excluded experts keep -inf."""
        keys = (logits if self.config.when == "after" else probs).detach()
        if self.selection_bias is not None:
            keys = keys + self.selection_bias
        return keys.masked_fill(logits.detach() == float("-inf"), float("-inf"))

    def gates(self, ids: Tensor, probs: Tensor, logits: Tensor) -> Tensor:
        """f32 [R, K]: the gates of the choices ``ids``; those of unused choices have no meaning."""
        gates = self._weights(ids, probs, logits) * self.config.scale
        if self.expert_scale is None:
            return gates
        return gates * F.pad(self.expert_scale.float(), (0, 1))[ids]

    def _weights(self, ids: Tensor, probs: Tensor, logits: Tensor) -> Tensor:
        if self.config.weight == "one":
            return torch.ones(ids.shape, device=ids.device)
        if self.config.when == "after":
            # A row of nobody would be a softmax over nothing; its gates are dropped below.
            chosen = F.pad(logits, (0, 1), value=-1e30).gather(1, ids)
            gates = chosen.softmax(dim=1)
        else:
            gates = F.pad(probs, (0, 1)).gather(1, ids)
        if self.config.weight == "renorm":
            gates = gates / (gates.sum(dim=1, keepdim=True) + self.config.renorm_eps)
        if self.config.weight == "straight_through":
            gates = 1.0 + (gates - gates.detach())
        return gates

    def _record(
        self,
        ctx: Context,
        shape: tuple[int, int],
        x: Tensor,
        scored: Scored,
        ids: Tensor,
        gates: Tensor,
        probs: Tensor,
        logits: Tensor,
        mask: Tensor | None,
    ) -> Routing:
        table = scored.table
        if table is not None:
            table = self._probabilities(self._edit(table, ctx, "logits", table=True))
        return Routing(
            unit=self.config.routed_unit,
            num_experts=self.num_experts + self.config.num_reserved,
            ids=ids,
            gates=gates,
            probs=probs,
            logits=logits,
            batch=shape,
            mask=mask,
            slot=ctx.slot,
            layer=ctx.layer,
            name=ctx.name,
            round=ctx.round,
            pool_layers=ctx.pool_layers,
            owner=ctx.owner,
            noise=ctx.noise,
            step_index=ctx.step_index,
            label=ctx.label,
            task=ctx.task,
            sample_ids=ctx.sample_ids,
            inputs=x if self.config.score_part.reads_rows else None,
            prototypes=scored.prototypes,
            table=table,
            state=scored.state,
            num_reserved=self.config.num_reserved,
        )


def _any(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.any(dim=1)


def softmax_tokens(logits: Tensor, shape: tuple[int, int], real: Tensor | None) -> Tensor:
    """f32 [R, E]: for each expert, softmax over the ``real`` tokens of a sample; 0 elsewhere."""
    logits_BNE = logits.unflatten(0, shape)
    closed_BNE = logits_BNE == float("-inf")
    if real is not None:
        closed_BNE = closed_BNE | ~real.view(*shape, 1)
    # A sample without a token would be a softmax over nothing.
    empty_B1E = closed_BNE.all(dim=1, keepdim=True)
    open_BNE = logits_BNE.masked_fill(closed_BNE, float("-inf")).masked_fill(empty_B1E, 0.0)
    return open_BNE.softmax(dim=1).masked_fill(closed_BNE, 0.0).flatten(0, 1)


def null_rows(ctx: Context, x: Tensor) -> Tensor:
    """bool [R]: rows of x [R, D] that belong to unconditional samples."""
    if ctx.label is None:
        return torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    null = ctx.label == NULL_LABEL
    return null.repeat_interleave(x.shape[0] // max(1, null.shape[0]))


def send_to_reserved(
    ids: Tensor, gates: Tensor, taken: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Assign the rows ``taken`` to the reserved expert, with gate 1, and adjust the id of unused
    choices."""
    ids = torch.where(ids == num_experts, num_experts + 1, ids)
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = taken
    return ids.masked_fill(first, num_experts), gates.masked_fill(first, 1.0)
