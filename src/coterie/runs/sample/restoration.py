"""Restoring your own pictures of any size with a trained run.

A network restores squares of one size, so a picture is cut into overlapping squares. Their outputs
are averaged with weights that fall towards the border of a square, so that no seam is visible.
Legend: C channels, H x W pixels, S side of a square, T squares.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.folder import canonical, file_digest
from coterie.core.json_reader import read_object
from coterie.core.outputs import Outputs
from coterie.core.paths import relative
from coterie.core.prediction import Condition
from coterie.data.images.pictures import SUFFIXES, Dark, read_picture
from coterie.data.sample_files import existing_folder, files_below
from coterie.runs.sample.sampling import to_pixels
from coterie.runs.trained_run import LoadedRun
from coterie.train.objectives.restoration import restore

RECORD = "restored.json"
BATCH = 16  # squares at once

Restorer = Callable[[Tensor], Tensor]
"""Degraded squares f32 [T, C, S, S] in [-1, 1] -> restored ones."""


def corners(length: int, side: int, overlap: int) -> list[int]:
    """Starts of the squares along an edge of ``length``, evenly spaced with at least ``overlap``
    pixels in common; the last square ends with the picture."""
    if length <= side:
        return [0]
    count = -(-(length - overlap) // (side - overlap))
    return [round(index * (length - side) / (count - 1)) for index in range(count)]


def ramp(side: int, overlap: int) -> Tensor:
    """f32 [S]: weight 1 in the middle of a square, falling to almost 0 over ``overlap`` pixels."""
    from_border = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1
    return (from_border / (overlap + 1)).clamp(max=1.0)


@torch.no_grad()
def restore_tiled(picture: Tensor, network: Restorer, side: int, overlap: int) -> Tensor:
    """f32 [C, H, W] -> the same shape; H and W at least ``side``."""
    height, width = picture.shape[1:]
    places = [
        (top, left)
        for top in corners(height, side, overlap)
        for left in corners(width, side, overlap)
    ]
    line = ramp(side, overlap)
    weight = line[:, None] * line
    total, weights = torch.zeros_like(picture), torch.zeros(height, width)
    for first in range(0, len(places), BATCH):
        some = places[first : first + BATCH]
        squares = torch.stack([picture[:, y : y + side, x : x + side] for y, x in some])
        for (y, x), answer in zip(some, network(squares), strict=True):
            total[:, y : y + side, x : x + side] += weight * answer
            weights[y : y + side, x : x + side] += weight
    return total / weights


@dataclass(frozen=True)
class Plan:
    """The pictures of a folder: (file, file to be written, squares) of each."""

    pictures: tuple[tuple[Path, Path, int], ...]
    side: int
    overlap: int
    dark: Dark = field(default_factory=Dark, compare=False)

    @property
    def squares(self) -> int:
        return sum(count for _, _, count in self.pictures)


def plan_folder(
    run: LoadedRun, folder: str | Path, out: str | Path, overlap: int | None = None
) -> Plan:
    """Check every picture before any is restored.

    ``overlap``: pixels, by default a quarter of the side of a square. ConfigError for a run that
    restores nothing; DataError for a folder without pictures, and for pictures that cannot be
    decoded or are smaller than a square.
    """
    kind = run.config.objective.kind
    if kind != "restoration":
        hint = "coterie sample draws from this run"
        raise ConfigError(describe("run: objective", kind, "restoration", hint))
    side = int(run.config.model.backbone.image_size)
    overlap = side // 4 if overlap is None else overlap
    if not 0 <= overlap <= side // 2:
        raise ConfigError(describe("overlap", overlap, f"0..{side // 2} pixels"))
    source, target = existing_folder(folder, "folder"), Path(out)
    if target.resolve() == source.resolve():
        hint = "restored pictures would replace the given ones"
        raise ConfigError(describe("out", str(out), "another folder", hint))
    files = files_below(source, SUFFIXES, deep=False)
    if not files:
        raise DataError(
            describe("folder", str(folder), f"pictures ({', '.join(sorted(SUFFIXES))})")
        )
    named: dict[str, Path] = {}
    for file in files:
        other = named.setdefault(file.stem, file)
        if other is not file:
            raise DataError(f"{other} and {file}: both would be restored as {file.stem}.png")
    dark = Dark()
    found = [
        (file, target / f"{file.stem}.png", _squares(file, side, overlap, dark)) for file in files
    ]
    return Plan(tuple(found), side, overlap, dark)


def _squares(file: Path, side: int, overlap: int, dark: Dark) -> int:
    height, width = read_picture(file, dark=dark).shape[1:]
    if min(height, width) < side:
        allowed = f"{side} pixels or more a side, which the run was trained on"
        raise DataError(describe(f"{file}: size", f"{width}x{height}", allowed))
    return len(corners(height, side, overlap)) * len(corners(width, side, overlap))


def restore_folder(
    run: LoadedRun,
    plan: Plan,
    out: str | Path,
    weights: str = "ema",
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a PNG of each picture of the plan to ``out``; existing ones of the same run and picture
    are kept.

    ConfigError if ``out`` holds other files.
    """
    folder = Path(out)
    record: dict[str, Any] = {
        "run": relative(str(run.path), folder),
        "step": run.step,
        "weights": weights,
        "overlap": plan.overlap,
    }
    outputs, files = _claim(folder, record, [target.name for _, target, _ in plan.pictures])
    device = next(run.model.parameters()).device

    def network(squares: Tensor) -> Tensor:
        answer: Tensor = restore(run.model, Condition(channels=squares.to(device))).value
        return answer.float().cpu()

    written = []
    for file, target, squares in plan.pictures:
        seen = file_digest(file)
        if files.get(target.name) != seen or not target.is_file():
            given = (
                torch.from_numpy(np.array(read_picture(file, dark=plan.dark))).float() / 127.5 - 1.0
            )
            made = restore_tiled(given, network, plan.side, plan.overlap)
            buffer = io.BytesIO()
            Image.fromarray(to_pixels(made[None])[0]).save(buffer, format="PNG")
            files[target.name] = seen
            text = canonical({**record, "files": files})
            outputs = outputs.put(target.name, buffer.getvalue(), text)
        written.append(target)
        if progress is not None:
            progress(squares)
    return written


def outputs_at(folder: str | Path) -> Outputs:
    """What was restored into ``folder`` before."""

    def listed(data: Any) -> list[str] | None:
        files = data.get("files") if isinstance(data, dict) else None
        return list(files) if isinstance(files, dict) else None

    return Outputs.at(folder, RECORD, listed)


def _claim(
    folder: Path, record: dict[str, Any], names: Sequence[str]
) -> tuple[Outputs, dict[str, Any]]:
    """The outputs in ``folder``, if ``names`` may be written there, and the digest of the picture
    that each was made from."""
    outputs, files = outputs_at(folder), {}
    if outputs.earlier:
        known = read_object(folder / RECORD)
        files = known.pop("files")
        if known != record:
            hint = "restore into a new folder"
            raise ConfigError(describe("out", str(folder), "the work of the same run", hint))
    elif folder.is_dir() and any(folder.iterdir()):
        hint = "pictures in it might be replaced"
        raise ConfigError(describe("out", str(folder), "a new or empty folder", hint))
    return outputs.check(re.compile("|".join(map(re.escape, [RECORD, *names])))), files
