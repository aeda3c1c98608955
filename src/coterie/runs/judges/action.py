"""Evaluation of policies: held-out loss, and success in a simulator.

Where a source has no simulator, losses and chunks of actions are all there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import DenoiserLike
from coterie.core.rng import SampleNoise, derive
from coterie.data.actions.chunks import Simulator
from coterie.inspect.plots.paths import animate_paths, draw_paths
from coterie.metrics import success_rate
from coterie.runs.build import build_source
from coterie.runs.config import SampleConfig
from coterie.runs.judges.base import batches, judges
from coterie.runs.judges.noise import NoiseJudge
from coterie.runs.sample.caches import cached
from coterie.runs.sample.rollouts import (
    RolledOut,
    Rollouts,
    both_ways,
    demonstrator,
    policy,
    roll_out,
)
from coterie.runs.sample.sampling import (
    Samples,
    balanced_labels,
    chosen_labels,
    conditional,
    grid_image,
    guidance_of,
)
from coterie.solvers import guide, initial_noise, sample

SHOWN = 64  # episodes on the sheet
MOST = 500  # episodes behind a success rate
COMPARED = 32  # chunks in which the cache is compared
STARTS, REPEATS = 4, 8  # per goal, and from each: do both ways occur?


@judges("action")
class ActionJudge(NoiseJudge):
    """Success with Wilson's interval; ``floor`` is what the scripted demonstrator reaches."""

    def unit(self) -> str:
        return "weighted mean squared error"

    def at(self, batch: Batch, unit: float, seed: torch.Generator) -> tuple[torch.Tensor, Any]:
        """The error as training weighs it: at every noise level on the same scale."""
        error, prediction = super().at(batch, unit, seed)
        process = self.run.model.process
        t = process.time_of_unit(torch.full((len(batch.ids),), unit))
        return self.objective.weighting(t, prediction.view) * error, prediction

    @property
    def simulator(self) -> Simulator | None:
        """A new one; None where the source has none."""
        make = getattr(self.run.source, "make_simulator", None)
        return None if make is None else make()

    def settings(self, options: dict[str, Any]) -> SampleConfig:
        """How the run samples, with what was asked for otherwise."""
        settings = self.run.config.sample
        guidance = guidance_of(self.run, options.get("guidance"))
        return settings.replace(guidance=guidance, steps=options.get("steps") or settings.steps)

    def denoiser(self, settings: SampleConfig, use_cache: bool = False) -> DenoiserLike:
        """The run's model as it is asked in an episode; ``use_cache``: with its exact caches."""
        run = cached(self.run, settings.steps)[0] if use_cache else self.run
        return guide(run.model, settings.guidance) if conditional(run) else run.model

    def draw(self, num: int, **options: Any) -> Samples:
        """``num`` episodes, goals in turn; chunks for held-out moments without a simulator.

        Episode i depends on (seed, i), its goal and the model only. ``cached``: see ``denoiser``.
        """
        if num < 1:
            raise ConfigError(describe("num", num, "1 or more"))
        given, seed = options.get("labels"), options.get("seed", 0)
        if given is None:
            labels = balanced_labels(self.run, num)
        else:
            labels = chosen_labels(self.run, given, num)
        seeds = [derive(seed, "sample", index) for index in range(num)]
        simulator = self.simulator
        if simulator is None:
            return self._chunks(labels, seeds, options)
        rolled = self.rolled(simulator, labels, seeds, seeds, options)
        return RolledOut(torch.from_numpy(rolled.paths), labels, seeds, rolled)

    def rolled(
        self,
        simulator: Simulator,
        labels: torch.Tensor,
        starts: list[int],
        seeds: list[int],
        options: dict[str, Any],
    ) -> Rollouts:
        """Episodes from the starts of ``starts``, with the policy's noise of ``seeds``."""
        settings = self.settings(options)
        plan = policy(
            self.denoiser(settings, options.get("cached", False)),
            settings,
            self.run.source.shape,
            labels if conditional(self.run) else None,
            seeds,
            options.get("callback"),
        )
        goals = labels.clamp_min(0).numpy()
        return roll_out(simulator, plan, goals, starts, options.get("progress"))

    def _moments(self, num: int) -> Batch:
        source = build_source(self.run.config, "held_out")
        return batches(source, num, num)[0]

    def _chunks(self, labels: torch.Tensor, seeds: list[int], options: dict[str, Any]) -> Samples:
        """For what was seen at held-out moments: at most as many as there are."""
        batch, settings = self._moments(len(seeds)), self.settings(options)
        count = len(batch.ids)
        noise, process = SampleNoise(seeds[:count]), self.run.model.process
        asked = labels[:count] if conditional(self.run) else None
        x = sample(
            self.denoiser(settings, options.get("cached", False)),
            initial_noise(process, self.run.source.shape, noise),
            batch.cond.replace(label=asked),
            solver=settings.solver,
            grid=settings.grid,
            steps=settings.steps,
            noise=noise,
            callback=options.get("callback"),
        )
        return Samples(x, labels[:count], seeds[:count])

    def scores(self, num: int) -> dict[str, Any]:
        """``success`` (with ``success_low`` and ``_high``) over at most ``MOST`` episodes; what the
        expert cache saves, where the model can have one."""
        out = self._cache_scores()
        simulator = self.simulator
        if simulator is None:
            return out
        count = min(num, MOST)
        labels = balanced_labels(self.run, count)
        starts = [derive(0, "episode", index) for index in range(count)]
        rolled = self.rolled(simulator, labels, starts, starts, {})
        shown = roll_out(simulator, demonstrator(simulator), rolled.goals, starts)
        found = success_rate(int(rolled.success.sum()), count)
        out |= {
            "success": {"value": found.rate, "floor": float(shown.success.mean())},
            "success_low": found.low,
            "success_high": found.high,
            "steps_to_goal": {"value": _mean_steps(rolled), "floor": _mean_steps(shown)},
        }
        return out | (self._coverage(simulator) if len(simulator.ways) > 1 else {})

    def _coverage(self, simulator: Simulator) -> dict[str, Any]:
        """Whether a policy that could go either way does, from one and the same start."""
        goals = max(1, self.run.source.num_classes)
        labels = torch.arange(goals).repeat_interleave(STARTS * REPEATS)
        places = [derive(0, "start", index // REPEATS) for index in range(len(labels))]
        seeds = [derive(0, "again", index) for index in range(len(labels))]
        rolled = self.rolled(simulator, labels, places, seeds, {})
        return {"mode_coverage": both_ways(rolled, REPEATS)}

    def _cache_scores(self) -> dict[str, Any]:
        """FLOPs of one call for one sample: with all experts at work, with the chosen ones, with
        the cache; and how far cached actions are from the others. {} for a model whose experts
        cannot be folded, because its routers see more than the noise."""
        try:
            _, found = cached(self.run, caches=("routing",))
        except ConfigError:
            return {}
        seeds = [derive(0, "cache", index) for index in range(COMPARED)]
        labels = balanced_labels(self.run, COMPARED)
        plain, kept = (self._chunks(labels, seeds, {"cached": c}).x for c in (False, True))
        return {
            "flops_per_call": found.flops_without,
            "all_experts_flops_per_call": found.flops_all_experts,
            "cached_flops_per_call": found.flops_with,
            "cache_difference": float((plain - kept).abs().max()),
        }

    def show(self, samples: Samples) -> np.ndarray | None:
        """Paths in the plane, one picture per episode."""
        if not isinstance(samples, RolledOut):
            return None
        found = samples.rollouts
        return draw_paths(found.paths, found.targets, found.success, found.steps, found.scene)

    def write(self, samples: Samples, entries: list[dict[str, Any]], folder: Path) -> Path:
        """Paths (or chunks) in one array; pictures on a sheet, and an animation."""
        path = super().write(samples, entries, folder)
        if not isinstance(samples, RolledOut):
            return path
        found = samples.rollouts
        for index, entry in enumerate(entries):
            entry["success"] = bool(found.success[index])
            entry["steps"] = int(found.steps[index])
            way = int(found.way[index])
            entry["way"] = found.ways[way] if way >= 0 else None
        animate_paths(
            found.paths, found.targets, found.success, found.steps, found.scene,
            folder / "rollouts.gif",
        )  # fmt: skip
        pictures = self.show(samples)
        assert pictures is not None
        sheet = folder / "grid.png"
        grid_image(pictures[:SHOWN], 8, scale=1).save(sheet)
        return sheet


def _mean_steps(rolled: Rollouts) -> float:
    """Of successful episodes; NaN without any."""
    good = rolled.steps[rolled.success]
    return float(good.mean()) if len(good) else float("nan")
