"""Your own point clouds: a folder with one sub folder per class, one array per cloud."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.core.paths import Place
from coterie.core.rng import numpy_generator
from coterie.data.arrays import open_npy
from coterie.data.images.image_folder import scan_split
from coterie.data.points.clouds import Array, CloudConfig, MadeClouds, to_unit_ball
from coterie.data.source import SOURCES, ArraySource, SourceInfo, Split


@SOURCES.register
class CloudFolderConfig(CloudConfig):
    """``path/CLASS/anything/cloud.npy``, each [n, 3] with n >= ``num_points``, of which as many are
    drawn, always the same ones. Held out is about one file in ``held_out_one_in``, by a hash of its
    path below ``path``."""

    kind: Literal["cloud-folder"] = "cloud-folder"
    path: Place  # the folder
    held_out_one_in: int = Field(default=10, ge=2)  # about one file in this many is held out
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="your point clouds: one sub folder per class, one .npy per cloud",
        modality="points",
        shape="Px3",
        count="any",
        licence="yours to know",
    )

    def build(self, split: Split = "train") -> ArraySource:
        found = scan_split(self.kind, self.path, (".npy",), split, self.held_out_one_in)
        files = found.files

        def make(row: int) -> Array:
            name = f"{self.kind}: {files[row]}"
            points = open_npy(files[row], name=name, empty=True)
            if points.ndim != 2 or points.shape[1] != 3 or len(points) < self.num_points:
                raise DataError(describe(name, points.shape, f"[n >= {self.num_points}, 3]"))
            rng = numpy_generator(0, self.kind, files[row].name)
            return to_unit_ball(points[rng.permutation(len(points))[: self.num_points]], name)

        return ArraySource(
            self.kind,
            "points",
            MadeClouds(len(files), make, self.num_points),
            shape=self.shape(),
            licence=self.info.licence,
            labels=found.labels,
            class_names=found.classes,
            fingerprint=found.fingerprint,
        )
