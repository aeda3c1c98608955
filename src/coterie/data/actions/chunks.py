"""Demonstrations of robots: chunks of actions with what was seen, the goal, and a simulator.

A sample is a window of the next T actions from a moment of an episode; past an episode's end the
actions are ``rest``. ``Batch.cond.label`` is the goal, ``cond.tokens`` what was observed at the
window's first moment: it is kept where the goal is dropped.
Legend: E episodes, S moments of all episodes, W windows, B batch, T chunk, A action, M tokens of an
observation, C values of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from coterie.core.batch import Batch
from coterie.core.errors import DataError, describe
from coterie.core.prediction import Condition
from coterie.data.source import as_rows, check_labels

Array = np.ndarray
KEPT = frozenset({"task", "tokens"})
"""Fields of the condition that stay where the goal is dropped."""


@dataclass(frozen=True, eq=False)
class Scene:
    """What there is to see in the plane besides paths: the view, forbidden discs, targets."""

    low: tuple[float, float]
    high: tuple[float, float]
    discs: tuple[tuple[float, float, float], ...] = ()  # x, y, radius
    reach: float = 0.05  # distance at which a target counts as reached


class Simulator(Protocol):
    """E episodes side by side; each depends on its own goal, seed and actions alone.

    An episode that is over stays where it is. ``ways`` names what episodes may choose between.
    """

    limit: int  # most steps of an episode
    ways: tuple[str, ...]
    scene: Scene

    def reset(self, goals: Array, seeds: Sequence[int]) -> Array:
        """Begin E episodes with goals i64 [E]; observations f32 [E, M, C]."""
        ...

    def step(self, actions: Array) -> Array:
        """Actions f32 [E, A] -> observations f32 [E, M, C]."""
        ...

    def expert(self) -> Array:
        """f32 [E, A]: what the scripted demonstrator would do now."""
        ...

    @property
    def success(self) -> Array:
        """bool [E]."""
        ...

    @property
    def over(self) -> Array:
        """bool [E]: succeeded, failed, or out of time."""
        ...

    @property
    def way(self) -> Array:
        """i64 [E]: index in ``ways`` of what an episode chose; -1 where it has not yet."""
        ...

    @property
    def places(self) -> Array:
        """f32 [E, 2]: where the moving thing is in the scene."""
        ...

    @property
    def targets(self) -> Array:
        """f32 [E, 2]: where it should go."""
        ...


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes one after the other: ``observations`` f32 [S, M, C], ``actions`` f32 [S, A],
    ``lengths`` i64 [E] that sum to S, ``goals`` i64 [E]."""

    observations: Array
    actions: Array
    lengths: Array
    goals: Array

    def check(self, name: str, num_goals: int) -> None:
        """DataError naming the first thing that is wrong, with its episode."""
        total, moments = int(self.lengths.sum()), len(self.actions)
        if (self.lengths < 1).any() or total != moments or len(self.observations) != moments:
            found = f"{moments} actions, {len(self.observations)} observations"
            allowed = f"one of each for the {total} moments of {len(self.lengths)} episodes"
            raise DataError(describe(f"{name}: moments", found, allowed))
        if len(self.goals) != len(self.lengths):
            allowed = f"{len(self.lengths)}, one per episode"
            raise DataError(describe(f"{name}: goals", len(self.goals), allowed))
        if num_goals:
            check_labels(self.goals, num_goals, f"{name}: goals")
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        for field in ("actions", "observations"):
            bad = ~np.isfinite(getattr(self, field).reshape(moments, -1)).all(axis=1)
            if bad.any():
                moment = int(np.flatnonzero(bad)[0])
                episode = int(owner[moment])
                step = moment - int(self.lengths[:episode].sum())
                where = f"episode {episode}, step {step}"
                raise DataError(f"{name}: {field} of {where} hold NaN or infinity; drop it")

    def take(self, episodes: Array) -> Demonstrations:
        """Some episodes, in the order of ``episodes`` i64."""
        ends = np.cumsum(self.lengths)
        rows = [np.arange(ends[e] - self.lengths[e], ends[e]) for e in episodes]
        kept = np.concatenate([np.zeros(0, np.int64), *rows])
        return Demonstrations(
            self.observations[kept],
            self.actions[kept],
            self.lengths[episodes],
            self.goals[episodes],
        )


class ActionSource:
    """Windows of T actions from every ``stride``-th moment of every episode.

    ``rest`` f32 [A]: the action past an episode's end. ``make_simulator``: a new simulator of what
    was demonstrated; None where there is none.
    """

    modality = "action"

    def __init__(
        self,
        name: str,
        episodes: Demonstrations,
        horizon: int,
        *,
        goal_names: Sequence[str],
        rest: Array,
        licence: str,
        make_simulator: Callable[[], Simulator] | None = None,
        stride: int = 1,
        fingerprint: str = "",
    ) -> None:
        self.fingerprint = fingerprint
        episodes.check(name, len(goal_names))
        self.name, self.licence, self.make_simulator = name, licence, make_simulator
        self.class_names, self.num_classes = tuple(goal_names), len(goal_names)
        self.shape: tuple[int, ...] = (horizon, episodes.actions.shape[1])
        self.observation: tuple[int, ...] = episodes.observations.shape[1:]
        self.num_episodes = len(episodes.lengths)
        count = len(episodes.actions)
        self._observations = episodes.observations.astype(np.float32)
        # One row past the end stands for every moment after an episode.
        self._actions = np.concatenate([episodes.actions, rest[None]]).astype(np.float32)
        self._ends = np.repeat(np.cumsum(episodes.lengths), episodes.lengths)
        self._goals = np.repeat(episodes.goals, episodes.lengths)
        since = np.arange(count) - (self._ends - np.repeat(episodes.lengths, episodes.lengths))
        self._starts = np.flatnonzero(since % stride == 0)

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, indices: Any) -> Batch:
        rows = as_rows(indices, len(self), self.name)
        first = self._starts[rows]
        moments = first[:, None] + np.arange(self.shape[0])
        moments = np.where(moments < self._ends[first][:, None], moments, len(self._ends))
        label = torch.from_numpy(self._goals[first]) if self.num_classes else None
        seen = torch.from_numpy(self._observations[first])
        return Batch(
            x=torch.from_numpy(self._actions[moments]),
            cond=Condition(label=label, tokens=seen, keep=KEPT),
            ids=torch.from_numpy(rows),
        )


def demonstrate(
    simulator: Simulator, goals: Array, seeds: Sequence[int], noise: Array
) -> tuple[Demonstrations, Array]:
    """The scripted demonstrator in E episodes; (all of them, bool [E] which succeeded).

    Recorded is what it meant to do. ``noise`` f32 [limit, E, A] is added to what it does, so that
    the data hold how it comes back.
    """
    seen = simulator.reset(goals, seeds)
    observed, meant, running = [], [], []
    for step in range(simulator.limit):
        if simulator.over.all():
            break
        running.append(~simulator.over)
        action = simulator.expert()
        observed.append(seen)
        meant.append(action)
        seen = simulator.step(action + noise[step])
    alive = np.stack(running)  # [limit, E]
    by_episode = alive.T
    observations = np.stack(observed).swapaxes(0, 1)[by_episode]
    actions = np.stack(meant).swapaxes(0, 1)[by_episode]
    made = Demonstrations(observations, actions, by_episode.sum(axis=1), goals)
    return made, simulator.success
