"""A point mass in the plane, an obstacle in its way, four goals, and a planner that goes around it
to the left or to the right.

At the start both ways are equally good, so actions have two modes there and their mean runs into
the obstacle. Which of the four goals is meant, only the goal says. Positions are in [-1, 1].
Legend: E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.core.numbers import Seed
from coterie.core.rng import derive, numpy_generator
from coterie.data.actions.chunks import ActionSource, Array, Demonstrations, Scene, demonstrate
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split

GOALS = np.array([(0.85, -0.6), (0.85, -0.2), (0.85, 0.2), (0.85, 0.6)])
GOAL_NAMES = ("far right", "right", "left", "far left")
RADIUS = 0.25
"""Of the obstacle, a disc about the origin."""
REACH = 0.1
SECONDS = 0.08  # per step
INERTIA = 0.5  # share of the velocity that stays from step to step
CLEARANCE = 0.45  # how far beside the origin the planner passes
GATES = 0.3  # distance before and behind it at which it turns
SPARE = 1.25
"""Episodes planned for each one wanted: those that touch the obstacle are left out."""


class ObstacleSimulator:
    """Velocities follow the actions, which are desired velocities in [-1, 1]^2.

    Observed are place and velocity, f32 [E, 1, 4]. Touching the obstacle ends an episode.
    """

    ways: tuple[str, ...] = ("left", "right")
    scene = Scene((-1.0, -1.0), (1.0, 1.0), ((0.0, 0.0, RADIUS),), REACH)

    def __init__(self, limit: int = 48) -> None:
        self.limit = limit

    def reset(self, goals: Array, seeds: Sequence[int]) -> Array:
        goals = np.asarray(goals)
        if goals.size and not (goals.min() >= 0 and goals.max() < len(GOALS)):
            wrong = int(goals[(goals < 0) | (goals >= len(GOALS))][0])
            raise DataError(describe("goal", wrong, f"0..{len(GOALS) - 1}"))
        drawn = [_start(seed) for seed in seeds]
        self._place = np.array([place for place, _, _ in drawn]).reshape(-1, 2)
        self._side = np.array([side for _, side, _ in drawn])
        self._height = np.array([height for _, _, height in drawn])
        self._velocity = np.zeros_like(self._place)
        self._goal = GOALS[goals]
        self._steps = 0
        self._success = np.zeros(len(goals), dtype=bool)
        self._crashed = np.zeros(len(goals), dtype=bool)
        self._way = np.full(len(goals), -1)
        return self._seen()

    def step(self, actions: Array) -> Array:
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape != self._place.shape:
            raise DataError(describe("actions.shape", actions.shape, f"{self._place.shape}"))
        if not np.isfinite(actions).all():
            episode = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
            raise DataError(f"actions: that of episode {episode} holds NaN or infinity")
        moving = ~self.over[:, None]
        wanted = INERTIA * self._velocity + (1 - INERTIA) * actions.clip(-1, 1)
        self._velocity = np.where(moving, wanted, self._velocity)
        moved = (self._place + SECONDS * self._velocity).clip(-1, 1)
        passed = moving[:, 0] & (self._place[:, 0] < 0) & (moved[:, 0] >= 0)
        self._way = np.where(passed, (moved[:, 1] <= 0).astype(int), self._way)
        self._place = np.where(moving, moved, self._place)
        self._crashed |= np.linalg.norm(self._place, axis=1) < RADIUS
        self._success |= np.linalg.norm(self._place - self._goal, axis=1) < REACH
        self._steps += 1
        return self._seen()

    def expert(self) -> Array:
        """To a gate before the obstacle, along it, then to the goal, slowing down there."""
        x = self._place[:, 0]
        before, around = x < -GATES, x < GATES
        # Aimed at a little behind each gate: whoever stands in it would turn on the spot.
        gate = np.where(before, -GATES, GATES) + 0.1
        aside = np.stack([gate, self._side * self._height], axis=1)
        aim = np.where(around[:, None], aside, self._goal)
        gap = aim - self._place
        far = np.linalg.norm(gap, axis=1, keepdims=True)
        slow = np.where(around[:, None], 1.0, np.minimum(1.0, far / 0.15))
        action: Array = (gap / np.maximum(far, 1e-6) * slow).astype(np.float32)
        return action

    def _seen(self) -> Array:
        return np.concatenate([self._place, self._velocity], axis=1)[:, None].astype(np.float32)

    @property
    def success(self) -> Array:
        return self._success

    @property
    def over(self) -> Array:
        over: Array = self._success | self._crashed | (self._steps >= self.limit)
        return over

    @property
    def way(self) -> Array:
        return self._way

    @property
    def places(self) -> Array:
        return self._place.astype(np.float32)

    @property
    def targets(self) -> Array:
        return self._goal.astype(np.float32)


def _start(seed: int) -> tuple[Array, float, float]:
    """Where an episode begins, and which side and distance its planner takes."""
    rng = numpy_generator(seed, "obstacle")
    place = np.array([rng.uniform(-0.9, -0.8), rng.uniform(-0.3, 0.3)])
    side = float(rng.choice((-1.0, 1.0)))
    return place, side, CLEARANCE + 0.04 * float(rng.standard_normal())


@SOURCES.register
class ObstacleConfig(SourceConfig):
    """Demonstrations of a planner that goes around an obstacle to one of four goals."""

    kind: Literal["obstacle"] = "obstacle"
    episodes: int = Field(default=2000, ge=4, le=1_000_000)
    """training episodes; a quarter as many are held out"""
    horizon: int = Field(default=8, ge=1, le=64)  # actions per chunk
    stride: int = Field(default=1, ge=1)  # steps between the starts of chunks
    jitter: float = Field(default=0.2, ge=0, le=1)
    """standard deviation of noise on the planner's actions"""
    seed: Seed = 0  # of the episodes
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="A point mass goes around an obstacle to one of four goals, left or right",
        modality="action",
        shape="horizon x 2",
        count="any (2000 + 500 episodes, about 28 moments each)",
        licence="none needed: computed",
    )

    def build(self, split: Split = "train") -> ActionSource:
        count = self.episodes if split == "train" else self.episodes // 4
        return ActionSource(
            self.kind,
            _episodes(self.seed, split, count, self.jitter),
            self.horizon,
            goal_names=GOAL_NAMES,
            rest=np.zeros(2, np.float32),
            licence=self.info.licence,
            make_simulator=ObstacleSimulator,
            stride=self.stride,
        )


@lru_cache(maxsize=4)
def _episodes(seed: int, split: Split, count: int, jitter: float) -> Demonstrations:
    """The first ``count`` planned episodes that succeed, goals in turn as far as they do."""
    planned = round(SPARE * count) + 8
    simulator = ObstacleSimulator()
    seeds = [derive(seed, "obstacle", split, episode) for episode in range(planned)]
    rng = numpy_generator(seed, "obstacle", split, "jitter")
    noise = jitter * rng.standard_normal((simulator.limit, planned, 2))
    made, success = demonstrate(simulator, np.arange(planned) % len(GOALS), seeds, noise)
    kept = np.flatnonzero(success)[:count]
    if len(kept) < count:
        allowed = "less: the demonstrator touches the obstacle too often"
        raise DataError(describe("jitter", jitter, allowed))
    return made.take(kept)
