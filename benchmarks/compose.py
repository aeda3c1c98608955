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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.bench.timing import Place, interleaved, milliseconds, ratio, ratios, spread, stamp
from coterie.core.folder import write_text
from coterie.core.prediction import Condition
from coterie.core.rng import derive, generator
from coterie.denoiser import DenoiserConfig
from coterie.ensembles.product import Composition, compose
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import GRIDS, SOLVERS, Query, SolverState, integrate
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


def cost(experts: int, mode: str, pixels: int, batch: int, rounds: int) -> dict[str, Any]:
    """A call and a step of M small transformers, one system of ``batch`` particles, beside the M
    bare networks. Pictures have ``pixels`` a side, in patches of 4 (of 2 below 16)."""
    trunk = TrunkConfig(width=64, depth=4, heads=4)
    patch = 4 if pixels >= 16 else 2
    backbone = DiTConfig(image_size=pixels, patch=patch, trunk=trunk, num_classes=0)
    config = DenoiserConfig(backbone=backbone, process="cosine")
    networks = [config.build().eval() for _ in range(experts)]
    made: Composition = compose(networks, mode=mode)
    x, noise = torch.randn(batch, 1, pixels, pixels), OneStream(0, batch)
    t, u = (torch.tensor(value, dtype=F64) for value in (0.5, 0.45))
    rows, log = torch.full((batch,), 0.5), torch.randn(1, batch, dtype=F64)
    solver = SOLVERS.parse({"kind": "feynman_kac", "ess": 1.0}).build()
    query = Query(made, Condition())
    calls: dict[str, Callable[[], Any]] = {
        "bare": lambda: [one(x, rows, Condition()) for one in networks],
        "composed": lambda: made(x, rows, Condition()),
        "step": lambda: solver.step(query, query(x, t), u, SolverState(), noise),  # type: ignore[arg-type]
        "resampling": lambda: x[resample(log, "systematic", [generator(0, "rows")]).reshape(-1)],
    }
    place = Place()
    with torch.no_grad(), place.entered():
        times = interleaved(calls, place, rounds)
    return {
        "experts": experts,
        "mode": mode,
        "pixels": pixels,
        "particles": batch,
        "bare_ms": milliseconds(times, "bare"),
        "composed_over_bare": ratio(times, "composed", ["bare"]),
        "spread": spread(ratios(times, "composed", ["bare"])),
        "resampling_over_step": ratio(times, "resampling", ["step"]),
    }


def costs(rounds: int) -> list[dict[str, Any]]:
    """Products and averages of two and four experts; a full system and a small one."""
    sizes = ((2, 28, 64), (4, 28, 64), (2, 8, 50), (2, 8, 8))
    return [
        cost(experts, mode, pixels, batch, rounds)
        for experts, pixels, batch in sizes
        for mode in ("average", "product")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="few particles, two seeds")
    parser.add_argument("--particles", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, default=Path("results/bench/compose.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent = costs(3 if options.quick else 11)
    rows = table(1000, 60, 2) if options.quick else table(options.particles, options.steps, 5)
    result = {
        **stamp("compose", Place(), 11),
        "table": rows,
        "under_half_with_separate_intervals": verdicts(rows),
        "cost": spent,
    }
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        interval = f"[{row['tv_low']:.4f}, {row['tv_high']:.4f}]"
        print(f"{row['target']:<24}{row['method']:<26}{row['tv']:.4f}  {interval}")
    print(result["under_half_with_separate_intervals"])
    for row in spent:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
