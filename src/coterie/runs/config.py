"""The configuration of a run: everything that its result depends on.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``model/`` (the averaged
weights as a model directory), ``samples/`` and ``report/``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SerializeAsAny, model_validator

from coterie.backbones import TrunkConfig
from coterie.convert import UpcycleConfig, upcycled_slot
from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.data import SOURCES
from coterie.denoiser import MODELS, DenoiserConfig
from coterie.runs.origins.first_weights import InitConfig
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, ThresholdConfig
from coterie.train.config import TrainConfig
from coterie.train.objectives import OBJECTIVES, DenoisingConfig


class SampleConfig(Config):
    """How a run samples by default."""

    solver: Annotated[SerializeAsAny[Part], SOLVERS.validator] = "heun"  # type: ignore[assignment]
    """Integrates from noise to data."""
    grid: Annotated[SerializeAsAny[Part], GRIDS.validator] = "uniform"  # type: ignore[assignment]
    """Times at which the solver steps."""
    steps: int = Field(20, ge=1, le=100_000)  # solver steps
    guidance: GuidanceConfig = GuidanceConfig()  # weight of guidance and where it acts
    threshold: ThresholdConfig | None = None
    """clips the predicted x0 after guidance; for pixels only"""
    batch: int = Field(128, ge=1)  # samples drawn at a time
    temperature: float = Field(1.0, gt=0)  # divides the logits; text only


class RunConfig(Config):
    """Everything that a run depends on."""

    recipe: str = ""  # name of the recipe that it was made from
    preset: str = ""  # name of the recipe's preset
    seed: int = Field(0, ge=0, lt=2**63)  # of all random numbers of the run
    data: Annotated[SerializeAsAny[Part], SOURCES.validator] = "digits"  # type: ignore[assignment]
    """Where training samples come from."""
    model: Annotated[SerializeAsAny[Part], MODELS.validator] = DenoiserConfig()  # what is trained
    objective: Annotated[SerializeAsAny[Part], OBJECTIVES.validator] = DenoisingConfig()  # the loss
    train: TrainConfig = TrainConfig()  # steps, batch, optimiser, checkpoints
    sample: SampleConfig = SampleConfig()  # how samples are drawn
    init: InitConfig | None = None  # initial weights from another run or model; null: random

    @model_validator(mode="after")
    def _experts_are_there(self) -> RunConfig:
        wanted = self.init.upcycle if self.init is not None else None
        if wanted is not None and not _has_slot(self.model, wanted):
            hint = "coterie upcycle writes a run whose model has"
            allowed = "a model that has the experts which upcycling makes"
            raise ConfigError(describe("init.upcycle", wanted.mode, allowed, hint))
        return self

    @model_validator(mode="after")
    def _trains_or_is_trained(self) -> RunConfig:
        added = self.init is not None and self.init.trains_nothing
        trained, steps = getattr(self.model, "is_trained", added), self.train.steps
        if trained and steps:
            hint = "to train a model further, name it in init.path"
            allowed = f"0, for the model {self.model.kind}"
            raise ConfigError(describe("train.steps", steps, allowed, hint))
        if not trained and not steps:
            raise ConfigError(describe("train.steps", 0, "1 or more"))
        return self


def _has_slot(model: Part, config: UpcycleConfig) -> bool:
    """Whether a model has the experts of an upcycled one (its balance losses may be others)."""
    trunk = getattr(getattr(model, "backbone", None), "trunk", None)
    if not isinstance(trunk, TrunkConfig) or trunk.hidden % config.slices:
        return False
    made = upcycled_slot(trunk, config)
    plain = [slot.replace(expert=slot.expert.replace(balance=())) for slot in trunk.slots]
    return made.replace(expert=made.expert.replace(balance=())) in plain
