"""Sampling with samples that join and leave the batch, each with its own grid, condition and seed.

All samples under way share one denoiser call per step. A sample is the same as if it were alone (to
rounding), whatever else is in the batch.

Shapes: B samples that are under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.core.rng import SampleNoise
from coterie.core.routing import ENSEMBLE, Routing
from coterie.solvers.base import Estimate, Query, Solver, SolverState, prepared
from coterie.solvers.checks import check_run
from coterie.solvers.feynman_kac import FeynmanKac


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished sample: ``x`` at the last of its times."""

    id: Any
    x: Tensor


class Stepper:
    """Call ``admit`` at any time to add samples, and ``step`` until ``len`` is 0. No gradient.

    One solver for all; Feynman-Kac correctors are refused, as their samples depend on each other.
    Guidance weights that differ by sample are in ``cond.guidance``.
    """

    def __init__(self, denoiser: DenoiserLike, solver: Solver) -> None:
        if isinstance(solver, FeynmanKac):
            hint = "its particles belong together"
            raise ConfigError(describe("solver", "feynman_kac", "any other solver", hint))
        self.denoiser, self.solver = denoiser, solver
        self.evaluations = 0
        self._ids: list[Any] = []
        self._times: list[list[float]] = []
        self._places: list[int] = []
        self._x: Tensor | None = None
        self._cond = Condition()
        self._noise: SampleNoise | None = None
        self._state = SolverState()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list[Any]:
        """Ids of the samples under way, in batch order."""
        return list(self._ids)

    @torch.no_grad()
    def admit(
        self,
        x: Tensor,
        cond: Condition,
        times: Sequence[Tensor],
        noise: SampleNoise | None = None,
        ids: Sequence[Any] | None = None,
    ) -> None:
        """Add samples at ``x`` [n, ...], each with its own ``times`` (f64, see
        :func:`coterie.solvers.integrate`).

        ``noise``: for stochastic solvers. ``ids``: their names in the results, by default
        consecutive numbers. ``cond`` must have the same fields as in earlier calls. ConfigError,
        DataError.
        """
        if len(times) != len(x):
            raise ConfigError(describe("times", len(times), f"{len(x)} grids, one per sample"))
        for own in {id(one): one for one in times}.values():
            check_run(self.denoiser.process, x, cond, own, self.solver, noise)
        cond = prepared(self.denoiser, cond)
        self._check_alike(x, cond)
        names = list(range(self._count, self._count + len(x))) if ids is None else list(ids)
        if self._x is None or not len(self):
            self._x, self._cond, self._noise, self._state = x, cond, noise, SolverState()
        else:
            self._x = torch.cat([self._x, x])
            self._cond = Condition.cat(self._cond, cond)
            if noise is not None and self._noise is not None:
                self._noise = self._noise.joined(noise)
            self._state = self._state.extended(len(x))
        self._count += len(x)
        self._ids += names
        self._times += [own.tolist() for own in times]
        self._places += [0] * len(x)

    _count = 0

    def _check_alike(self, x: Tensor, cond: Condition) -> None:
        if self._x is None or not len(self):
            return
        if x.shape[1:] != self._x.shape[1:]:
            allowed = f"samples of shape {tuple(self._x.shape[1:])}, as those under way"
            raise ConfigError(describe("x", tuple(x.shape[1:]), allowed))
        given, wanted = sorted(cond.tensors()), sorted(self._cond.tensors())
        if given != wanted:
            raise ConfigError(describe("cond", given, f"the fields of those under way, {wanted}"))

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """One step of every sample under way; returns those that are finished."""
        if not len(self) or self._x is None:
            return []
        query = Query(self.denoiser, self._cond)
        t, u, steps = self._now()
        x, t = self.solver.perturb(query.process, self._x, t, steps, self._noise)
        estimate = query(x, t)
        landing = (query.process.sigma(u) == 0.0).expand(len(self))
        if bool(landing.all()):
            moved = self.solver.land(query, estimate, self._state, self._noise)
        elif not bool(landing.any()):
            moved, self._state = self.solver.step(query, estimate, u, self._state, self._noise)
        else:
            moved = self._part(query, estimate, u, landing)
        self.evaluations += query.evaluations
        self._x = moved
        self._places = [place + 1 for place in self._places]
        return self._retire(kept_state=bool(landing.any()))

    def _now(self) -> tuple[Tensor, Tensor, int | Tensor]:
        """t, u and the number of steps: numbers where all agree, as in a run of one grid."""
        pairs = [(own[at], own[at + 1]) for own, at in zip(self._times, self._places)]
        counts = [len(own) - 1 for own in self._times]
        t, u = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        if len(set(pairs)) == 1 and len(set(counts)) == 1:
            return t[0], u[0], counts[0]
        return t, u, torch.tensor(counts)

    def _part(self, query: Query, estimate: Estimate, u: Tensor, landing: Tensor) -> Tensor:
        """Some samples land, the others go on; the state is that of the others then."""
        staying, going = ((rows.nonzero()[:, 0]) for rows in (~landing, landing))
        inner, own, state, noise = self._some(query, estimate, going)
        landed = self.solver.land(inner, own, state, noise)
        query.evaluations += inner.evaluations
        inner, own, state, noise = self._some(query, estimate, staying)
        moved, self._state = self.solver.step(inner, own, u[staying], state, noise)
        query.evaluations += inner.evaluations
        x = torch.empty_like(estimate.x)
        for rows, made in ((going, landed), (staying, moved)):
            x.index_copy_(0, rows.to(x.device), made.to(x.dtype))
        return x

    def _some(
        self, query: Query, estimate: Estimate, rows: Tensor
    ) -> tuple[Query, Estimate, SolverState, SampleNoise | None]:
        """What a solver needs to move the samples ``rows``."""
        on = rows.to(estimate.x.device)
        t = estimate.t if estimate.t.dim() == 0 else estimate.t[rows]
        own = Estimate(query.process, estimate.x[on], t, _rows(estimate.prediction, on))
        noise = None if self._noise is None else self._noise.index(rows)
        return Query(query.denoiser, query.cond.index(on)), own, self._state.index(rows), noise

    def _retire(self, kept_state: bool) -> list[Finished]:
        """``kept_state``: the state is already that of the samples that stay."""
        assert self._x is not None
        ends = [len(own) - 1 for own in self._times]
        stay = [row for row, at in enumerate(self._places) if at < ends[row]]
        if len(stay) == len(self):
            return []
        gone = sorted(set(range(len(self))) - set(stay))
        done = [Finished(self._ids[row], self._x[row].clone()) for row in gone]
        rows = torch.tensor(stay, dtype=torch.long)
        on = rows.to(self._x.device)
        self._x, self._cond = self._x[on], self._cond.index(on)
        self._noise = None if self._noise is None else self._noise.index(rows)
        if not kept_state:
            self._state = self._state.index(rows)
        for name in ("_ids", "_times", "_places"):
            setattr(self, name, [getattr(self, name)[row] for row in stay])
        return done


def _rows(prediction: Prediction, rows: Tensor) -> Prediction:
    """A solver's view of some samples: of the routings, who of an ensemble was asked."""
    variance = prediction.variance
    return prediction.replace(
        value=prediction.value[rows],
        variance=None if variance is None else variance[rows],
        routings=tuple(_routing_rows(r, rows) for r in prediction.routings if r.slot == ENSEMBLE),
    )


def _routing_rows(routing: Routing, rows: Tensor) -> Routing:
    picked = {name: getattr(routing, name)[rows] for name in ("ids", "gates", "probs", "logits")}
    mask = None if routing.mask is None else routing.mask[rows]
    return replace(routing, **picked, mask=mask, batch=(len(rows), routing.batch[1]))
