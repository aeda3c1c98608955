"""Your own pictures: a folder with one sub folder per class."""

from __future__ import annotations

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
        root = Path(self.path).expanduser()
        classes, files = self._scan(root)
        keys = [file.relative_to(root).as_posix() for file in files]
        wanted = split == "held_out"
        rows = [i for i, key in enumerate(keys) if is_held_out(key, self.held_out_one_in) == wanted]
        if not rows:
            raise DataError(
                f"image-folder: {root} has {len(files)} pictures and none of them is in the split "
                f"{split!r}; add pictures or change held_out_one_in"
            )
        labels = np.array([classes.index(keys[row].split("/", 1)[0]) for row in rows])
        kept = [files[row] for row in rows]
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

    def _scan(self, root: Path) -> tuple[list[str], list[Path]]:
        if not root.is_dir():
            raise DataError(describe("image-folder: path", self.path, "an existing folder"))
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        files = [
            file
            for name in classes
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in SUFFIXES and file.is_file()
        ]
        if not files:
            hint = "put the pictures of each class into a folder of its own"
            raise DataError(
                describe("image-folder: path", self.path, "a folder of class folders", hint)
            )
        return classes, files
