"""Base of ensembles: several denoisers with one process and one view.

The members used for a sample are a :class:`Routing` of unit ``sample`` in slot ``ensemble``, so
traces and reports read it like any other. Members keep their own process, view and preconditioning.
A member with another process is called at the same log signal-to-noise ratio, t_A = lam_A^-1(lam),
with x alpha_A / alpha_B (:mod:`coterie.process.transport`).

All views are affine in x0 given x, so a convex combination may be made in any of them. Members with
the same process and view are combined in that view, without conversion: a single member's
prediction is returned bit for bit. Otherwise they are combined in x0, which is bounded by the data
at every noise level and needs no division by sigma (nor by alpha, from x0, flow and v). Shapes: B
batch, K members, k of them chosen.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import SerializeAsAny
from torch import Generator, Tensor, nn

from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction, View, as_times
from coterie.core.registry import Part, Registry
from coterie.core.routing import ENSEMBLE, Aux, Routing
from coterie.ensembles.members import Members, check_alike
from coterie.process import PROCESSES, Process, Transported, as_view, expand

ENSEMBLES = Registry("ensemble", "coterie.ensembles")


class EnsembleConfig(Part):
    """Base of ensemble configurations."""

    process: Annotated[SerializeAsAny[Part], PROCESSES.validator] | None = None
    """process for sampling; null: that of the first member"""
    view: Literal["auto", "x0", "eps", "score", "flow", "v"] = "auto"
    """view of the prediction; auto: the members', if they agree, else x0"""

    def build(
        self,
        members: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
        router: Any = None,
    ) -> Ensemble:
        """The ensemble. ConfigError if members do not fit each other or this configuration."""
        raise NotImplementedError


class Ensemble(nn.Module):
    """``forward(x [B, ...], t f32 [B], cond) -> Prediction``, as any denoiser.

    Subclasses choose members and weights in :meth:`choose`. There are no balance losses: members
    are trained separately.
    """

    def __init__(self, config: EnsembleConfig, members: Members) -> None:
        super().__init__()
        check_alike(members)
        self.config = config
        self.members = members
        self.networks = nn.ModuleList(members.modules)
        first = next(facts.process for facts in members.facts if facts.process is not None)
        self.process: Process = first if config.process is None else config.process.build()
        shared = shared_view(self.process, members) or "x0"
        self.view: View = shared if config.view == "auto" else config.view
        self.asked_view = self.view
        self.missing = tuple(facts.name for facts in members.facts if facts.missing)
        for facts in members.facts:
            if facts.missing:
                warnings.warn(
                    f"ensemble without {facts.name}: {facts.reason}; the others answer for it",
                    stacklevel=3,
                )

    @property
    def present(self) -> Tensor:
        """bool [K]: members that exist."""
        return torch.tensor([not facts.missing for facts in self.members.facts])

    def choose(self, x: Tensor, t: Tensor, cond: Condition) -> Routing:
        """The members and weights for each row of x [B, ...] at t [B]."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        """The combined prediction. ``sample_ids`` go to the routing; ``rng`` and ``progress`` are
        ignored."""
        t = as_times(t, x)
        routing = self.choose(x, t, cond)
        return self.answer(x, t, cond, routing.replace(sample_ids=sample_ids))

    def paired(self, x: Tensor, t: Tensor, cond: Condition, null: Condition) -> Prediction:
        """Predictions with a condition and its null form, stacked; both use the members of the
        first half."""
        routing = twice(self.choose(x, t, cond), null)
        both = Condition.cat(cond, null)
        return self.answer(torch.cat([x, x]), torch.cat([t, t]), both, routing)

    def aux_losses(
        self, routings: Sequence[Routing], rng: Generator | None = None
    ) -> tuple[Aux, ...]:
        return ()

    def answer(self, x: Tensor, t: Tensor, cond: Condition, routing: Routing) -> Prediction:
        """The weighted sum of the chosen members' predictions; each is called once with its
        rows."""
        value = torch.zeros_like(x)
        variance: Tensor | None = None
        routings = [routing]
        order = self.order(routing)
        for place, index in enumerate(order):
            self._expect(order[place:])
            at = (routing.ids == index).nonzero()
            rows, gate = at[:, 0], routing.gates[at[:, 0], at[:, 1]].to(x)
            part = self._ask_rows(index, x, t, cond, rows)
            value = value.index_add(0, rows, expand(gate, x) * part.value.to(x))
            routings += part.routings
            if part.variance is not None:
                # -1 = the posterior variance: what solvers take where nothing was learnt.
                variance = torch.full_like(x, -1.0) if variance is None else variance
                shift = expand(gate, x) * (part.variance.to(x) + 1.0)
                variance = variance.index_add(0, rows, shift)
        return Prediction(value, self.view, tuple(routings), variance=variance)

    def successor(self, index: int) -> int | None:
        """The member that is likely to be used after ``index``; None: unknown."""
        return None

    def _expect(self, order: list[int]) -> None:
        """``order[0]`` is asked now: have it, then say who comes next."""
        self.members.get(order[0])
        after = order[1] if len(order) > 1 else self.successor(order[0])
        if after is not None:
            self.members.expect(after)

    def order(self, routing: Routing) -> list[int]:
        """The chosen members in the order of their calls."""
        chosen = routing.ids[routing.ids < routing.num_experts]
        return [int(index) for index in chosen.unique()]

    def _ask_rows(
        self, index: int, x: Tensor, t: Tensor, cond: Condition, rows: Tensor | None = None
    ) -> Prediction:
        """``rows``: i64, rising; None: every row."""
        if rows is None or len(rows) == len(x):
            part = self.ask(index, x, t, cond)
        else:
            part = self.ask(index, x[rows], t[rows], cond.index(rows))
        if not part.routings:
            return part
        name = self.members.names[index]
        inner = tuple(made.replace(slot=f"{name}/{made.slot}") for made in part.routings)
        return part.replace(routings=inner)

    def ask(self, index: int, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """One member's prediction in the ensemble's process, in the view for combining."""
        member = self.members.get(index)
        if member.process == self.process:
            return as_view(self.process, member(x, t, cond), self.asked_view, x, t)
        moved = Transported(member, self.process)(x, t, cond)
        # A variance is learnt on the grid of the member's own process.
        return as_view(self.process, moved.replace(variance=None), self.asked_view, x, t)

    def record(
        self, logits: Tensor, probs: Tensor, ids: Tensor, gates: Tensor, t: Tensor, cond: Condition
    ) -> Routing:
        """A Routing of the choice; logits and probs [B, K], ids and gates [B, k]."""
        return Routing(
            unit="sample",
            num_experts=len(self.members),
            ids=ids,
            gates=gates,
            probs=probs,
            logits=logits,
            batch=(t.shape[0], 1),
            slot=ENSEMBLE,
            name=ENSEMBLE,
            expert_names=tuple(self.members.names),
            noise=t,
            step_index=self.process.step_index(t),
            label=cond.label,
            task=cond.task,
        )


def shared_view(process: Process, members: Members) -> View | None:
    """The view that every member has in ``process``; None if they differ."""
    present = [facts for facts in members.facts if not facts.missing]
    own = {facts.view if facts.process == process else "x0" for facts in present}
    return own.pop() if len(own) == 1 else None  # type: ignore[return-value]


def twice(routing: Routing, null: Condition) -> Routing:
    """The routing of a batch stacked on itself; the second half carries the null labels."""
    changes: dict[str, Any] = {"batch": (2 * routing.batch[0], 1)}
    for item in dataclasses.fields(routing):
        value = getattr(routing, item.name)
        if isinstance(value, Tensor):
            second = null.label if item.name == "label" and null.label is not None else value
            changes[item.name] = torch.cat([value, second])
    return routing.replace(**changes)


def as_members(
    given: Members | Mapping[str, DenoiserLike | None] | Sequence[DenoiserLike | None],
) -> Members:
    """``given`` as :class:`Members`."""
    return given if isinstance(given, Members) else Members(given)


def check_share(field: str, share: Sequence[float], count: int) -> None:
    """ConfigError unless ``share`` holds ``count`` positive numbers that add up to 1."""
    good = len(share) == count and all(value > 0 for value in share)
    if not good or abs(sum(share) - 1.0) > 1e-6:
        allowed = f"{count} positive numbers that add up to 1"
        raise ConfigError(describe(field, tuple(share), allowed))
