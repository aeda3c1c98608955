"""Manipulation in MuJoCo: tasks of Meta-World with their scripted experts (arXiv:1910.10897).

Needs ``pip install 'coterie[robots]'``. A goal is a task; observed are the 39 numbers of its state,
which hold the target's place; actions are the hand's motion and the gripper, in [-1, 1].
Legend: E episodes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.numbers import Seed
from coterie.core.rng import derive, numpy_generator
from coterie.data.actions.chunks import ActionSource, Array, Demonstrations, Scene, demonstrate
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split

OBSERVED, ACTION = 39, 4
BLOCK = 16  # episodes that are simulated side by side while demonstrations are made


def metaworld_parts() -> tuple[dict[str, Any], dict[str, Any]]:
    """(environments by name, experts by task); ConfigError where Meta-World is not installed."""
    try:
        environments = importlib.import_module("metaworld.env_dict")
        policies = importlib.import_module("metaworld.policies")
    except ImportError as error:
        hint = f"pip install 'coterie[robots]' ({error})"
        raise ConfigError(
            describe("data.kind", "metaworld", "an installed Meta-World", hint)
        ) from None
    made = environments.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    return dict(made), dict(policies.ENV_POLICY_MAP)


class MetaworldSimulator:
    """Each episode has an environment of its own, made from its seed; success ends it."""

    ways: tuple[str, ...] = ()
    scene = Scene((-0.5, 0.35), (0.5, 1.0), (), 0.03)  # the table from above

    def __init__(self, tasks: tuple[str, ...], limit: int) -> None:
        self.tasks, self.limit = tasks, limit
        self._environments, self._experts = metaworld_parts()

    def reset(self, goals: Array, seeds: Sequence[int]) -> Array:
        goals = np.asarray(goals)
        if goals.size and not (goals.min() >= 0 and goals.max() < len(self.tasks)):
            wrong = int(goals[(goals < 0) | (goals >= len(self.tasks))][0])
            raise DataError(describe("goal", wrong, f"0..{len(self.tasks) - 1}"))
        names = [self.tasks[goal] for goal in goals]
        made = [self._environments[f"{name}-goal-observable"] for name in names]
        self._worlds = [
            make(seed=derive(seed, "metaworld") % 2**31)
            for make, seed in zip(made, seeds, strict=True)
        ]
        self._policies = [self._experts[name]() for name in names]
        self._states = np.stack([world.reset()[0] for world in self._worlds])
        self._success = np.zeros(len(goals), dtype=bool)
        self._steps = 0
        return self._seen()

    def step(self, actions: Array) -> Array:
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != (len(self._worlds), ACTION):
            allowed = f"({len(self._worlds)}, {ACTION})"
            raise DataError(describe("actions.shape", actions.shape, allowed))
        if not np.isfinite(actions).all():
            episode = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
            raise DataError(f"actions: that of episode {episode} holds NaN or infinity")
        over = self.over
        for episode, (world, action) in enumerate(zip(self._worlds, actions.clip(-1, 1))):
            if not over[episode]:
                state, _, _, _, info = world.step(action)
                self._states[episode] = state
                self._success[episode] = bool(info["success"])
        self._steps += 1
        return self._seen()

    def expert(self) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # its actions are clipped, as it says
            chosen = [p.get_action(s) for p, s in zip(self._policies, self._states)]
        return np.stack(chosen).clip(-1, 1).astype(np.float32)

    def _seen(self) -> Array:
        return self._states[:, None].astype(np.float32)

    @property
    def success(self) -> Array:
        return self._success

    @property
    def over(self) -> Array:
        over: Array = self._success | (self._steps >= self.limit)
        return over

    @property
    def way(self) -> Array:
        return np.full(len(self._worlds), -1)

    @property
    def places(self) -> Array:
        """Of the hand."""
        return self._states[:, :2].astype(np.float32)

    @property
    def targets(self) -> Array:
        return self._states[:, -3:-1].astype(np.float32)


@SOURCES.register
class MetaworldConfig(SourceConfig):
    """Demonstrations of Meta-World's scripted experts.

    The first build runs the simulator: about a second for each two episodes.
    """

    kind: Literal["metaworld"] = "metaworld"
    tasks: tuple[str, ...] = Field(
        default=("reach-v3", "push-v3", "drawer-open-v3", "button-press-topdown-v3"), min_length=1
    )
    """names of Meta-World tasks"""
    episodes: int = Field(default=50, ge=4, le=100_000)
    """training episodes per task; a quarter as many are held out"""
    horizon: int = Field(default=8, ge=1, le=64)  # actions per chunk
    stride: int = Field(default=1, ge=1)  # steps between the starts of chunks
    limit: int = Field(default=150, ge=1, le=500)  # most steps of an episode
    jitter: float = Field(default=0.1, ge=0, le=1)
    """standard deviation of noise on the expert's actions"""
    seed: Seed = 0  # of the episodes
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Robot arm in MuJoCo: Meta-World with its scripted experts; needs coterie[robots]",
        modality="action",
        shape="horizon x 4",
        count="any (50 + 12 episodes per task, about 60 moments each)",
        licence="MIT (Meta-World); demonstrations are computed",
    )

    @model_validator(mode="after")
    def _different(self) -> MetaworldConfig:
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(describe("tasks", self.tasks, "different tasks"))
        return self

    def build(self, split: Split = "train") -> ActionSource:
        """ConfigError without Meta-World, or for a task that it does not have."""
        _, known = metaworld_parts()
        for task in self.tasks:
            if task not in known:
                raise ConfigError(describe("tasks", task, ", ".join(sorted(known))))
        each = self.episodes if split == "train" else self.episodes // 4
        return ActionSource(
            self.kind,
            _episodes(self.tasks, self.limit, self.seed, split, each, self.jitter),
            self.horizon,
            goal_names=self.tasks,
            rest=np.zeros(ACTION, np.float32),
            licence=self.info.licence,
            make_simulator=lambda: MetaworldSimulator(self.tasks, self.limit),
            stride=self.stride,
        )


@lru_cache(maxsize=4)
def _episodes(
    tasks: tuple[str, ...], limit: int, seed: int, split: Split, each: int, jitter: float
) -> Demonstrations:
    """``each`` episodes of every task in which its expert succeeds, the tasks in turn."""
    simulator, rng = MetaworldSimulator(tasks, limit), numpy_generator(seed, "metaworld", split)
    kept: list[list[Demonstrations]] = [[] for _ in tasks]
    tried = 0
    while min(map(len, kept)) < each:
        goals = np.array(
            [g for g, made in enumerate(kept) for _ in range(each - len(made))][:BLOCK]
        )
        seeds = [derive(seed, "metaworld", split, tried + index) for index in range(len(goals))]
        tried += len(goals)
        noise = jitter * rng.standard_normal((limit, len(goals), ACTION))
        made, success = demonstrate(simulator, goals, seeds, noise)
        for episode in np.flatnonzero(success):
            kept[goals[episode]].append(made.take(np.array([episode])))
        if tried > 4 * each * len(tasks) + BLOCK:
            worst = tasks[int(np.argmin([len(made) for made in kept]))]
            hint = "the expert fails too often; raise limit, lower jitter"
            raise DataError(describe("tasks", worst, "tasks that can be shown", hint))
    chosen = [made[index] for index in range(each) for made in kept]
    return Demonstrations(
        np.concatenate([made.observations for made in chosen]),
        np.concatenate([made.actions for made in chosen]),
        np.concatenate([made.lengths for made in chosen]),
        np.concatenate([made.goals for made in chosen]),
    )
