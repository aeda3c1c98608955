"""Experts of clusters of the data, joined by the posterior of the cluster given x_t.

    D(x, t) = sum_k r_k(x, t) D_k(x, t),   r_k = P(cluster = k | x_t = x)

is the denoiser of the whole data, in any view (Decentralized Diffusion Models, McAllister et al.
2025). r comes from a router network (:mod:`.router`), or in closed form (:mod:`.closed_form`). Only
the choice ``dense`` is exact. The others keep a part of the members with renormalised weights; near
pure noise, where r is the clusters' prior, ``top_k`` begins with the largest clusters
(:mod:`.coverage` measures what that costs). Shapes: B batch, K members.
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
    """``prior``: q(k), each cluster's share of the data. ``router_prior``: the shares that the
    router saw in training (None: q itself; of a class-balanced one all 1 / K): its logits get
    log q - log router_prior. ``router_every`` n: the router is asked at every n-th time of the
    grid only; lossy, the choice in between is that of an earlier, noisier state.
    """

    kind: Literal["mixture"] = "mixture"
    choice: Annotated[SerializeAsAny[Part], CHOICES.validator] = "dense"  # type: ignore[assignment]
    prior: tuple[float, ...] | None = None
    router_prior: tuple[float, ...] | None = None
    router_every: PositiveInt = 1

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
        """``router(x, t, cond)`` answers logits [B, K], or a Prediction of logits. If it has a
        ``process``, it is asked at the noise level and scale of that process."""
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
    """See the module. A choice belongs to a sample: rows are grouped by member, and each member is
    called once with its rows."""

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
        """Forget the router's last answer (``router_every`` > 1); new runs are noticed anyway."""
        self._last = None

    def probabilities(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """(logits, posterior) [B, K] over the members that are there, after prior correction; f32,
        or f64 where x is."""
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
    """The router where it has weights; a closed form has none."""
    return router if isinstance(router, nn.Module) else None
