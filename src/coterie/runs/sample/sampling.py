"""Sampling a trained run; each sample has its own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise, derive
from coterie.runs.sample import guides
from coterie.runs.sample.nonfinite import explained
from coterie.runs.trained_run import LoadedRun
from coterie.solvers import (
    FeynmanKac,
    GuidanceConfig,
    ParticleRecord,
    Solver,
    Thresholded,
    guide,
    initial_noise,
    sample,
)
from coterie.solvers.text import generate_text

MOST = 1_000_000  # samples of one draw


@dataclass(frozen=True)
class Samples:
    """Samples with their labels and seeds."""

    x: Tensor  # f32 [n, ...] images in [-1, 1], or i64 [n, N] token ids
    labels: Tensor  # i64 [n]; NULL_LABEL: unconditional
    seeds: list[int]
    particles: tuple[ParticleRecord, ...] = field(default=(), kw_only=True)
    """statistics of weighted particles, per batch"""
    places: tuple[int, ...] = field(default=(), kw_only=True)
    """Numbers of the samples in the whole draw."""
    drawn: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Settings of the draw, to repeat it."""
    threads: tuple[int, ...] = field(default=(), kw_only=True)
    """CPU threads that each sample was drawn with, if known."""


def balanced_labels(run: LoadedRun, num: int) -> Tensor:
    """The data's classes in turn, so that a grid has one column per class; NULL_LABEL without
    classes."""
    classes = run.source.num_classes
    if not classes or not conditional(run):
        return torch.full((num,), NULL_LABEL)
    there = torch.tensor(getattr(run.source, "classes", range(classes)))
    return there[_turns(run, num) % len(there)]


def conditional(run: LoadedRun) -> bool:
    """Whether the model is conditioned on classes."""
    return bool(getattr(run.config.model.backbone, "num_classes", 0))


def guidance_of(run: LoadedRun, weight: float | None) -> GuidanceConfig:
    """The run's guidance with ``weight`` (None: its own); ConfigError if guidance cannot change a
    sample."""
    if weight not in (None, 1) and (run.is_text or not conditional(run)):
        hint = "the model has no classes, so there is nothing to guide to"
        raise ConfigError(describe("guidance", weight, "none, or 1", hint))
    return run.config.sample.guidance.weighed(weight)


@torch.no_grad()
def generate(
    run: LoadedRun,
    num: int,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    callback: Callable[..., None] | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    index: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Samples:
    """Draw ``num`` samples. Sample i depends on (seed, i), its label and the model only.

    ``index``: draw only these of the ``num``, with equal bits; batches without any of them are
    skipped. ``seeds``: the samples' own seeds, such as recorded ones, instead of those derived from
    ``seed`` and i. ConfigError for settings that do not fit the run.
    """
    together = systems_of(run)
    if seeds is not None:
        num = len(seeds)
        if not num or num % together or not all(0 <= own < 2**63 for own in seeds):
            each = f"a multiple of {together}, the particles of a system" if together > 1 else "any"
            allowed = f"whole numbers from 0 below 2^63; how many: {each}"
            raise ConfigError(describe("seeds", list(seeds)[:8], allowed))
    guided_by = guidance_of(run, guidance)
    if not 1 <= num <= MOST:
        raise ConfigError(describe("num", num, f"1 or more, up to {MOST:,}"))
    kept = list(range(num)) if index is None else list(dict.fromkeys(index))
    if not kept or not all(0 <= place < num for place in kept):
        raise ConfigError(describe("index", kept[:8], f"0..{num - 1}, of a draw of {num}"))
    drawn = -(-num // together) * together  # whole systems: what is over is left away
    wanted = balanced_labels(run, drawn) if labels is None else chosen_labels(run, labels, drawn)
    maps = guides.wanted(run, drawn)
    if seeds is None:
        seeds = [derive(seed, "sample", place) for place in range(drawn)]
    seeds, size = [int(own) for own in seeds], run.config.sample.batch
    parts: dict[int, Tensor] = {}
    records = []
    for first in sorted({place // size * size for place in kept}):
        rows = slice(first, first + size)
        solver = run.config.sample.solver.build()
        likeness = None if maps is None else maps[rows]
        draw = partial(_batch, run, wanted[rows], seeds[rows], steps, guided_by, maps=likeness)
        try:
            parts[first] = draw(solver, callback)
        except DataError as error:
            again = partial(draw, run.config.sample.solver.build())
            raise explained(error, again, run.model, first) from None
        if isinstance(solver, FeynmanKac):
            records.append(solver.record)
        if progress is not None:
            progress(sum(place // size * size == first for place in kept))
    made = torch.stack([parts[place // size * size][place % size] for place in kept])
    own = [seeds[place] for place in kept]
    told = {"seed": seed, "num": num, "batch": size, "steps": steps, "guidance": guidance}
    return Samples(
        made, wanted[kept], own, particles=tuple(records), places=tuple(kept), drawn=told
    )


def chosen_labels(run: LoadedRun, labels: Sequence[int], num: int) -> Tensor:
    """``labels`` in turn; ConfigError for a class that the model does not have."""
    if not conditional(run):
        raise ConfigError(describe("labels", list(labels), "none", "the model has no classes"))
    if not labels:
        raise ConfigError(describe("labels", [], "at least one"))
    classes = run.source.num_classes
    for label in labels:
        if not NULL_LABEL <= label < classes:
            raise ConfigError(describe("labels", label, f"0..{classes - 1}"))
    return torch.tensor([labels[index % len(labels)] for index in _turns(run, num).tolist()])


def _turns(run: LoadedRun, num: int) -> Tensor:
    """i64 [num]: whose turn it is; particles of one system have theirs together."""
    return torch.arange(num) // systems_of(run)


def systems_of(run: LoadedRun) -> int:
    """Number of samples that are drawn together: the particles of a system, else 1."""
    return getattr(run.config.sample.solver, "particles", None) or 1


def _batch(
    run: LoadedRun,
    labels: Tensor,
    seeds: list[int],
    steps: int | None,
    guidance: GuidanceConfig,
    solver: Solver,
    callback: Callable[..., None] | None,
    maps: Tensor | None = None,
) -> Tensor:
    settings = run.config.sample
    steps = steps or settings.steps
    noise = SampleNoise(seeds)
    if run.is_text:
        return generate_text(
            run.model,
            len(seeds),
            run.source.shape[0],
            steps,
            noise,
            start=run.source.tokenizer.EOS,  # type: ignore[attr-defined]
            temperature=settings.temperature,
        )
    denoiser = run.model
    cond = Condition()
    if conditional(run):
        cond = Condition(label=labels)
        denoiser = guide(run.model, guidance)
    if maps is not None:
        cond = cond.replace(channels=maps)
    if settings.threshold is not None:
        denoiser = Thresholded(denoiser, settings.threshold)
    # A composition's initial law is narrower or wider than an expert's.
    scale = getattr(run.model, "prior_scale", 1.0)
    x = scale * initial_noise(run.model.process, run.source.shape, noise)
    return sample(
        denoiser,
        x,
        cond,
        solver=solver,
        grid=settings.grid,
        steps=steps,
        noise=noise,
        callback=callback,
    )


def to_pixels(x: Tensor) -> np.ndarray:
    """f32 [n, C, H, W] in [-1, 1] -> u8 [n, H, W, C]."""
    scaled = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def grid_image(pixels: np.ndarray, columns: int, scale: int = 2, gap: int = 2) -> Image.Image:
    """Tile u8 [n, H, W, C] images, ``columns`` a row, on white."""
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8
    )
    for index, picture in enumerate(pixels):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
