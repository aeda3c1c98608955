"""Your own pairs of pictures, degraded and clean, as the published weather data sets lay them out.

``path/KIND/degraded/NAME`` beside ``path/KIND/clean/NAME``, where the class of a pair is its kind.
RainDrop has ``data`` and ``gt`` in the place of the two names, Snow100K ``synthetic`` and ``gt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from coterie.core.batch import Batch
from coterie.core.errors import DataError, describe
from coterie.core.files import escaped
from coterie.core.paths import Place
from coterie.core.prediction import Condition
from coterie.core.rng import numpy_generator
from coterie.data.images.pictures import SUFFIXES, Dark, read_picture
from coterie.data.sample_files import (
    class_folders,
    existing_folder,
    files_below,
    listing_digest,
    say_passed_over,
)
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, as_rows, is_held_out
from coterie.data.worlds.weather import scaled


@SOURCES.register
class PairsFolderConfig(SourceConfig):
    """Square crops of pairs of pictures, the same in every run."""

    kind: Literal["pairs-folder"] = "pairs-folder"
    path: Place  # folder with one sub folder per kind of degradation
    degraded: str = "input"  # name of the folder of degraded pictures
    clean: str = "gt"  # name of the folder of clean pictures
    size: int = Field(default=256, ge=8, le=4096)  # side of a crop in pixels
    crops: int = Field(default=8, ge=1)  # crops per pair
    held_out_one_in: int = Field(default=10, ge=2)  # about one pair in this many is held out
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="your pairs of degraded and clean pictures, one folder per kind of degradation",
        modality="restoration",
        shape="3xSxS",
        count="any",
        licence="yours to know",
    )

    def build(self, split: Split = "train") -> PairsFolder:
        return PairsFolder(self, split)


class PairsFolder:
    """Pairs of pictures; files are read when a sample is requested."""

    def __init__(self, config: PairsFolderConfig, split: Split) -> None:
        self.name: str = config.kind
        self.modality = "restoration"
        self.shape: tuple[int, ...] = (3, config.size, config.size)
        self.licence = config.info.licence
        self.class_names, pairs = find_pairs(config)
        self.num_classes = len(self.class_names)
        wanted = split == "held_out"
        self._pairs = [
            (kind, bad, clean)
            for kind, bad, clean in pairs
            if is_held_out(f"{kind}/{bad.name}", config.held_out_one_in) == wanted
        ]
        if not self._pairs:
            raise DataError(
                f"{self.name}: {config.path} has {len(pairs)} pairs and none of them is in the "
                f"split {split!r}; add pairs or change held_out_one_in"
            )
        self._config, self._dark = config, Dark()
        files = [file for _, *both in pairs for file in both]
        root = existing_folder(config.path, f"{config.kind}: path")
        self.fingerprint = listing_digest(root, files)

    def __len__(self) -> int:
        return len(self._pairs) * self._config.crops

    def get(self, indices: object) -> Batch:
        rows = as_rows(indices, len(self), self.name)
        cut = [self._cut(index) for index in rows.tolist()]
        bad, clean = (scaled([pair[part] for pair in cut], self.shape) for part in (0, 1))
        names = [self._pairs[index // self._config.crops][0] for index in rows.tolist()]
        label = torch.tensor([self.class_names.index(name) for name in names], dtype=torch.long)
        return Batch(clean, Condition(label=label, channels=bad), torch.from_numpy(rows))

    def _cut(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(degraded, clean), both u8 [3, size, size]."""
        kind, bad_file, clean_file = self._pairs[index // self._config.crops]
        bad, clean = (read_picture(file, dark=self._dark) for file in (bad_file, clean_file))
        size = self._config.size
        if bad.shape != clean.shape:
            raise DataError(
                describe(f"{self.name}: {bad_file}: shape", bad.shape, f"{clean.shape}, as clean")
            )
        if min(bad.shape[1:]) < size:
            field = f"{self.name}: {bad_file}: shape"
            raise DataError(describe(field, bad.shape, f"{size} pixels or more a side"))
        rng = numpy_generator(0, self.name, kind, bad_file.name, index % self._config.crops)
        top, left = (int(rng.integers(0, edge - size + 1)) for edge in bad.shape[1:])
        here = np.s_[:, top : top + size, left : left + size]
        return bad[here], clean[here]


def find_pairs(config: PairsFolderConfig) -> tuple[tuple[str, ...], list[tuple[str, Path, Path]]]:
    """(kinds, (kind, degraded file, clean file) of every pair in order); DataError where a
    degraded picture has no clean one, or there is none at all."""
    root = existing_folder(config.path, f"{config.kind}: path")
    found: list[tuple[str, Path, Path]] = []
    folders, skipped = class_folders(root)
    for folder in folders:
        pictures = _pictures(folder / config.degraded)
        if not pictures:  # a folder of another layout is passed over without a word
            skipped += [escaped(folder.name)] if (folder / config.degraded).is_dir() else []
            continue
        clean: dict[str, Path] = {}
        for file in _pictures(folder / config.clean):
            if clean.setdefault(file.stem, file) is not file:
                other = clean[file.stem]
                raise DataError(f"{config.kind}: {other} and {file}: two pictures of one name")
        for file in pictures:
            if file.stem not in clean:
                place = folder / config.clean
                raise DataError(f"{config.kind}: {file}: no picture of this name in {place}")
            found.append((folder.name, file, clean[file.stem]))
    if not found:
        allowed = f"a folder with KIND/{config.degraded} and KIND/{config.clean}"
        raise DataError(describe(f"{config.kind}: path", config.path, allowed))
    say_passed_over(config.kind, root, sorted(skipped))
    return tuple(sorted({kind for kind, _, _ in found})), found


def _pictures(folder: Path) -> list[Path]:
    return files_below(folder, SUFFIXES, deep=False) if folder.is_dir() else []
