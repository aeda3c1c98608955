"""Sampling a run with a guidance network, and measuring how well samples follow it.

Shapes: S samples.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, describe
from coterie.data import order
from coterie.data.images import pictures
from coterie.guides import Guide, height_map, pixel_classes
from coterie.guides.tasks import target_of
from coterie.runs.feature_networks import read_labels
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.trained_run import LoadedRun
from coterie.solvers.network_guidance import GuidedConfig, GuidedDenoiser, reads_label


def with_guide(
    run: LoadedRun, guide: str | Path, scale: float = 1.0, target: str | Path | None = None
) -> LoadedRun:
    """``run`` guided by the guide at another run or model directory.

    ``target``: a picture whose map, or whose pixels' classes, all samples are guided to; by default
    each sample gets those of a held-out picture.
    """
    part = PretrainedConfig(path=str(guide)).pinned()
    denoiser = PretrainedConfig(path=str(run.path))
    model = GuidedConfig.from_dict({"denoiser": denoiser, "guide": part, "scale": scale})
    found = part.build()
    made = GuidedDenoiser(run.model, found, scale, model, reads_label(run.config.model))
    made.guide.fused = True  # all samples of a batch walk down the same noise levels
    if target is not None:
        if made.guide.task == "classes":
            hint = "this guide reads classes: give labels"
            raise ConfigError(describe("target", str(target), "none", hint))
        picture = read_picture(target, made.guide.sample_shape)
        made.target = target_of(made.guide.task, made.guide.clean(picture[None]))
    config = run.config.replace(model=model, train=run.config.train.replace(steps=0), init=None)
    return replace(run, config=config, model=made.eval())


def read_picture(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """f32 [C, H, W] in [-1, 1], scaled to cover ``shape`` and cut, as pictures of a folder are."""
    if shape[0] not in (1, 3):
        raise ConfigError(describe("target", str(path), f"none: samples have {shape[0]} channels"))
    pixels = pictures.read_picture(Path(path), shape[0], shape[1:])
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)


def map_guide(run: LoadedRun) -> Guide | None:
    """The guide of a run, if it guides to maps or classes of pixels."""
    guide = getattr(run.model, "guide", None)
    return guide if isinstance(guide, Guide) and guide.task != "classes" else None


def wanted(run: LoadedRun, num: int) -> Tensor | None:
    """f32 [S, M, H, W]: the maps that ``num`` samples are guided to, computed from held-out
    pictures in turn; None if there is one for all, or no such guide."""
    guide = map_guide(run)
    if guide is None or run.model.target is not None:
        return None
    return target_of(guide.task, guide.clean(models(run, num).x))


def models(run: LoadedRun, num: int) -> Batch:
    """The held-out pictures whose maps ``num`` samples are guided to."""
    source = run.config.data.whole.build(split="held_out")
    rows = order(0, 0, min(num, len(source)), len(source))
    return source.get(np.resize(rows, num))


def followed(run: LoadedRun, made: Tensor) -> dict[str, Any]:
    """Whether samples [S, ...] are what they were guided to, told by the pictures and not by the
    guide: ``target_error``, mean squared error of their height maps, or ``target_accuracy``, share
    of pixels of the right class. Floors: of unguided pictures, other held-out ones."""
    guide = map_guide(run)
    if guide is None or run.model.target is not None:
        return {}
    batch = models(run, len(made))
    other = batch.x.roll(1, 0)
    if guide.task == "map":
        target = height_map(batch.x)
        errors = [float((height_map(x) - target).square().mean()) for x in (made, other)]
        return {"target_error": {"value": errors[0], "floor": errors[1]}}
    data = run.config.data.whole
    seen, others = read_labels(data, made), read_labels(data, other)
    if seen is None or others is None or batch.cond.label is None:
        return {}
    pixels = pixel_classes(batch.x, batch.cond.label)
    shares = [
        float((pixel_classes(x, label) == pixels).float().mean())
        for x, label in ((made, seen), (other, others))
    ]
    return {"target_accuracy": {"value": shares[0], "floor": shares[1]}}
