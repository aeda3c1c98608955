"""Two denoisers joined by noise range: one answers above t = 0.5, the other below.

A base is trained, then two copies go on, each on its half of the noise levels, and the base goes on
for as many steps as one of them. The pair costs one network per step, as the base does.

    python examples/join_two_noise_ranges.py --steps 200
"""

import argparse
import dataclasses

import coterie
from coterie.ensembles import NoiseRangesConfig
from coterie.runs.measure.evaluation import held_out


def trained(out: str, steps: int, low: float, high: float, base: str | None) -> str:
    """A dense DiT on digits, trained where low <= t < high; returns its run directory."""
    trunk = {"width": 64, "depth": 2, "heads": 4}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": trunk}
    times = {"kind": "within", "times": "logit_normal", "low": low, "high": high}
    config = {
        "data": "digits",
        "model": {"kind": "denoiser", "process": "rectified_flow", "backbone": backbone},
        "objective": {"kind": "denoising", "times": times},
        "train": {"steps": steps, "lr": 2e-3, "warmup": 20, "ema": 0.99},
        "sample": {"solver": "heun", "steps": 12, "guidance": {"weight": 2.0}},
        "init": base and {"path": base},
    }
    return str(coterie.start(coterie.RunConfig.from_dict(config), out, progress=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each network")
    parser.add_argument("--out", default="runs/ranges", help="folder of the four runs")
    given = parser.parse_args()
    steps, out = given.steps, given.out
    base = trained(f"{out}/base", steps, 0.0, 1.0, None)
    longer = trained(f"{out}/longer", steps, 0.0, 1.0, base)
    noisy = trained(f"{out}/noisy", steps, 0.5, 1.0, base)
    clean = trained(f"{out}/clean", steps, 0.0, 0.5, base)

    members = {"noisy": coterie.load_run(noisy).model, "clean": coterie.load_run(clean).model}
    pair = NoiseRangesConfig(boundaries=(0.5,)).build(members)
    run = coterie.load_run(longer)
    print(f"held-out loss of the base, trained as long   {held_out(run).loss:.4f}")
    joined = dataclasses.replace(run, model=pair)
    print(f"held-out loss of the pair                    {held_out(joined).loss:.4f}")
    print(f"samples of the pair: {coterie.sample_run(joined, num=20, out=f'{out}/samples')}")


if __name__ == "__main__":
    main()
