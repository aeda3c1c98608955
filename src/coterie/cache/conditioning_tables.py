"""Tables of time and label embeddings and of adaLN parameters, one row per step of a sampling grid.

These depend neither on x nor on the batch. The table of a label is computed at its first use.

Shapes: B samples, S steps of the grid, T values for one noise level and label.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from coterie.backbones.adaptive import AdaptiveLinear, adaptive
from coterie.backbones.conditioning import EMBEDDING, TIME_EMBEDDING, Embeds
from coterie.cache.schedule import Schedule, Steps
from coterie.core.context import NULL_LABEL, Context
from coterie.core.prediction import Condition
from coterie.denoiser import Denoiser, context_at

MOST_BYTES = 256 * 2**20
"""Of all tables together; labels that were not used for longest are let go."""

_MOST_CONTEXTS = 64 * 2**20  # bytes
_LEVEL = ("noise", "step_index", "time_input")  # fields of a Context that follow from the time


def has_known(denoiser: nn.Module) -> bool:
    """Whether tables can be made: a denoiser whose backbone embeds the noise level apart from x."""
    return isinstance(denoiser, Denoiser) and isinstance(denoiser.backbone, Embeds)


class KnownTables:
    """Contexts of a grid with precomputed ``known`` (:class:`coterie.core.context.Context`).

    Names the :class:`AdaptiveLinear` maps of ``denoiser``, which must not be shared with others.
    """

    def __init__(
        self, denoiser: Denoiser, schedule: Schedule, most_bytes: int = MOST_BYTES
    ) -> None:
        self.denoiser, self.backbone = denoiser, cast(Embeds, denoiser.backbone)
        self.most_bytes = most_bytes
        self.maps: dict[str, AdaptiveLinear] = {}
        for name, module in denoiser.backbone.named_modules():
            if isinstance(module, AdaptiveLinear):
                module.known_as = name
                self.maps[name] = module
        self.schedule = schedule
        self.layout: list[tuple[str, int, int]] = []  # name, first piece, number of pieces
        self.sizes: list[int] = []  # of the pieces of a row
        self.clear()

    def clear(self) -> None:
        """Drop all tables, for a model that moves to another device or dtype."""
        self.tables: OrderedDict[int, Tensor] = OrderedDict()  # label -> [S, T]
        self.most: int | None = None  # labels at once, once the size of a table is known
        # Batch after batch stands at the same steps with the same labels.
        self._contexts: dict[tuple[tuple[int, ...], tuple[int, ...]], Context] = {}
        self._held = 0  # bytes in them
        inputs = self.denoiser.get_buffer("time_inputs")
        double = next(self.denoiser.parameters()).dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        times = self.schedule.times.to(device=inputs.device, dtype=dtype)
        self.base = context_at(self.denoiser.process, times, inputs)  # the schedule as a batch

    def context(self, steps: Steps, label: Tensor | None) -> Context | None:
        """The Context of samples at ``steps`` with labels i64 [B]; None for more labels
        than fit."""
        batch = len(steps.of_rows)
        if self.backbone.embeds_label and label is not None and label.shape == (batch,):
            labels = label.tolist()
        else:
            labels = [NULL_LABEL] * batch
        key = (steps.of_rows, tuple(labels))
        made = self._contexts.get(key)
        if made is None:
            rows = self._rows(steps.of_rows, labels)
            if rows is None:
                return None
            made = self._context(steps, rows)
            if self._held + rows.numel() * rows.element_size() > _MOST_CONTEXTS:
                self._contexts.clear()
                self._held = 0
            self._contexts[key] = made
            self._held += rows.numel() * rows.element_size()
        return made

    def _context(self, steps: Steps, rows: Tensor) -> Context:
        pieces = rows.split(self.sizes, dim=-1)
        known: dict[str, Any] = {
            name: pieces[first : first + count] for name, first, count in self.layout
        }
        for name in (TIME_EMBEDDING, EMBEDDING):
            known[name] = known[name][0][:, 0]
        where = torch.tensor(steps.of_rows, device=rows.device)
        level = {name: getattr(self.base, name)[where] for name in _LEVEL}
        return self.base.replace(batch=len(steps.of_rows), known=known, **level)

    def _rows(self, steps: Sequence[int], labels: Sequence[int]) -> Tensor | None:
        """[B, 1, T]."""
        wanted = set(labels)
        if not wanted or (self.most is not None and len(wanted) > self.most):
            return None
        for label in wanted:
            if label in self.tables:
                self.tables.move_to_end(label)
                continue
            table = self.tables[label] = self._table(label)
            if self.most is None:
                self.most = max(1, self.most_bytes // (table.numel() * table.element_size()))
        rows = [self.tables[label][step] for step, label in zip(steps, labels)]
        while len(self.tables) > self._capacity(len(wanted)):
            self.tables.popitem(last=False)
        return torch.stack(rows)[:, None]

    def _capacity(self, wanted: int) -> int:
        """Never fewer than one call has just made."""
        return max(self.most or 1, wanted)

    @torch.no_grad()
    def _table(self, label: int) -> Tensor:
        """[S, T]; always in one batch, so a row depends on nothing but its label and step."""
        device = self.denoiser.get_buffer("time_inputs").device
        labels = torch.full((len(self.schedule),), label, device=device)
        ctx = self.backbone.embed(self.base, Condition(label=labels))
        assert ctx.time_embedding is not None and ctx.embedding is not None
        made: dict[str, Sequence[Tensor]] = {
            TIME_EMBEDDING: [ctx.time_embedding[:, None]],
            EMBEDDING: [ctx.embedding[:, None]],
            **{name: adaptive(linear, ctx, linear.parts) for name, linear in self.maps.items()},
        }
        self.layout, self.sizes = [], []
        for name, parts in made.items():
            self.layout.append((name, len(self.sizes), len(parts)))
            self.sizes += [part.shape[-1] for part in parts]
        return torch.cat([part[:, 0] for parts in made.values() for part in parts], dim=-1)

    def numbers(self) -> int:
        """Number of values in all tables."""
        return sum(table.numel() for table in self.tables.values())
