"""Sample with what is known beforehand worked out once: the same samples, in less time.

Where routers see the noise level alone, the experts of every step are known before sampling, and
become one dense network per step. What a network makes of noise level and label is a table.

    python examples/cache_exactly.py --num 4
"""

import argparse
import time

import torch

import coterie
from coterie.cache import applicable, cached
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.solvers import GRIDS, SOLVERS, asked_times, initial_noise


def denoiser() -> coterie.Denoiser:
    """A random DiT whose experts serve noise levels; 8 experts, 2 of them at each step."""
    router = {"score": "noise_level", "select": {"kind": "top_k", "k": 2}}
    expert = {"num_experts": 8, "experts": {"kind": "swiglu", "hidden": 256}, "router": router}
    trunk = {"width": 128, "depth": 4, "heads": 4, "slots": [{"slot": "ffn", "expert": expert}]}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": trunk}
    model = coterie.DenoiserConfig(backbone=backbone, process="rectified_flow").build().eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as after training: no gate of a block is zero any more
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=4, help="samples")
    parser.add_argument("--steps", type=int, default=20, help="steps of the solver")
    parser.add_argument("--repeats", type=int, default=5, help="timings, of which the best counts")
    given = parser.parse_args()
    model = denoiser()
    solver, grid = SOLVERS.parse("heun"), GRIDS.parse("uniform")
    folded = cached(model, asked_times(model.process, solver, grid, given.steps))
    print("caches that apply:", ", ".join(applicable(model)))

    start = initial_noise(model.process, (1, 8, 8), SampleNoise(range(given.num)))
    cond = Condition(label=torch.arange(given.num) % 10)
    made, best = {}, {}
    for _ in range(given.repeats):
        for name, network in (("plain", model), ("cached", folded)):
            begun = time.perf_counter()
            made[name] = coterie.sample(
                network, start, cond, solver=solver, grid=grid, steps=given.steps
            )
            best[name] = min(best.get(name, 1e9), time.perf_counter() - begun)
    print(f"largest difference of a pixel: {(made['plain'] - made['cached']).abs().max():.0e}")
    print(f"seconds: plain {best['plain']:.2f}, cached {best['cached']:.2f}")


if __name__ == "__main__":
    main()
