"""A data source of your own: register it, name it in a configuration, train on it.

A source is a finite set of samples with two splits. Here: pictures of one filled circle, whose
class says where its middle lies.

    python examples/own_data_source.py --steps 300
"""

import argparse
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

import coterie
from coterie.data import SOURCES, ArraySource, SourceConfig, SourceInfo, Split
from coterie.runs.measure.evaluation import held_out


@SOURCES.register
class CirclesConfig(SourceConfig):
    """Circles of ``radius`` pixels in pictures of 12 x 12; class 0 left, class 1 right."""

    kind: Literal["circles"] = "circles"
    radius: float = Field(default=2.5, gt=0, le=5)
    info: ClassVar[SourceInfo] = SourceInfo(
        "filled circles", "image", "1 x 12 x 12", "2000 + 500", "none needed: generated"
    )

    def build(self, split: Split = "train") -> ArraySource:
        """Values lie in [-1, 1]; the two splits are drawn from different seeds."""
        count, seed = (2000, 0) if split == "train" else (500, 1)
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, count)
        middle_x = rng.uniform(2, 5, count) + 4 * labels
        middle_y = rng.uniform(3, 9, count)
        rows, columns = np.mgrid[:12, :12]
        across = columns - middle_x[:, None, None]
        down = rows - middle_y[:, None, None]
        distance = np.sqrt(across**2 + down**2)
        pictures = np.clip(2 * (self.radius - distance), -1, 1).astype(np.float32)[:, None]
        return ArraySource(
            self.kind,
            "image",
            pictures,
            shape=(1, 12, 12),
            licence=self.info.licence,
            labels=labels,
            class_names=("left", "right"),
        )


SLOTS = [{"slot": "ffn", "expert": {"num_experts": 4, "balance": ["switch"]}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--out", default="runs/circles", help="run directory")
    given = parser.parse_args()
    trunk = {"width": 64, "depth": 2, "heads": 4, "slots": SLOTS}
    sizes = {"image_size": 12, "patch": 3, "num_classes": 2, "trunk": trunk}
    model = {"kind": "denoiser", "process": "rectified_flow", "backbone": {"kind": "dit", **sizes}}
    train = {"steps": given.steps, "lr": 2e-3, "warmup": 20, "ema": 0.99}
    data = {"kind": "circles", "radius": 2.0}
    config = coterie.RunConfig.from_dict({"data": data, "model": model, "train": train})
    run = coterie.load_run(coterie.start(config, given.out, progress=False))
    print(f"step {run.step}, held-out loss {held_out(run).loss:.3f}")
    print(f"samples: {coterie.sample_run(run, num=16, labels=[0, 1])}")


if __name__ == "__main__":
    main()
