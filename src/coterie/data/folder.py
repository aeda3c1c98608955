"""Your own pictures: a folder with one sub folder per class."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.data.images import ImageConfig
from coterie.data.pictures import SUFFIXES, Pictures
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split, is_held_out


@SOURCES.register
class ImageFolderConfig(SourceConfig):
    """``path/CLASS/anything/picture.png``; about one file in ``held_out_one_in`` is held out, by a
    hash of its path below ``path``: adding files moves no other file to another split."""

    kind: Literal["image-folder"] = "image-folder"
    path: str
    size: int = Field(default=64, ge=1, le=4096)
    channels: Literal[1, 3] = 3
    held_out_one_in: int = Field(default=10, ge=2)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="your pictures: one sub folder per class",
        modality="image",
        shape="CxHxW",
        count="any",
        licence="yours to know",
    )

    def build(self, split: Split = "train") -> ArraySource:
        classes, kept, labels = scan_split(
            self.kind, self.path, SUFFIXES, split, self.held_out_one_in
        )
        return ArraySource(
            self.kind,
            "image",
            Pictures(
                len(kept),
                lambda row: Image.open(kept[row]),
                lambda row: f"image-folder: {kept[row]}",
                self.channels,
                self.size,
            ),
            shape=(self.channels, self.size, self.size),
            licence=self.info.licence,
            labels=labels,
            class_names=classes,
            transform=ImageConfig.scale,
        )


def scan_split(
    kind: str, path: str, suffixes: Collection[str], split: Split, held_out_one_in: int
) -> tuple[list[str], list[Path], np.ndarray]:
    """Class names, the files of one split, and the class of each, i64 [S].

    ``path/CLASS/anything/file``; DataError where there is no such file.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(describe(f"{kind}: path", path, "an existing folder"))
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    files = [
        file
        for name in classes
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in suffixes and file.is_file()
    ]
    if not files:
        hint = f"put the files of each class ({', '.join(suffixes)}) into a folder of its own"
        raise DataError(describe(f"{kind}: path", path, "a folder of class folders", hint))
    keys = [file.relative_to(root).as_posix() for file in files]
    wanted = split == "held_out"
    rows = [i for i, key in enumerate(keys) if is_held_out(key, held_out_one_in) == wanted]
    if not rows:
        raise DataError(
            f"{kind}: {root} has {len(files)} files and none of them is in the split {split!r}; "
            "add files or change held_out_one_in"
        )
    labels = np.array([classes.index(keys[row].split("/", 1)[0]) for row in rows])
    return classes, [files[row] for row in rows], labels
