"""Adaptive Feature Aggregation: networks of one topology whose features are mixed after each layer.

Members run in lockstep (:mod:`coterie.backbones.taps`). At each point an aggregator computes
weights of their features, pixel by pixel, and every member continues with the weighted sum, which
skip connections carry too. Members are frozen; only aggregators are trained, by the ordinary loop,
with gradients through the members. The weights at a point are the gates of a Routing of unit
``token``.

Shapes: B batch, N members, C channels, H x W pixels, R = B H W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

import torch
from torch import Generator, Tensor, nn

from coterie.backbones.taps import (
    Point,
    Tap,
    Topology,
    as_layered,
    check_same_topology,
    lockstep,
)
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction, as_times
from coterie.core.registry import Part
from coterie.core.routing import ENSEMBLE, Routing
from coterie.ensembles.aggregator import AggregatorConfig, Gate, make_aggregator
from coterie.ensembles.base import ENSEMBLES, Ensemble, EnsembleConfig, as_members
from coterie.ensembles.members import Members


@ENSEMBLES.register
class AggregateConfig(EnsembleConfig):
    """Networks of one topology whose features are mixed after each layer."""

    kind: Literal["aggregate"] = "aggregate"
    gate: Gate = "spatial"
    """``spatial``: weights per pixel from features, noise level and condition. ``step``: weights
    from the noise level only. ``uniform``: the mean, without training."""
    aggregator: AggregatorConfig = AggregatorConfig()  # size of the spatial aggregators
    points: tuple[str, ...] = ("*",)
    """Patterns of the points where features are mixed (``members.points`` lists them). The last,
    the output, always is; () mixes outputs only."""
    own_tokens: bool = False
    """``cond.tokens`` [B, N M, C] holds the tokens of each member, one after another, as from
    separate text encoders."""

    @property
    def is_trained(self) -> bool:
        """Whether there are no parameters to train."""
        return self.gate == "uniform"

    def build(
        self,
        members: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        router: Any = None,
    ) -> Aggregate:
        """The ensemble. ConfigError names the first difference between members. ``router`` is not
        used."""
        if router is not None:
            raise ConfigError(describe("router", router, "none: aggregators are its own"))
        return Aggregate(self, as_members(members))


class Aggregate(Ensemble):
    """The ensemble of the module. ``aggregators`` has one module per point."""

    config: AggregateConfig

    def __init__(self, config: AggregateConfig, members: Members) -> None:
        topology = _common_topology(config, members)
        super().__init__(config, members)
        self.networks.requires_grad_(False)
        self.topology = topology
        self.fused = _fused(config.points, topology)
        count = len(members)
        self.aggregators = nn.ModuleList(
            make_aggregator(config.gate, config.aggregator, point, count, topology)
            for point in self.fused.values()
        )

    def train(self, mode: bool = True) -> Self:
        """Set the aggregators' mode; members stay in eval mode."""
        super().train(mode)
        self.networks.eval()
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        t = as_times(t, x)
        made: list[Routing] = []
        facts = _Facts(t, self.process.step_index(t), cond, sample_ids)
        runs = []
        for index in range(len(self.members)):
            member: Any = self.members.get(index)
            told = self._told(index, cond)
            runs.append(member.layers(x, t, told, sample_ids=sample_ids))
        answers = lockstep(runs, lambda taps: self._join(taps, facts, made))
        inner = [
            routing.replace(slot=f"{name}/{routing.slot}")
            for name, answer in zip(self.members.names, answers, strict=True)
            for routing in answer.routings
        ]
        return answers[0].replace(routings=(*made, *inner))

    def paired(self, x: Tensor, t: Tensor, cond: Condition, null: Condition) -> Prediction:
        """Predictions with and without condition, each with its own weights."""
        both = Condition.cat(cond, null)
        return self(torch.cat([x, x]), torch.cat([t, t]), both)

    def _told(self, index: int, cond: Condition) -> Condition:
        """The condition as one member reads it."""
        if not self.config.own_tokens or cond.tokens is None:
            return cond
        count = len(self.members)
        if cond.tokens.shape[1] % count:
            allowed = f"as many for each of {count} members"
            raise DataError(describe("cond.tokens", tuple(cond.tokens.shape), allowed))
        mask = None if cond.tokens_mask is None else cond.tokens_mask.chunk(count, 1)[index]
        return cond.replace(tokens=cond.tokens.chunk(count, 1)[index], tokens_mask=mask)

    def _join(self, taps: Sequence[Tap], facts: _Facts, made: list[Routing]) -> Sequence[Tensor]:
        """What members go on with: the fused feature, or their own where nothing is fused."""
        point = self.fused.get(taps[0].name)
        if point is None:
            return [tap.feature for tap in taps]
        layer = list(self.fused).index(point.name)
        features = torch.stack([_as_map(tap.feature, point) for tap in taps], dim=1)
        logits = self.aggregators[layer](
            features, _mean([tap.ctx.time_embedding for tap in taps]), *self._condition(taps)
        ).expand(-1, -1, *features.shape[3:])
        gates = logits.softmax(dim=1)
        made.append(self._record(point, layer, logits, gates, facts))
        fused = (gates[:, :, None].to(features) * features).sum(1)
        back = fused if point.grid is None else fused.flatten(2).transpose(1, 2)
        return [back] * len(taps)

    def _condition(self, taps: Sequence[Tap]) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the condition [B, M, S], mean over the members, and their mask."""
        if not self.topology.condition_width:
            return None, None
        if any(tap.tokens is None for tap in taps):
            allowed = "the condition that members read"
            raise DataError(describe("cond", None, allowed, "their aggregators attend to it"))
        return _mean([tap.tokens for tap in taps]), taps[0].mask

    def _record(
        self, point: Point, layer: int, logits: Tensor, gates: Tensor, facts: _Facts
    ) -> Routing:
        batch, count, *sides = gates.shape
        rows = math.prod(sides)
        gates_RN, logits_RN = (
            value.flatten(2).transpose(1, 2).reshape(batch * rows, count)
            for value in (gates, logits)
        )
        return Routing(
            unit="token",
            num_experts=count,
            ids=torch.arange(count, device=gates.device).expand(batch * rows, -1),
            gates=gates_RN,
            probs=gates_RN,
            logits=logits_RN,
            batch=(batch, rows),
            grid=tuple(sides),
            slot=ENSEMBLE,
            layer=layer,
            name=point.name,
            expert_names=tuple(self.members.names),
            noise=facts.t,
            step_index=facts.step,
            label=facts.cond.label,
            task=facts.cond.task,
            sample_ids=facts.sample_ids,
        )


@dataclass(frozen=True, eq=False)
class _Facts:
    """What the routings of one call have in common."""

    t: Tensor
    step: Tensor
    cond: Condition
    sample_ids: Tensor | None


def _mean(values: Sequence[Tensor | None]) -> Tensor:
    known = [value for value in values if value is not None]
    return torch.stack(known).mean(0)


def _as_map(feature: Tensor, point: Point) -> Tensor:
    """[B, C, H, W], also of tokens on a grid."""
    if point.grid is None:
        return feature
    return feature.transpose(1, 2).unflatten(2, point.grid)


def _fused(patterns: Sequence[str], topology: Topology) -> dict[str, Point]:
    """Points that are fused, in running order; ConfigError for a pattern that fits none."""
    names = [point.name for point in topology.points]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(describe("points", pattern, ", ".join(names)))
    chosen = [
        point
        for point in topology.points
        if point.name == names[-1] or any(fnmatchcase(point.name, p) for p in patterns)
    ]
    return {point.name: point for point in chosen}


def _common_topology(config: AggregateConfig, members: Members) -> Topology:
    """ConfigError unless all members are there, resident, and alike in all that is fused."""
    for facts in members.facts:
        if facts.missing:
            allowed = "every member: aggregators weigh the features of all"
            raise ConfigError(describe(f"members.{facts.name}", facts.reason, allowed))
    if len(members.modules) < len(members):
        allowed = "members in memory: all are asked at once"
        raise ConfigError(describe("members", "read when needed", allowed, "load without resident"))
    found = [members.get(index) for index in range(len(members))]
    for name in ("process", "view", "precondition"):
        _check_one(name, members, [_fact(denoiser, name) for denoiser in found])
    if config.process is not None and config.process.build() != found[0].process:
        allowed = "null, or that of the members: features are made at one noise level"
        raise ConfigError(describe("process", config.process.kind, allowed))
    if config.view not in ("auto", _fact(found[0], "view")):
        hint = "fused answers are the members' own"
        raise ConfigError(describe("view", config.view, "auto", hint))
    topologies = [
        as_layered(denoiser, f"members.{name}").topology()
        for name, denoiser in zip(members.names, found, strict=True)
    ]
    check_same_topology(topologies, members.names)
    return topologies[0]


def _fact(denoiser: Any, name: str) -> Any:
    """A denoiser's process; or its view or preconditioning, by configuration."""
    if name == "process":
        return denoiser.process
    config = getattr(denoiser, "config", None)
    found = getattr(denoiser, "view", None) if name == "view" else None
    found = found or getattr(config, name, None)
    return found.to_json() if isinstance(found, Part) else found


def _check_one(name: str, members: Members, values: Sequence[Any]) -> None:
    for owner, value in zip(members.names[1:], values[1:], strict=True):
        if value != values[0]:
            hint = f"features are fused inside the networks; {members.names[0]!r} has another"
            raise ConfigError(describe(f"members.{owner}.{name}", value, str(values[0]), hint))
