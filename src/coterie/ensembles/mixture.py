"""Experts of clusters of the data, mixed by the posterior of the cluster given x_t.

    D(x, t) = sum_k r_k(x, t) D_k(x, t),   r_k = P(cluster = k | x_t = x)

is the denoiser of the whole data, in any view (Decentralized Diffusion Models, McAllister et al.
2025). r comes from a router network (:mod:`.router`) or a closed form (:mod:`.closed_form`). Only
the choice ``dense`` is exact. The others use some of the members with renormalised weights; near
pure noise, where r is the clusters' prior, ``top_k`` starts with the largest clusters
(:mod:`.coverage` measures the effect). Shapes: B batch, K members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import PositiveInt, SerializeAsAny, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.registry import Part
from coterie.core.routing import Routing
from coterie.ensembles.base import (
    ENSEMBLES,
    Ensemble,
    EnsembleConfig,
    as_members,
    check_share,
)
from coterie.ensembles.choices import CHOICES, choose_ids
from coterie.ensembles.members import Members
from coterie.experts.routers.base import SelectPart
from coterie.process import transport


@ENSEMBLES.register
class MixtureConfig(EnsembleConfig):
    """Experts of clusters of the data, mixed by a router's posterior."""

    kind: Literal["mixture"] = "mixture"
    choice: Annotated[SerializeAsAny[Part], CHOICES.validator] = "dense"  # type: ignore[assignment]
    """Which members are used, given the posterior."""
    prior: tuple[float, ...] | None = None  # q(k), each cluster's share of the data
    router_prior: tuple[float, ...] | None = None
    """Shares that the router was trained with; its logits get log q - log router_prior. null: q.
    For a class-balanced router all are 1 / K."""
    router_every: PositiveInt = 1
    """Run the router at every n-th step only; in between the last choice is kept, which is
    approximate."""

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        if self.prior is not None:
            check_share("prior", self.prior, len(self.prior))
        if self.router_prior is not None:
            if self.prior is None:
                hint = "a correction needs to know both"
                raise ConfigError(describe("prior", None, "the clusters' shares", hint))
            check_share("router_prior", self.router_prior, len(self.prior))
        return self

    def build(
        self,
        members: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        router: Any = None,
    ) -> Mixture:
        """The ensemble.

        ``router(x, t, cond)`` returns logits [B, K], or a Prediction of logits. If it has a
        ``process``, it is called at that process's noise level and scale.
        """
        if not callable(router):
            raise ConfigError(describe("router", router, "a callable that answers logits"))
        return Mixture(self, as_members(members), router)


@dataclass
class _Remembered:
    """The router's last answer, and since how many steps of the grid it is used."""

    logits: Tensor
    t: Tensor
    steps: int = 0


class Mixture(Ensemble):
    """The ensemble of the module. Each member is called once with the rows that use it."""

    config: MixtureConfig

    def __init__(self, config: MixtureConfig, members: Members, router: Any) -> None:
        super().__init__(config, members)
        self.router = router
        count = len(members)
        if config.prior is not None:
            check_share("prior", config.prior, count)
        clusters = getattr(getattr(router, "config", None), "num_clusters", count)
        if clusters != count:
            hint = "a router knows one cluster per member"
            raise ConfigError(describe("router.num_clusters", clusters, str(count), hint))
        if isinstance(config.choice, SelectPart):
            config.choice.check(count)
        shift = torch.zeros(count, dtype=torch.float64)
        if config.router_prior is not None and config.prior is not None:
            known = torch.tensor([config.prior, config.router_prior], dtype=torch.float64)
            shift = known[0].log() - known[1].log()
        closed = torch.full_like(shift, float("-inf"))
        self.register_buffer("shift", torch.where(self.present, shift, closed), persistent=False)
        self._last: _Remembered | None = None

    def reset(self) -> None:
        """Drop the kept choice of ``router_every`` > 1; a new run is noticed without it."""
        self._last = None

    def probabilities(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """(logits, posterior) [B, K] over existing members, after prior correction; f32, or f64 if
        x is."""
        logits = self._logits(x, t, cond)
        corrected = logits + self.get_buffer("shift").to(logits)
        return corrected, corrected.softmax(dim=1)

    def choose(self, x: Tensor, t: Tensor, cond: Condition) -> Routing:
        logits, probs = self.probabilities(x, t, cond)
        ids = choose_ids(self.config.choice, probs, x, t, cond)
        nobody = ids == len(self.members)
        if bool(nobody.all(1).any()):
            row = int(nobody.all(1).nonzero()[0])
            names = ", ".join(self.missing) or "a member of probability 0"
            allowed = f"a member that is there (missing: {names})"
            raise DataError(describe(f"choice of row {row}", self.config.choice.kind, allowed))
        gates = F.pad(probs, (0, 1)).gather(1, ids)
        if self.config.choice.kind != "dense":
            gates = gates / gates.sum(1, keepdim=True)
        return self.record(logits, probs, ids, gates, t, cond)

    def _logits(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if self.config.router_every == 1:
            return self._ask_router(x, t, cond)
        last = self._last
        if last is None or self._is_new(last.t, t):
            last = _Remembered(self._ask_router(x, t, cond), t)
        elif bool((t < last.t).any()):
            last.t, last.steps = t, last.steps + 1
            if last.steps >= self.config.router_every:
                last = _Remembered(self._ask_router(x, t, cond), t)
        self._last = last
        return last.logits

    def _is_new(self, before: Tensor, t: Tensor) -> bool:
        """Other samples: another batch, noise that rises, or the noisy end of a grid."""
        return (
            before.shape != t.shape
            or before.device != t.device
            or bool((t > before).any())
            or bool((t >= self.process.t_max).any())
        )

    def _ask_router(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        own = getattr(self.router, "process", self.process)
        if own != self.process:
            x, t = transport(self.process, own, x, t)
        answer = self.router(x, t, cond)
        logits: Tensor = answer.value if isinstance(answer, Prediction) else answer
        wanted = (x.shape[0], len(self.members))
        if tuple(logits.shape) != wanted:
            raise DataError(describe("router: logits", tuple(logits.shape), str(wanted)))
        if not bool(torch.isfinite(logits).all()):
            raise DataError("router: logits hold NaN or infinity")
        return logits if logits.dtype == torch.float64 else logits.float()


def router_module(router: Any) -> nn.Module | None:
    """The router as a module; None for a closed form."""
    return router if isinstance(router, nn.Module) else None
