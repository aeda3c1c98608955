"""What the experts of a Hugging Face model answer, summed up while it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from coterie.core.routing import Routing
from coterie.inspect import AnswerSums
from coterie.interop.transformers.sites import MoESite


@contextmanager
def watched_answers(sites: Sequence[MoESite]) -> Iterator[AnswerSums]:
    """Inside the block some rows of every expert of ``sites`` are worked out a second time, alone:
    the layer's own sum does not tell one answer from another."""
    sums = AnswerSums()
    with ExitStack() as stack:
        for site in sites:
            watch = _Watch(site, sums)
            stack.callback(site.experts.register_forward_hook(watch.look).remove)
            stack.enter_context(site.tap(watch.note))
        yield sums


class _Watch:
    """One layer: its routing comes before its experts answer."""

    def __init__(self, site: MoESite, sums: AnswerSums) -> None:
        self.site, self.sums = site, sums
        self.routing: Routing | None = None

    def note(self, routing: Routing) -> None:
        self.routing = routing

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        routing, self.routing = self.routing, None
        if routing is None:  # called on its own, not by its block
            return
        h: Tensor = args[0]

        def ask(expert: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            gate, up, down = self.site.expert(expert)
            x = h.index_select(0, rows)
            inner = self.site.experts.act_fn(x @ gate.T) * (x @ up.T)
            return inner @ down.T, inner

        self.sums.look(routing, ask)
