"""Draw samples of a run, and beside them the expert that each of their patches chose first.

    coterie demo                                    # a run to look at: runs/demo
    python examples/expert_map.py runs/demo --out expert-map.png

For any run whose experts serve the patches of pictures (``dit-moe``, ``promoe``, ``deepseekmoe``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

from coterie import Condition, load_run
from coterie.runs.sample.sampling import generate

ROWS = 4


@torch.no_grad()
def main(run: str, out: str, layer: int = 0, level: float = 0.2) -> Path:
    """The picture's path. ``level``: how noisy the samples are when the model is asked, 0 to 1."""
    loaded = load_run(run)
    process = loaded.model.process
    made = generate(loaded, ROWS * (loaded.source.num_classes or 10))
    noise = torch.randn(made.x.shape, generator=torch.Generator().manual_seed(0))
    t = process.time_of_unit(torch.full((len(made.x),), level))
    answer = loaded.model(process.diffuse(made.x, noise, t), t, Condition(label=made.labels))
    routing = next(one for one in answer.routings if one.layer == layer)
    first = routing.ids[:, 0].view(len(made.x), *loaded.config.model.backbone.grid)  # [B, h, w]
    draw(made.x.numpy(), first.numpy(), routing.num_experts, layer, Path(out))
    return Path(out)


def draw(x: np.ndarray, first: np.ndarray, num_experts: int, layer: int, out: Path) -> None:
    """``x`` [B, C, H, W] in [-1, 1]; ``first`` [B, h, w]: the expert of each patch."""
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    pixels = np.clip((x.mean(1) + 1) / 2, 0, 1)  # grey [B, H, W]
    patch = pixels.shape[-1] // first.shape[-1]
    colours = pyplot.get_cmap("tab10" if num_experts <= 10 else "tab20")(np.arange(num_experts))
    tinted = colours[first.repeat(patch, 1).repeat(patch, 2)][..., :3]
    tinted = tinted * (0.35 + 0.65 * pixels[..., None])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 2.15), layout="constrained")
    left.imshow(sheet(pixels), cmap="gray")
    right.imshow(sheet(tinted))
    left.set_title("samples")
    right.set_title(f"the same samples: first expert of each patch, layer {layer}")
    for ax in (left, right):
        ax.set_axis_off()
    names = [Patch(color=colour, label=str(i)) for i, colour in enumerate(colours)]
    figure.legend(
        handles=names, title="expert", loc="outside right center", frameon=False, labelspacing=0.25
    )
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def sheet(pictures: np.ndarray) -> np.ndarray:
    """Pictures [B, H, W, ...] as ``ROWS`` rows with a white pixel between them."""
    widths = [(0, 0), (0, 1), (0, 1), *[(0, 0)] * (pictures.ndim - 3)]
    framed = np.pad(pictures, widths, constant_values=1)
    rows = framed.reshape(ROWS, -1, *framed.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--out", default="expert-map.png")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--level", type=float, default=0.2)
    given = parser.parse_args()
    print(main(given.run, given.out, given.layer, given.level))
