"""Draw samples of a mixture, and beside them the expert that each of their patches chose first.

    python examples/expert_map.py                   # of runs/demo, trained first if need be

The run is that of `coterie demo`: eight experts in each of four blocks, on handwritten digits.
"""

import argparse

import matplotlib
import numpy as np
import torch
from torch import Tensor

import coterie
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import LoadedRun

matplotlib.use("agg")
ROWS, LEVEL = 4, 0.2  # rows of pictures; noise when the model is asked, 0 to 1


@torch.no_grad()
def first_experts(run: LoadedRun, x: Tensor, label: Tensor, layer: int) -> Tensor:
    """i64 [B, h, w]: whom each patch of x [B, C, H, W] chooses first."""
    process = run.model.process
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = process.time_of_unit(torch.full((len(x),), LEVEL))
    answer = run.model(process.diffuse(x, noise, t), t, coterie.Condition(label=label))
    routing = next(one for one in answer.routings if one.layer == layer)
    return routing.ids[:, 0].view(len(x), *run.config.model.backbone.grid)


def sheet(pictures: np.ndarray) -> np.ndarray:
    """Pictures [B, H, W, colours] in rows, a white pixel between them."""
    framed = np.pad(pictures, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=1)
    return np.vstack([np.hstack(row) for row in np.split(framed, ROWS)])


def draw(grey: np.ndarray, first: np.ndarray, title: str, out: str) -> None:
    """``grey`` [B, H, W] in [0, 1]; ``first`` [B, h, w]: the expert of each patch."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    patch = grey.shape[-1] // first.shape[-1]
    colours = pyplot.get_cmap("tab10").colors[: first.max() + 1]
    tinted = np.array(colours)[first.repeat(patch, 1).repeat(patch, 2)]
    tinted *= 0.35 + 0.65 * grey[..., None]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 2.15), layout="constrained")
    shown = {"samples": grey[..., None].repeat(3, -1), title: tinted}
    for ax, (name, pictures) in zip(axes, shown.items()):
        ax.imshow(sheet(pictures))
        ax.set(title=name, xticks=[], yticks=[], frame_on=False)
    names = [Patch(color=colour, label=str(i)) for i, colour in enumerate(colours)]
    figure.legend(handles=names, title="expert", loc="outside right center", frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1800, help="optimiser steps of the run")
    parser.add_argument("--run", default="runs/demo")
    parser.add_argument("--out", default="expert-map.png")
    parser.add_argument("--layer", type=int, default=0)
    given = parser.parse_args()
    config = coterie.get_recipe("dit-moe").config("demo")
    config = config.replace(train=config.train.replace(steps=given.steps))
    run = coterie.load_run(coterie.start(config, given.run))
    made = generate(run, ROWS * 10)
    first = first_experts(run, made.x, made.labels, given.layer)
    grey = np.clip((made.x[:, 0].numpy() + 1) / 2, 0, 1)
    draw(grey, first.numpy(), f"first expert of each patch, block {given.layer}", given.out)
    print(given.out)


if __name__ == "__main__":
    main()
