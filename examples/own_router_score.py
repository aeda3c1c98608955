"""A router score of your own: register it, name it in a configuration, train it.

A score maps rows [R, D] to one logit per expert [R, E]. This one measures how far a row is from a
learned centre of each expert; the nearest experts serve the row.

    python examples/own_router_score.py --steps 200
"""

import argparse
from typing import Literal

import torch
from torch import Generator, Tensor, nn

import coterie
from coterie.core.context import Context
from coterie.experts.routers.base import SCORES, Scored, ScoreModule, ScorePart
from coterie.runs.measure.evaluation import held_out


@SCORES.register
class DistanceScore(ScorePart):
    """``logits = -|x - c_e|^2 / sqrt(D)`` with a learned centre c_e of each expert."""

    kind: Literal["distance"] = "distance"
    init_std: float = 0.5

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return Distance(self.init_std, width, num_experts)


class Distance(ScoreModule):
    def __init__(self, std: float, width: int, num_experts: int) -> None:
        super().__init__()
        self.std = std
        self.centres = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        return Scored(-torch.cdist(x, self.centres.float()).square() / x.shape[1] ** 0.5)

    def reset_parameters(self, rng: Generator | None) -> None:
        nn.init.normal_(self.centres, std=self.std, generator=rng)


def configuration(score: str, steps: int) -> coterie.RunConfig:
    expert = {"num_experts": 8, "router": {"score": score}, "balance": ["switch"]}
    trunk = {"width": 64, "depth": 2, "heads": 4, "slots": [{"slot": "ffn", "expert": expert}]}
    backbone = {"kind": "dit", "image_size": 8, "patch": 2, "trunk": trunk}
    train = {"steps": steps, "lr": 2e-3, "warmup": 20, "ema": 0.99}
    model = {"kind": "denoiser", "process": "rectified_flow", "backbone": backbone}
    return coterie.RunConfig.from_dict({"data": "digits", "model": model, "train": train})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of each run")
    parser.add_argument("--out", default="runs/own-score", help="folder of the two runs")
    given = parser.parse_args()
    for score in ("linear", "distance"):
        config = configuration(score, given.steps)
        run = coterie.load_run(coterie.start(config, f"{given.out}/{score}", progress=False))
        found = held_out(run)
        shares = found.trace.routers[0].counts.sum(0)
        shares = " ".join(f"{share:.2f}" for share in shares / shares.sum())
        print(f"{score:9s} held-out loss {found.loss:.3f}; load of the first layer: {shares}")


if __name__ == "__main__":
    main()
