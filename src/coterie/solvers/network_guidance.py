"""A denoiser with a guidance network, as one model that can be sampled and reported like a run.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import SerializeAsAny
from torch import Generator, Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, Prediction
from coterie.core.registry import Part
from coterie.core.routing import Aux, Routing
from coterie.denoiser import MODELS
from coterie.process import Process
from coterie.process.transport import transport
from coterie.solvers.guidance import ClassifierGuided


@MODELS.register
class GuidedConfig(Part):
    """A trained denoiser guided by the gradient of a trained guidance network.

    A guide of classes reads ``cond.label``; a guide of maps or pixels reads ``cond.channels``.
    Neither network is trained further.
    """

    kind: Literal["guided"] = "guided"
    denoiser: Annotated[SerializeAsAny[Part], MODELS.validator]  # the denoiser
    guide: Annotated[SerializeAsAny[Part], MODELS.validator]  # the guidance network
    scale: float = 1.0  # factor of the gradient
    is_trained: ClassVar[bool] = True

    @property
    def backbone(self) -> Any:
        """The denoiser's backbone, with the number of classes of the guide."""
        own = self.denoiser.backbone
        classes = int(getattr(getattr(self.guide, "model", self.guide), "classes", 0))
        return own.replace(num_classes=classes) if classes else own

    def build(self) -> GuidedDenoiser:
        return GuidedDenoiser(
            self.denoiser.build(), self.guide.build(), self.scale, self, reads_label(self.denoiser)
        )


def reads_label(denoiser: Part) -> bool:
    """Whether a model is itself conditioned on the class."""
    return bool(getattr(getattr(denoiser, "backbone", None), "num_classes", 0))


class GuidedDenoiser(nn.Module):
    """``forward(x [B, ...], t f32 [B], cond) -> Prediction`` in the view of ``denoiser``.

    ``guide`` has ``log_prob(x, t, cond) -> [B]``, a process, and ``routings(t, cond, ids)``. If its
    process is another one, it is called at the same signal-to-noise ratio. ``target`` [1, ...]:
    what to guide to where the condition has no ``channels``. Without label and channels there is no
    guidance. ConfigError if the two are for different data.
    """

    def __init__(
        self,
        denoiser: Any,
        guide: Any,
        scale: float = 1.0,
        config: GuidedConfig | None = None,
        tells_label: bool = False,
        target: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not callable(getattr(guide, "log_prob", None)):
            allowed = "a guide: a model with log_prob"
            raise ConfigError(describe("guide", type(guide).__name__, allowed))
        shape = getattr(guide, "sample_shape", None)
        backbone = getattr(getattr(denoiser, "config", None), "backbone", None)
        wanted = getattr(backbone, "sample_shape", None)
        if shape is not None and wanted is not None and tuple(shape) != tuple(wanted):
            hint = f"the denoiser's samples are {tuple(wanted)}"
            raise ConfigError(describe("guide.sample_shape", tuple(shape), str(wanted), hint))
        self.config, self.tells_label = config, tells_label
        self.denoiser, self.guide = denoiser, guide
        self.process: Process = denoiser.process
        self.register_buffer("target", target, persistent=False)
        self._step = ClassifierGuided(_Plain(self), self._log_prob, scale)

    @property
    def scale(self) -> float:
        return self._step.weight

    @property
    def view(self) -> str:
        own = getattr(self.denoiser, "view", None)
        return str(own or self.denoiser.config.view)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        target = self.get_buffer("target") if self.target is not None else None
        if target is not None and cond.channels is None:
            cond = cond.replace(channels=target.expand(len(x), *target.shape[1:]).to(x))
        asked_for = cond.label is not None or cond.channels is not None
        made = self._step(x, t, cond) if asked_for else self._step.denoiser(x, t, cond)
        if self.scale == 0.0 or not hasattr(self.guide, "routings"):
            return made
        inner = transport(self.process, self.guide.process, x, t)[1]
        asked: tuple[Routing, ...] = self.guide.routings(inner, cond, sample_ids)
        return made.replace(routings=(*made.routings, *asked))

    def aux_losses(
        self, routings: Sequence[Routing], rng: Generator | None = None
    ) -> tuple[Aux, ...]:
        return ()

    def _log_prob(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if self.guide.process != self.process:
            x, t = transport(self.process, self.guide.process, x, t)
        found: Tensor = self.guide.log_prob(x, t, cond)
        return found


class _Plain:
    """The denoiser of a guided one, which is not told what the guide is for."""

    def __init__(self, owner: GuidedDenoiser) -> None:
        self.owner, self.process = owner, owner.process

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        label = cond.label if self.owner.tells_label else None
        made: Prediction = self.owner.denoiser(x, t, cond.replace(channels=None, label=label))
        return made
