"""A folder of precomputed latents: ``latents.npy`` f32 or f16 [S, C, H, W], ``labels.npy`` [S].

What latent diffusion trains on: images encoded once by a frozen autoencoder, already scaled to
about unit variance. Memory-mapped; held out are rows drawn from the folder's size alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split, split_rows


@SOURCES.register
class LatentsConfig(SourceConfig):
    """``num_classes``: labels are 0..num_classes-1."""

    kind: Literal["latents"] = "latents"
    path: str
    num_classes: int = Field(1000, ge=1)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="your own latents: latents.npy and labels.npy in a folder",
        modality="image",
        shape="CxHxW",
        count="your own",
        licence="your own",
    )

    def build(self, split: Split = "train") -> ArraySource:
        folder = Path(self.path)
        arrays = []
        for name in ("latents.npy", "labels.npy"):
            if not (folder / name).is_file():
                allowed = f"a folder with latents.npy and labels.npy ({name} is missing)"
                raise DataError(describe("data.path", self.path, allowed))
            try:
                arrays.append(np.load(folder / name, mmap_mode="r", allow_pickle=False))
            except ValueError as error:
                raise DataError(f"{folder / name}: not a plain array ({error})") from None
        data, labels = arrays
        if data.ndim != 4 or len(data) != len(labels):
            raise DataError(describe(str(folder / "latents.npy"), data.shape, "[S, C, H, W]"))
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
        )
