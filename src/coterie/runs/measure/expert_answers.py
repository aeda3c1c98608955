"""Statistics of each expert's outputs on the rows that choose it, collected while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coterie.core.routing import Routing
from coterie.experts import ExpertLayer
from coterie.experts.dispatch.expert_weights import OneExpert, experts_of
from coterie.experts.kinds.base import ExpertKind
from coterie.inspect import AnswerSums


class _Watched(OneExpert):
    """Weights that note what the last map of an expert reads: its inner activations."""

    def __init__(self, expert: OneExpert, kind: ExpertKind) -> None:
        super().__init__(expert.parameters, expert.buffers)
        self.ends = kind.ends
        self.inner: Tensor | None = None

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        if weight in self.ends:
            self.inner = x
        return super().linear(x, weight, bias)


def _look(sums: AnswerSums, layer: ExpertLayer, h: Tensor, routing: Routing) -> None:
    experts, slots = experts_of(layer.pool), layer.config.slot_map
    read = h.flatten(0, 1) if routing.unit == "token" else h

    def ask(candidate: int, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        x = read.index_select(0, rows)
        x = x if layer.stem is None else layer.stem(x)  # what the experts read
        expert = experts[candidate if slots is None else slots[candidate]]
        watched = _Watched(expert, layer.pool.kind)
        answer = layer.pool.kind.forward(x, watched)
        return answer, None if watched.inner is x else watched.inner

    sums.look(routing, ask)


@contextmanager
def watched_answers(model: nn.Module) -> Iterator[AnswerSums]:
    """Inside the block the outputs of every expert layer are collected, in its first round only."""
    sums = AnswerSums()

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(layer, ExpertLayer)
        h, mask = inputs[0], inputs[1].token_mask
        # Padding may hold anything; rows of it are chosen by nobody, but samples hold it too.
        h = h if mask is None else h.masked_fill(~mask[:, :, None], 0.0)
        _look(sums, layer, h, output.routings[0])

    layers = [module for module in model.modules() if isinstance(module, ExpertLayer)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
