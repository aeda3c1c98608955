"""Your own pictures: a folder with one sub folder per class."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.core.files import escaped
from coterie.core.paths import Place
from coterie.data.images.packaged import ImageConfig
from coterie.data.images.pictures import SUFFIXES, Pictures
from coterie.data.sample_files import (
    class_folders,
    existing_folder,
    files_below,
    listing_digest,
    say_passed_over,
)
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split, is_held_out


@SOURCES.register
class ImageFolderConfig(SourceConfig):
    """``path/CLASS/anything/picture.png``; about one file in ``held_out_one_in`` is held out, by a
    hash of its path below ``path``: adding files moves no other file to another split. Hidden,
    underscored and empty folders are no classes."""

    kind: Literal["image-folder"] = "image-folder"
    path: Place  # the folder
    size: int = Field(default=64, ge=1, le=4096)
    """side of the pictures in pixels, after scaling and cropping"""
    channels: Literal[1, 3] = 3  # grey or colour
    held_out_one_in: int = Field(default=10, ge=2)  # about one file in this many is held out
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="your pictures: one sub folder per class",
        modality="image",
        shape="CxHxW",
        count="any",
        licence="yours to know",
    )

    def build(self, split: Split = "train") -> ArraySource:
        found = scan_split(self.kind, self.path, SUFFIXES, split, self.held_out_one_in)
        return ArraySource(
            self.kind,
            "image",
            Pictures(
                len(found.files),
                lambda row: found.files[row],
                lambda row: f"image-folder: {found.files[row]}",
                self.channels,
                self.size,
            ),
            shape=(self.channels, self.size, self.size),
            licence=self.info.licence,
            labels=found.labels,
            class_names=found.classes,
            transform=ImageConfig.scale,
            fingerprint=found.fingerprint,
        )


@dataclass(frozen=True, eq=False)
class SplitFiles:
    """The files of one split, the class of each (``labels`` i64 [S]), and a digest of names and
    sizes of all files of the folder, whatever their split."""

    classes: list[str]
    files: list[Path]
    labels: np.ndarray
    fingerprint: str


def scan_split(
    kind: str, path: str, suffixes: Collection[str], split: Split, held_out_one_in: int
) -> SplitFiles:
    """``path/CLASS/anything/file``; a class is a folder with such a file. Folders that are hidden,
    underscored or without one are passed over with a warning. DataError where there is no file."""
    root = existing_folder(path, f"{kind}: path")
    folders, skipped = class_folders(root)
    below = {folder.name: files_below(folder, suffixes) for folder in folders}
    classes = [name for name, files in below.items() if files]
    skipped += [escaped(name) for name, files in below.items() if not files]
    if not classes:
        hint = f"put the files of each class ({', '.join(suffixes)}) into a folder of its own"
        raise DataError(describe(f"{kind}: path", path, "a folder of class folders", hint))
    say_passed_over(kind, root, sorted(skipped))
    every = [(file, label) for label, name in enumerate(classes) for file in below[name]]
    wanted = split == "held_out"
    kept = [
        (file, label)
        for file, label in every
        if is_held_out(file.relative_to(root).as_posix(), held_out_one_in) == wanted
    ]
    if not kept:
        raise DataError(
            f"{kind}: {root} has {len(every)} files and none of them is in the split {split!r}; "
            "add files or change held_out_one_in"
        )
    return SplitFiles(
        classes,
        [file for file, _ in kept],
        np.array([label for _, label in kept]),
        listing_digest(root, [file for file, _ in every]),
    )
