"""An ensemble as one model: configurations of its members and of how they are combined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from coterie.core.config import Config
from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.prediction import Condition
from coterie.core.registry import Part
from coterie.core.tensors import borrow
from coterie.denoiser import MODELS
from coterie.ensembles.base import ENSEMBLES, Ensemble
from coterie.ensembles.members import MemberFacts, Members, traits_of


def _model(value: Any) -> Part | None:
    return None if value is None else MODELS.parse(value)


Model = Annotated[SerializeAsAny[Part], BeforeValidator(_model)]


class MemberConfig(Config):
    """One member of an ensemble."""

    name: str = Field(min_length=1)  # of the member
    model: Model | None = None  # its configuration; null: missing
    reason: str = ""  # why it is missing
    space: str = ""  # name of the sample space, such as an autoencoder's latents

    @property
    def absent(self) -> str:
        """Why the member is missing; "" if it exists."""
        if self.model is None:
            return self.reason or "not given"
        return str(getattr(self.model, "absent", ""))

    @property
    def resolved(self) -> Part | None:
        """The configuration of its network, read from its folder if necessary."""
        return getattr(self.model, "model", self.model)

    @property
    def traits(self) -> dict[str, Any]:
        return {"space": self.space} if self.space else {}

    def facts(self) -> MemberFacts:
        """What is known before weights are read."""
        config = self.resolved if not self.absent else None
        if config is None:
            return MemberFacts(self.name, None, reason=self.absent)
        view = getattr(config, "view", None)
        traits = {**traits_of(config), **self.traits}
        return MemberFacts(self.name, config.process.build(), view, traits)


@MODELS.register
class EnsembleModelConfig(Part):
    """Several models that act as one. Missing members are left out with a warning."""

    kind: Literal["ensemble"] = "ensemble"
    ensemble: Annotated[SerializeAsAny[Part], ENSEMBLES.validator] = "mixture"  # type: ignore[assignment]
    """How the members are combined."""
    members: tuple[MemberConfig, ...] = ()  # the models
    router: Model | None = None  # model that weighs the members, if the ensemble needs one

    @model_validator(mode="after")
    def _named(self) -> EnsembleModelConfig:
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ConfigError(describe("members", names, "names that all differ"))
        return self

    @property
    def is_trained(self) -> bool:
        """Whether there is nothing to train: the ensemble has no weights of its own."""
        return bool(getattr(self.ensemble, "is_trained", True))

    @property
    def backbone(self) -> Any:
        """The backbone of the first existing member; all are for the same data."""
        for member in self.members:
            if not member.absent and member.model is not None:
                return member.model.backbone
        raise ConfigError(describe("members", [m.name for m in self.members], "one that is there"))

    def multiply_adds(self) -> int:
        """Multiply-adds of one sample's forward pass, through all members used and the
        combination."""
        from torch.utils.flop_counter import FlopCounterMode

        model = self.build()
        x = torch.zeros(1, *self.backbone.sample_shape)
        t = model.process.time_of_unit(torch.full((1,), 0.5))
        label = torch.zeros(1, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            model(x, t, Condition(label=label))
        return int(counted.get_total_flops() // 2)

    def build(self) -> Ensemble:
        reasons = {member.name: member.absent for member in self.members if member.absent}
        if self.members and len(reasons) == len(self.members):
            raise CheckpointError(f"no member is there: {'; '.join(reasons.values())}")
        denoisers = {
            member.name: None if member.model is None or member.absent else member.model.build()
            for member in self.members
        }
        if not self.is_trained:
            self._lend(denoisers)
        traits = {member.name: member.traits for member in self.members}
        return self.join(Members(denoisers, reasons, traits))

    def _lend(self, denoisers: Mapping[str, Any]) -> None:
        """What lies elsewhere is no part of a run that trains on top of it."""
        for member in self.members:
            denoiser = denoisers[member.name]
            if denoiser is not None and getattr(member.model, "is_trained", False):
                for part in denoiser.modules():
                    borrow(part)

    def join(self, members: Members) -> Ensemble:
        """The ensemble of built members, in eval mode."""
        router = None if self.router is None else self.router.build()
        made: Ensemble = self.ensemble.build(members, router).eval()
        return made


def model_of(ensemble: Ensemble) -> EnsembleModelConfig:
    """The configuration of an ensemble in memory; ConfigError if a part is not a registered
    model."""
    members = []
    for index, facts in enumerate(ensemble.members.facts):
        member = MemberConfig(name=facts.name, reason=facts.reason)
        if not facts.missing:
            model = _registered(f"members.{facts.name}", ensemble.members.get(index))
            member = member.replace(model=model, space=str(facts.traits.get("space", "")))
        members.append(member)
    router = getattr(ensemble, "router", None)
    return EnsembleModelConfig(
        ensemble=ensemble.config,
        members=tuple(members),
        router=None if router is None else _registered("router", router),
    )


def _registered(field: str, model: Any) -> Part:
    config = getattr(model, "config", None)
    if not isinstance(config, Part) or config.kind not in MODELS.kinds():
        hint = "a model directory holds what its configuration can build"
        allowed = f"a model of kind {', '.join(MODELS.kinds())}"
        raise ConfigError(describe(field, type(model).__name__, allowed, hint))
    return config
