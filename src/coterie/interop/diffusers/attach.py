"""Experts inside any model of diffusers, found by name; it and its pipelines stay as they are.

    host = attach(pipeline.unet, [SlotConfig(slot="conv", names=("mid_block.*conv1",), expert=...)])
    with host.recording() as routings:
        pipeline("a cat")                  # or a training step of one's own
    loss = loss + sum(aux.weight * aux.value for aux in host.aux_losses(routings))
    host.after_step(routings)
    host.detach()                          # the model without experts again

The model computes what it did before until the experts are trained. Slots: ``conv`` in the place of
a convolution, ``ffn`` in the place of a feed-forward network of a transformer block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coterie.backbones import scope
from coterie.backbones.base import BackboneOutput
from coterie.backbones.conditioning import embed_condition
from coterie.backbones.hosting import NetworkHost
from coterie.backbones.slots import SlotConfig
from coterie.core.context import NULL_LABEL, Context
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.interop.diffusers.conventions import ask
from coterie.interop.diffusers.facts import embed_time, read_call, time_width


class Opener:
    """Hooks of a model that open a scope where none of its own is: calls from outside this library,
    also inside the call of another network with slots."""

    def __init__(self, num_steps: int, null_label: int | None) -> None:
        self.num_steps, self.null_label = num_steps, null_label

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        around = scope.current()
        if around is None or around.network is not model:
            ctx = read_call(model, args, kwargs, self.num_steps, self.null_label)
            scope.enter(ctx, model).opener = self

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        call = scope.current()
        if call is not None and call.opener is self:
            scope.leave(call)


class DiffusersHost(NetworkHost):
    """A model of diffusers with experts. It is a backbone too: ``host(x, ctx, cond)``."""

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[SlotConfig] = (),
        *,
        num_steps: int = 1000,
        null_label: int | None = None,
    ) -> None:
        width = time_width(model)
        for place, slot in enumerate(slots):
            score = slot.expert.router.score.kind
            if width is None and score == "noise_level":
                hint = f"{type(model).__name__} has no time embedding that is known"
                where = f"slots.{place}.expert.router.score"
                raise ConfigError(describe(where, score, "another score", hint))
        super().__init__(model, slots, width)
        self.num_steps, self.null_label = num_steps, null_label
        opener = Opener(num_steps, null_label)
        self._hooks = [
            model.register_forward_pre_hook(opener.before, with_kwargs=True),
            model.register_forward_hook(opener.after, always_call=True),
        ]

    @contextmanager
    def recording(self) -> Iterator[list[Routing]]:
        """Inside the block every call of the model appends its routings to the list, whatever other
        recordings are open; those of other models do not."""
        with scope.recording(self.owner) as routings:
            yield routings

    def detach(self) -> nn.Module:
        """The model with its own modules in their places, and without hooks."""
        for hook in self._hooks:
            hook.remove()
        return super().detach()

    def forward(self, x: Tensor, ctx: Context, cond: Condition) -> BackboneOutput:
        """x [B, C, H, W]; ConfigError for a network of a class whose conventions are not known."""
        ctx = embed_condition(ctx, cond, embed_time(self.network, self.num_steps), None, 0)
        assert ctx.time_input is not None
        if cond.label is not None and self.null_label is not None:
            label = torch.where(cond.label == NULL_LABEL, self.null_label, cond.label)
            cond = cond.replace(label=label)
        with scope.scope(ctx, self.network) as call:
            sample = ask(self.network, x, ctx.time_input, self.num_steps, cond)
        variance = None
        if sample.shape[1] == 2 * x.shape[1]:  # learned variances come as further channels
            sample, variance = sample.chunk(2, dim=1)
        return BackboneOutput(sample, tuple(call.routings), variance)


def attach(
    model: nn.Module,
    slots: Sequence[SlotConfig],
    *,
    num_steps: int = 1000,
    null_label: int | None = None,
) -> DiffusersHost:
    """Put experts into ``model``, in place. ``num_steps``: length of the grid that its timesteps
    count; ``null_label``: its class number for no condition. ConfigError where a name fits nothing.
    """
    return DiffusersHost(model, slots, num_steps=num_steps, null_label=null_label)
