"""What weighted particles are worth on mixtures whose composition is known, and what they cost.

``python benchmarks/compose.py [--json] [--quick]``. Table: total variation on 80 bins of [-8, 8]
between samples and the exact power, product or guided density, summed scores against weighted
particles at equal network calls, five seeds, means with 95 % intervals. Cost: composing M networks
over M bare calls, and resampling over a whole step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.folder import write_text
from coterie.core.machine import commit, hardware
from coterie.core.prediction import Condition
from coterie.core.rng import derive, generator
from coterie.denoiser import DenoiserConfig
from coterie.ensembles.product import Composition, compose
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import GRIDS, SOLVERS, FeynmanKac, Query, SolverState, integrate
from coterie.solvers.resampling import resample

F64 = torch.float64
VP = PROCESSES.parse("vp_linear").build()
STUDENT = 2.776  # 97.5 % of Student's t with 4 degrees of freedom


def mixture(weights: list[float], means: list[float], stds: list[float]) -> Mixture:
    return Mixture(*(torch.tensor(v, dtype=F64) for v in ([[m] for m in means], stds, weights)))


A = mixture([0.5, 0.5], [-2.0, 2.0], [0.5, 1.0])
B = mixture([0.7, 0.3], [-1.0, 2.5], [0.8, 0.8])
C = mixture([0.5, 0.5], [-1.5, 1.5], [0.7, 0.7])
D = mixture([0.2, 0.8], [-1.5, 1.5], [0.7, 0.7])
CASES: dict[str, tuple[list[Mixture], tuple[float, ...]]] = {
    "A^2": ([A], (2.0,)),
    "A B": ([A, B], (1.0, 1.0)),
    "C^-3 D^4 (guidance 4)": ([C, D], (-3.0, 4.0)),
}
METHODS: dict[str, Any] = {
    "summed scores": "ancestral",
    "weights, no resampling": {"kind": "feynman_kac", "ess": 1e-9},
    "particles, ESS < K/2": {"kind": "feynman_kac"},
    "particles, every step": {"kind": "feynman_kac", "ess": 1.0},
}


class OneStream:
    """Noise of many particles from one generator: fast, and enough for one system."""

    def __init__(self, seed: int, count: int) -> None:
        self.seeds, self._rng = [derive(seed, "system")] * count, generator(seed, "noise")

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(len(self), *shape, generator=self._rng)


def distance(x: Tensor, parts: list[Mixture], betas: tuple[float, ...]) -> float:
    edges = torch.linspace(-8, 8, 80 * 50 + 1, dtype=F64)
    middle = 0.5 * (edges[1:] + edges[:-1])[:, None]
    clean = torch.full((len(middle),), 1e-6, dtype=F64)
    logs = [beta * part.log_prob(VP, middle, clean) for part, beta in zip(parts, betas)]
    wanted = torch.stack(logs).sum(0).exp().reshape(80, 50).sum(1)
    found = torch.histc(x.double(), 80, -8, 8) / len(x)
    return float((found - wanted / wanted.sum()).abs().sum() / 2)


def one(case: str, method: str, seed: int, particles: int, steps: int) -> float:
    parts, betas = CASES[case]
    corrector = "none" if method == "summed scores" else "fkc"
    made = compose([ExactDenoiser(VP, part, "eps") for part in parts], betas, corrector=corrector)
    noise: Any = OneStream(seed, particles)
    times = GRIDS.parse("uniform").build(VP, steps)
    solver = SOLVERS.parse(METHODS[method]).build()
    with torch.no_grad():
        x = integrate(made, made.initial((1,), noise), Condition(), times, solver, noise)
    return distance(x, parts, betas)


def table(particles: int, steps: int, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        for method in METHODS:
            found = [one(case, method, seed, particles, steps) for seed in range(seeds)]
            half = STUDENT * statistics.stdev(found) / math.sqrt(seeds) if seeds > 1 else 0.0
            rows.append(
                {
                    "target": case,
                    "method": method,
                    "tv": statistics.fmean(found),
                    "tv_low": statistics.fmean(found) - half,
                    "tv_high": statistics.fmean(found) + half,
                    "particles": particles,
                    "calls": steps * len(CASES[case][0]),
                    "seeds": seeds,
                }
            )
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether resampled particles are under half of summed scores, intervals apart."""
    found = {(row["target"], row["method"]): row for row in rows}
    out = {}
    for case in CASES:
        plain, ours = found[case, "summed scores"], found[case, "particles, ESS < K/2"]
        out[case] = ours["tv"] < 0.5 * plain["tv"] and ours["tv_high"] < plain["tv_low"]
    return out


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds of a call."""
    call()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def cost(rounds: int, experts: int = 2, batch: int = 64) -> dict[str, float]:
    """One step of M small transformers on 28 x 28 pictures, one system of ``batch`` particles."""
    trunk = TrunkConfig(width=64, depth=4, heads=4)
    config = DenoiserConfig(backbone=DiTConfig(trunk=trunk, num_classes=0), process="cosine")
    networks = [config.build().eval() for _ in range(experts)]
    made: Composition = compose(networks, mode="average")
    x, noise = torch.randn(batch, 1, 28, 28), OneStream(0, batch)
    t, u = (torch.tensor(value, dtype=F64) for value in (0.5, 0.45))
    rows = torch.full((batch,), 0.5)
    solver = SOLVERS.parse({"kind": "feynman_kac", "ess": 1.0}).build()
    assert isinstance(solver, FeynmanKac)
    log = torch.randn(1, batch, dtype=F64)
    with torch.no_grad():
        bare = timed(lambda: [one(x, rows, Condition()) for one in networks], rounds)
        whole = timed(lambda: made(x, rows, Condition()), rounds)
        query = Query(made, Condition())

        def step() -> Any:
            return solver.step(query, query(x, t), u, SolverState(), noise)  # type: ignore[arg-type]

        full = timed(step, rounds)
        drawn = timed(
            lambda: x[resample(log, "systematic", [generator(0, "rows")]).reshape(-1)], rounds
        )
    return {
        "experts": experts,
        "particles": batch,
        "bare_ms": 1e3 * bare,
        "composed_over_bare": whole / bare,
        "resampling_over_step": drawn / full,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="few particles, two seeds")
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("results/bench/compose.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = cost(5 if options.quick else 40)
    rows = table(1000, 60, 2) if options.quick else table(options.particles, options.steps, 5)
    result = {
        "commit": commit(),
        "hardware": hardware(),
        "table": rows,
        "under_half_with_separate_intervals": verdicts(rows),
        "cost": costs,
    }
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        interval = f"[{row['tv_low']:.4f}, {row['tv_high']:.4f}]"
        print(f"{row['target']:<24}{row['method']:<26}{row['tv']:.4f}  {interval}")
    print(result["under_half_with_separate_intervals"])
    print(costs)


if __name__ == "__main__":
    main()
