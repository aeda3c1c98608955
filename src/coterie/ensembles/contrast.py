"""Guidance between denoisers: away from a weaker prediction, towards a stronger one.

    D + (w - 1) (D_strong - D_weak)

is the formula of guidance (:mod:`coterie.process.contrast`). Weak is an earlier checkpoint, another
average of the weights, a smaller network (autoguidance), or the same network with other experts,
which needs no second copy of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.routing import Routing
from coterie.ensembles.base import ENSEMBLES, Ensemble, EnsembleConfig, as_members
from coterie.ensembles.members import Members
from coterie.experts.rerouting import changed, check_paths, rerouted, token_routers
from coterie.process import ContrastConfig, contrast


@ENSEMBLES.register
class StrongWeakConfig(EnsembleConfig):
    """Guidance between a strong and a weak denoiser.

    Members: strong, weak and, optionally, a third that the difference is added to (default:
    strong).
    """

    kind: Literal["contrast"] = "contrast"
    contrast: ContrastConfig = ContrastConfig(weight=2.0)  # weight and where it acts
    rerouted: dict[str, Any] = Field(default_factory=dict)
    """Settings of the token routers that make the weak denoiser from the strong one, such as
    ``{"select.k": 1}``; there is one member then."""

    @model_validator(mode="after")
    def _check(self) -> StrongWeakConfig:
        check_paths(self.rerouted)
        return self

    def build(
        self,
        members: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        router: Any = None,
    ) -> StrongWeak:
        """The ensemble. ``members``: strong, weak and base. ``router`` is not used."""
        if router is not None:
            raise ConfigError(describe("router", type(router).__name__, "none", "all answer"))
        return StrongWeak(self, as_members(members))


class StrongWeak(Ensemble):
    """The ensemble of the module. The gates of its routing are w and 1 - w (and 1 for the base)."""

    config: StrongWeakConfig

    def __init__(self, config: StrongWeakConfig, members: Members) -> None:
        wanted = (1,) if config.rerouted else (2, 3)
        if len(members) not in wanted:
            hint = "the weak one is the strong one rerouted" if config.rerouted else "strong, weak"
            allowed = " or ".join(map(str, wanted))
            raise ConfigError(describe("members", len(members), allowed, hint))
        super().__init__(config, members)
        if self.missing:
            hint = "nobody can answer for it"
            raise ConfigError(describe("members", list(self.missing), "members that are", hint))
        if config.rerouted:
            self._check_routers()

    def _check_routers(self) -> None:
        strong = self.members.get(0)
        routers = token_routers(strong) if isinstance(strong, nn.Module) else []
        if not routers:
            hint = "no router chooses experts for tokens in it"
            allowed = "a model with experts"
            raise ConfigError(describe("rerouted", self.members.names[0], allowed, hint))
        for router in routers:
            changed(router.config, self.config.rerouted).check(router.num_experts)

    def choose(self, x: Tensor, t: Tensor, cond: Condition) -> Routing:
        count = len(self.members)
        weight = self.config.contrast.weights(self.process, t).float()
        gates = torch.stack([weight, 1.0 - weight, torch.ones_like(weight)], dim=1)
        if count == 3:
            gates[:, 0] -= 1.0
        if count == 1:
            gates = torch.ones_like(gates)
        gates = gates[:, :count]
        ids = torch.arange(count, device=t.device).expand(len(t), count)
        return self.record(gates, gates.softmax(1), ids, gates, t, cond)

    def answer(self, x: Tensor, t: Tensor, cond: Condition, routing: Routing) -> Prediction:
        base = len(self.members) == 3
        if not bool((self.config.contrast.weights(self.process, t) != 1.0).any()):
            alone = self._ask_rows(2 if base else 0, x, t, cond)
            return alone.replace(routings=(routing, *alone.routings))
        strong = self._ask_rows(0, x, t, cond)
        weak = self._weak(x, t, cond)
        moved = self._ask_rows(2, x, t, cond) if base else None
        made = contrast(self.process, self.config.contrast, x, t, strong, weak, moved)
        inner = (*strong.routings, *weak.routings, *(moved.routings if moved else ()))
        return made.replace(routings=(routing, *inner))

    def _weak(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        if not self.config.rerouted:
            return self._ask_rows(1, x, t, cond)
        settings, network = self.config.rerouted, self.members.get(0)
        assert isinstance(network, nn.Module)
        with rerouted(network, lambda config, _: changed(config, settings)):
            weak = self._ask_rows(0, x, t, cond)
        inner = tuple(made.replace(slot=f"weak {made.slot}") for made in weak.routings)
        return weak.replace(routings=inner)
