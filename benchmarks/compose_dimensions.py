"""Why weighted particles help little, or harm, in many dimensions: exact products of Gaussians.

``python benchmarks/compose_dimensions.py [--json] [--quick]``. N(-0.3, 0.6^2 I) times N(0.3, 0.4^2
I) in d dimensions, from exact experts and from experts with a fixed error of their eps. Summed
scores against weighted particles, both narrowed by finite steps: Frechet distance to the exact
product over 5 systems, variance over the true one (of all samples, and inside a system), and the
share of first particles that have descendants. A minute on one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from coterie.bench.timing import Place, stamp
from coterie.core.folder import write_text
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import derive, generator
from coterie.ensembles.product import compose
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import GRIDS, SOLVERS, FeynmanKac, integrate

PROCESS = PROCESSES.parse("cosine").build()
LAWS = ((-0.3, 0.6), (0.3, 0.4))
VARIANCE = 1.0 / sum(std**-2 for _, std in LAWS)
MEAN = VARIANCE * sum(mean * std**-2 for mean, std in LAWS)
SYSTEMS = 5


class Streams:
    """Noise of all systems from one generator; a seed per particle for resampling."""

    def __init__(self, seed: int, count: int) -> None:
        self.seeds = [derive(seed, "particle", index) for index in range(count)]
        self._rng = generator(seed, "noise")

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(len(self), *shape, generator=self._rng)


class Mistaken:
    """An expert whose eps is off by ``error`` sin(3 W x), always the same."""

    def __init__(self, exact: ExactDenoiser, error: float, seed: int, dims: int) -> None:
        self.exact, self.process, self.view, self.error = exact, PROCESS, "eps", error
        rng = generator(seed, "mistake")
        self.weight = torch.randn(dims, dims, generator=rng) / dims**0.5

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        value = self.exact(x, t, cond).value
        return Prediction(value + self.error * torch.sin(3.0 * x @ self.weight.T), "eps")


def one(
    dims: int, particles: int, steps: int, error: float, corrector: str, seed: int
) -> dict[str, float]:
    exact = [
        ExactDenoiser(PROCESS, Mixture.gaussian(torch.full((dims,), mean), std), "eps")
        for mean, std in LAWS
    ]
    experts = [Mistaken(expert, error, index, dims) for index, expert in enumerate(exact)]
    made = compose(experts, corrector=corrector)
    noise: Any = Streams(seed, SYSTEMS * particles)
    solver = SOLVERS.parse({"kind": "feynman_kac", "particles": particles}).build()
    assert isinstance(solver, FeynmanKac)
    times = GRIDS.parse("lambda").build(made.process, steps)
    with torch.no_grad():
        x = integrate(made, made.initial((dims,), noise), Condition(), times, solver, noise)
    x = x.double()
    off = float((x.mean(0) - MEAN).square().sum())
    stds = torch.linalg.eigvalsh(torch.cov(x.T).reshape(dims, dims)).clamp_min(0.0).sqrt()
    inside = x.reshape(SYSTEMS, particles, dims).var(1).mean()
    return {
        "frechet": off + float((stds - VARIANCE**0.5).square().sum()),
        "variance": float(x.var(0).mean()) / VARIANCE,
        "variance_inside": float(inside) / VARIANCE,
        "lineages": solver.record.summary()["ancestors"],
    }


def table(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for dims, steps, error in (
        *((dims, 40, 0.0) for dims in (1, 4, 16, 64)),
        *((1, steps, 0.0) for steps in (160, 640)),
        *((64, 160, error) for error in (0.0, 0.1, 0.3)),
    ):
        for corrector in ("none", "fkc"):
            seeds = range(1 if quick else 3)
            found = [one(dims, 50, steps, error, corrector, seed) for seed in seeds]
            means = {name: round(fmean(row[name] for row in found), 4) for name in found[0]}
            method = "particles" if corrector == "fkc" else "summed scores"
            rows.append({"dims": dims, "steps": steps, "error": error, "method": method, **means})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--out", type=Path, default=Path("results/bench/compose-dimensions.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = table(options.quick)
    result = {**stamp("compose-dimensions", Place(), 1), "particles": 50, "rows": rows}
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
