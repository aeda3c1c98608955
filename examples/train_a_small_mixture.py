"""Train a small mixture of experts on 8 x 8 digits, and sample it.

python examples/train_a_small_mixture.py --steps 400 --out runs/first
"""

import argparse

import coterie
from coterie.runs.measure.evaluation import held_out


def configuration(steps: int) -> coterie.RunConfig:
    """A DiT of 3 blocks and 16 tokens; each feed-forward network is 8 experts, of which 2 serve."""
    expert = {
        "num_experts": 8,
        "experts": {"kind": "swiglu", "ratio": 1.0},
        "router": {"select": {"kind": "top_k", "k": 2}},
        "balance": ["switch"],
    }
    trunk = {"width": 64, "depth": 3, "heads": 4, "slots": [{"slot": "ffn", "expert": expert}]}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": trunk}
    return coterie.RunConfig.from_dict(
        {
            "data": "digits",
            "model": {"kind": "denoiser", "process": "rectified_flow", "backbone": backbone},
            "objective": {"kind": "denoising", "times": "logit_normal"},
            "train": {"steps": steps, "batch": 64, "lr": 2e-3, "warmup": 20, "ema": 0.99},
            "sample": {"solver": "heun", "steps": 12, "guidance": {"weight": 2.0}},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps")
    parser.add_argument(
        "--out", default="runs/first", help="run directory; it resumes if it exists"
    )
    parser.add_argument("--num", type=int, default=40, help="samples to draw")
    given = parser.parse_args()

    run = coterie.load_run(coterie.start(configuration(given.steps), given.out, progress=False))
    print(f"step {run.step}, held-out loss {held_out(run).loss:.3f}")
    picture = coterie.sample_run(run, num=given.num, labels=range(10))
    print(f"samples: {picture}")


if __name__ == "__main__":
    main()
