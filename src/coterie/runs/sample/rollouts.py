"""Roll-outs: a policy acts in simulated episodes, in parallel, each with its own seed.

A chunk of actions is sampled from the current observation and carried out without new observations;
then the next one is sampled (open loop within a chunk, closed loop between chunks). Legend: E
episodes, T actions of a chunk, A values of one, S steps until the last episode is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition, DenoiserLike
from coterie.core.rng import SampleNoise, derive
from coterie.data.actions.chunks import KEPT, Scene, Simulator
from coterie.runs.config import SampleConfig
from coterie.runs.sample.sampling import Samples
from coterie.solvers import initial_noise, sample

Plan = Callable[[np.ndarray, int], np.ndarray]
"""(observations f32 [E, M, C], number of the chunk) -> actions f32 [E, T, A]."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What happened in E episodes. ``paths``: places f32 [E, S + 1, 2], the last one repeated after
    an episode is over; ``steps`` i64 [E] until then; ``way`` i64 [E], -1 = none taken."""

    goals: np.ndarray
    seeds: list[int]
    paths: np.ndarray
    targets: np.ndarray  # f32 [E, 2]
    success: np.ndarray  # bool [E]
    steps: np.ndarray
    way: np.ndarray
    chunks: int  # plans that were made for the longest episode
    ways: tuple[str, ...]
    scene: Scene


@dataclass(frozen=True)
class RolledOut(Samples):
    """Samples of a policy: ``x`` are the paths, f32 [E, S + 1, 2]."""

    rollouts: Rollouts


def policy(
    denoiser: DenoiserLike,
    settings: SampleConfig,
    shape: Sequence[int],
    goals: Tensor | None,
    seeds: Sequence[int],
    callback: Callable[..., None] | None = None,
) -> Plan:
    """Plans chunks of ``shape`` (T, A): any denoiser, guided or cached ones too.

    ``goals`` i64 [E], None for a policy without goals. The noise of episode i's n-th chunk depends
    on (seed i, n) alone. ``callback`` follows the first chunk.
    """

    def plan(seen: np.ndarray, number: int) -> np.ndarray:
        noise = SampleNoise([derive(seed, "chunk", number) for seed in seeds])
        actions = sample(
            denoiser,
            initial_noise(denoiser.process, shape, noise),
            Condition(label=goals, tokens=torch.from_numpy(seen), keep=KEPT),
            solver=settings.solver,
            grid=settings.grid,
            steps=settings.steps,
            noise=noise,
            callback=callback if number == 0 else None,
        )
        chosen: np.ndarray = actions.float().cpu().numpy()
        return chosen

    return plan


def demonstrator(simulator: Simulator) -> Plan:
    """The simulator's scripted policy, which observes at every step: plans of one action."""
    return lambda seen, number: simulator.expert()[:, None]


def roll_out(
    simulator: Simulator,
    plan: Plan,
    goals: Sequence[int] | np.ndarray,
    seeds: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> Rollouts:
    """E episodes from the starts of ``seeds``. DataError where a plan is not finite."""
    goals = np.asarray(goals, dtype=np.int64)
    if len(goals) != len(seeds) or not len(goals):
        raise ConfigError(describe("seeds", len(seeds), f"{len(goals)}, one per goal, at least 1"))
    seen = simulator.reset(goals, seeds)
    places, steps, chunks = [simulator.places], np.zeros(len(goals), np.int64), 0
    while not simulator.over.all():
        actions = plan(seen, chunks)
        _check(actions, chunks)
        chunks += 1
        for number in range(actions.shape[1]):
            steps += ~simulator.over
            before = simulator.over.sum()
            seen = simulator.step(actions[:, number])
            places.append(simulator.places)
            if progress is not None:
                progress(int(simulator.over.sum() - before))
            if simulator.over.all():
                break
    return Rollouts(
        goals,
        list(seeds),
        np.stack(places, axis=1),
        simulator.targets,
        simulator.success.copy(),
        steps,
        simulator.way.copy(),
        chunks,
        simulator.ways,
        simulator.scene,
    )


def _check(actions: np.ndarray, number: int) -> None:
    bad = ~np.isfinite(actions).all(axis=(1, 2))
    if bad.any():
        episode = int(np.flatnonzero(bad)[0])
        raise DataError(f"chunk {number} of episode {episode}: holds NaN or infinity")


def both_ways(rolled: Rollouts, repeats: int) -> float:
    """Share of starting points from which more than one way was taken in successful episodes;
    ``repeats`` consecutive episodes share one."""
    taken = np.where(rolled.success, rolled.way, -1).reshape(-1, repeats)
    found = [len(set(row[row >= 0].tolist())) > 1 for row in taken]
    return float(np.mean(found))
