"""Compare solvers and guidance where the exact denoiser is known, so that only they are measured.

The data are eight Gaussians on a ring, one per class. The exact denoiser needs no training: what is
left of the Wasserstein distance to the data is the error of the solver.

    python examples/compare_solvers_and_guidance.py --num 500
"""

import argparse
import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import coterie
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.process import PROCESSES, ExactDenoiser, Mixture, Process
from coterie.solvers import SOLVERS, initial_noise

ANGLES = torch.arange(8) * (math.pi / 4)
MIDDLES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
RING = Mixture(MIDDLES, torch.full((8,), 0.2), torch.full((8,), 1 / 8))


class OfClass:
    """Exact for the class of each sample, and for the whole ring where the label is -1."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.whole = ExactDenoiser(process, RING)

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        each = RING.component_denoised(self.process, x, t)  # [B, 8, 2]
        own = each[torch.arange(len(x)), cond.label.clamp_min(0)]
        plain = self.whole(x, t, cond).value
        return Prediction(torch.where(cond.label[:, None] < 0, plain, own), "x0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500, help="samples of each row")
    given = parser.parse_args()
    process = PROCESSES.parse("rectified_flow").build()
    noise = SampleNoise(range(given.num))
    start = initial_noise(process, (2,), noise)
    real, _ = RING.sample(given.num, torch.Generator().manual_seed(0))

    print("solver    steps calls distance to the data")
    for kind in ("euler", "heun", "ddim", "dpmpp_2m", "ancestral"):
        for steps in (5, 10, 20):
            options = {"solver": kind, "grid": "uniform", "steps": steps, "noise": noise}
            x = coterie.sample(ExactDenoiser(process, RING), start, Condition(), **options)
            gap = torch.cdist(x, real)
            distance = gap[linear_sum_assignment(gap)].mean()
            calls = SOLVERS.parse(kind).evaluations(steps)
            print(f"{kind:9s} {steps:5d} {calls:5d} {distance:.3f}")

    print("guidance  samples moved outwards by; spread")
    labels = torch.arange(given.num) % 8
    for weight in (1.0, 2.0, 4.0):
        guided = coterie.guide(OfClass(process), coterie.GuidanceConfig(weight=weight))
        options = {"solver": "heun", "grid": "uniform", "steps": 20}
        x = coterie.sample(guided, start, Condition(label=labels), **options) - MIDDLES[labels]
        outwards = (x * MIDDLES[labels]).sum(1).mean()
        print(f"{weight:8.1f}  {outwards:.3f}  {x.std():.3f}")


if __name__ == "__main__":
    main()
