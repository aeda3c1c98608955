"""The denoisers of an ensemble, by name: in memory, or read when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import DenoiserLike
from coterie.process import Process


@dataclass(frozen=True)
class MemberFacts:
    """What is known of a member before it is read."""

    name: str
    process: Process | None  # None: the member is missing, for ``reason``
    view: str | None = None  # None: unknown
    traits: Mapping[str, Any] = field(default_factory=dict)
    """what all members must agree on, such as the shape of a sample"""
    reason: str = ""

    @property
    def missing(self) -> bool:
        return self.process is None


def facts_of(name: str, denoiser: Any, traits: Mapping[str, Any] | None = None) -> MemberFacts:
    """Facts of a denoiser in memory."""
    config = getattr(denoiser, "config", None)
    view = getattr(denoiser, "view", None) or getattr(config, "view", None)
    found = {**traits_of(config), **(traits or {})}
    return MemberFacts(name, denoiser.process, None if view == "auto" else view, found)


def traits_of(config: Any) -> dict[str, Any]:
    """Shape of a sample and number of classes that a model's configuration names."""
    backbone = getattr(config, "backbone", None)
    shape = getattr(backbone, "sample_shape", None)
    classes = getattr(backbone, "num_classes", None)
    named = {"sample_shape": None if shape is None else tuple(shape), "num_classes": classes}
    return {key: value for key, value in named.items() if value is not None}


class Members:
    """Denoisers in memory, in order; None: missing."""

    def __init__(
        self,
        denoisers: Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        reasons: Mapping[str, str] | None = None,
        traits: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not isinstance(denoisers, Mapping):
            denoisers = {f"expert {index}": one for index, one in enumerate(denoisers)}
        self._denoisers = tuple(denoisers.values())
        why, known = reasons or {}, traits or {}
        self.facts: tuple[MemberFacts, ...] = tuple(
            MemberFacts(name, None, reason=why.get(name, "not given"))
            if one is None
            else facts_of(name, one, known.get(name))
            for name, one in denoisers.items()
        )

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(facts.name for facts in self.facts)

    @property
    def modules(self) -> list[nn.Module]:
        """Networks that stay in memory as long as the ensemble does."""
        return [one for one in self._denoisers if isinstance(one, nn.Module)]

    def get(self, index: int) -> DenoiserLike:
        """The denoiser; it stays valid until another one is requested."""
        found = self._denoisers[index]
        if found is None:
            facts = self.facts[index]
            hint = f"it is missing: {facts.reason}"
            raise ConfigError(describe("member", facts.name, "a member that is there", hint))
        return found

    def expect(self, index: int) -> None:
        """A hint that ``index`` will be needed soon; no effect for members in memory."""


def check_alike(members: Members) -> None:
    """ConfigError, naming the first difference, unless all members are for the same data."""
    present = [facts for facts in members.facts if not facts.missing]
    if not present:
        reasons = "; ".join(f"{facts.name}: {facts.reason}" for facts in members.facts)
        allowed = "at least one member that is there"
        raise ConfigError(describe("members", list(members.names), allowed, reasons))
    if len(set(members.names)) < len(members):
        raise ConfigError(describe("members", list(members.names), "names that all differ"))
    first: dict[str, tuple[str, Any]] = {}
    for facts in present:
        for trait, value in facts.traits.items():
            owner, known = first.setdefault(trait, (facts.name, value))
            if known != value:
                hint = f"members of one ensemble denoise the same data; {owner!r} has {known!r}"
                raise ConfigError(
                    describe(f"members.{facts.name}.{trait}", value, repr(known), hint)
                )
