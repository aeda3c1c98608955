"""Compose two denoisers: samples that both find likely.

The product of two densities is sampled with weighted particles. Added scores alone sample something
else, which is visible where the true answer is known: two Gaussians, whose product is a Gaussian.

    python examples/multiply_two_denoisers.py --systems 20
"""

import argparse

import torch

import coterie
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.ensembles import compose
from coterie.process import PROCESSES, ExactDenoiser, Mixture

PARTICLES = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=int, default=20, help="systems of 32 particles each")
    parser.add_argument("--steps", type=int, default=100, help="steps of the solver")
    given = parser.parse_args()

    process = PROCESSES.parse("vp_linear").build()
    means, stds = (-1.0, 1.5), (0.5, 0.8)
    experts = [
        ExactDenoiser(process, Mixture.gaussian(torch.tensor([mean]), std))
        for mean, std in zip(means, stds, strict=True)
    ]
    precision = [std**-2 for std in stds]
    mean = sum(p * m for p, m in zip(precision, means, strict=True)) / sum(precision)
    print(f"true product       mean {mean:.3f}  std {sum(precision) ** -0.5:.3f}")

    noise = SampleNoise(range(PARTICLES * given.systems))
    settings = {"grid": "lambda", "steps": given.steps, "noise": noise}
    for name, solver, corrector in (
        ("added scores", "ancestral", "none"),
        ("weighted particles", {"kind": "feynman_kac", "particles": PARTICLES}, "fkc"),
    ):
        both = compose(experts, [1.0, 1.0], corrector=corrector)
        start = both.initial((1,), noise)
        x = coterie.sample(both, start, Condition(), solver=solver, **settings)
        print(f"{name:18s} mean {x.mean():.3f}  std {x.std():.3f}")


if __name__ == "__main__":
    main()
