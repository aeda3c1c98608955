"""A folder of precomputed latents: ``latents.npy`` f32 or f16 [S, C, H, W], ``labels.npy`` [S].

What latent diffusion trains on: images encoded once by a frozen autoencoder, already scaled to
about unit variance. Whole numbers are refused: pictures are no latents. Memory-mapped; held out
are rows drawn from the folder's size alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.batch import Source
from coterie.core.errors import DataError, describe
from coterie.core.paths import Place
from coterie.data.arrays import native, open_npy, rows_digest
from coterie.data.sample_files import existing_folder
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split, split_rows


@SOURCES.register
class LatentsConfig(SourceConfig):
    """A folder of precomputed latents."""

    kind: Literal["latents"] = "latents"
    path: Place  # folder with latents.npy and labels.npy
    num_classes: int = Field(1000, ge=1)  # labels are 0..num_classes-1
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="your own latents: latents.npy and labels.npy in a folder",
        modality="image",
        shape="CxHxW",
        count="your own",
        licence="your own",
    )

    def build(self, split: Split = "train") -> ArraySource:
        folder = existing_folder(self.path, "data.path")
        for name in ("latents.npy", "labels.npy"):
            if not (folder / name).exists():
                allowed = f"a folder with latents.npy and labels.npy ({name} is missing)"
                raise DataError(describe("data.path", self.path, allowed))
        data = open_npy(folder / "latents.npy", kinds="f", dims=(4,))
        labels = self._labels(folder)
        if len(data) != len(labels):
            found = f"{len(data)} latents and {len(labels)} labels"
            raise DataError(describe(f"{folder}: samples", found, "a label per latent"))
        rows = split_rows(self.kind, len(data), split, share=0.02)
        return ArraySource(
            self.kind,
            "image",
            data,
            shape=data.shape[1:],
            licence=self.info.licence,
            rows=rows,
            labels=np.asarray(labels[rows]),
            class_names=tuple(str(index) for index in range(self.num_classes)),
            transform=lambda values: values.float(),
            fingerprint=rows_digest(data, labels),
        )

    def explain_classes(self, source: Source) -> str:
        largest = int(self._labels(existing_folder(self.path, "data.path")).max())
        is_default = self.num_classes == type(self).model_fields["num_classes"].default
        said = f"data.num_classes is {self.num_classes}{', its default' if is_default else ''}"
        return f"{said}; the labels are 0..{largest}: --data.num_classes={largest + 1} says so"

    def _labels(self, folder: Path) -> np.ndarray:
        return native(open_npy(folder / "labels.npy", kinds="iu", dims=(1,)))
