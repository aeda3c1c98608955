"""Crops of real photographs, split by photograph: no crop of a held-out photograph is trained on.

Converted once to u8 [S, 3, 96, 96], cut on a grid from photographs scaled to 384 pixels in height
or width, whichever is smaller. Crops overlap within a photograph. Legend: S crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from coterie.data.download.cache import save_array
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, load, register_download
from coterie.data.images.packaged import ImageConfig
from coterie.data.images.pictures import opened
from coterie.data.source import SOURCES, ArraySource, SourceInfo, Split

CROP, STRIDE, SHORTER_EDGE = 96, 48, 384
HELD_OUT = ("coffee", "rocket", "LadyBird", "Dune")


@SOURCES.register
class PhotosConfig(ImageConfig):
    """The class is the photograph."""

    kind: Literal["photos"] = "photos"
    native: ClassVar[tuple[int, int]] = (3, CROP)
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="overlapping crops of 16 photographs, split by photograph",
        modality="image",
        shape="3x96x96",
        count="847 + 308",
        licence="BSD-3-Clause (scikit-image), pictures CC0 or public domain; "
        "mate-backgrounds GPL-2+, photographs CC BY-SA 4.0",
    )

    def build(self, split: Split = "train") -> ArraySource:
        images, labels, held_out = load(self.kind, "images", "labels", "held_out")
        rows = np.flatnonzero(held_out == (split == "held_out"))
        return ArraySource(
            self.kind,
            "image",
            images,
            shape=self.shape(),
            licence=self.info.licence,
            rows=rows,
            labels=np.asarray(labels[rows]),
            class_names=PHOTOS,
            transform=self.transform,
        )


def crops(picture: Image.Image) -> np.ndarray:
    """u8 [S, 3, 96, 96] of one photograph."""
    picture = picture.convert("RGB")
    scale = SHORTER_EDGE / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    tops = range(0, size[1] - CROP + 1, STRIDE)
    lefts = range(0, size[0] - CROP + 1, STRIDE)
    return np.stack([pixels[:, y : y + CROP, x : x + CROP] for y in tops for x in lefts])


def _convert(files: Sequence[Files], folder: Path) -> None:
    named = {Path(path).stem: content for part in files for path, content in part.items()}
    cut = []
    for name in PHOTOS:
        with opened(named[name], name) as picture:
            cut.append(crops(picture))
    labels = np.repeat(np.arange(len(PHOTOS)), [len(part) for part in cut])
    save_array(folder, "images", np.concatenate(cut))
    save_array(folder, "labels", labels)
    save_array(folder, "held_out", np.isin(labels, [PHOTOS.index(name) for name in HELD_OUT]))


_SCIKIT_IMAGE = Package(
    "pip",
    "scikit-image",
    "0.26.0",
    members(
        """
        88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5 791555
        skimage/data/astronaut.png
        596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb 240512
        skimage/data/chelsea.png
        cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7 466706
        skimage/data/coffee.png
        c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c 112525
        skimage/data/rocket.jpg
        db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179 644701
        skimage/data/motorcycle_left.png
        """
    ),
    megabytes=13.7,
)
_MATE_BACKGROUNDS = Package(
    "apt",
    "mate-backgrounds",
    "",
    members(
        """
        5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce 200353
        usr/share/backgrounds/mate/nature/Aqua.jpg
        f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600 1157513
        usr/share/backgrounds/mate/nature/Blinds.jpg
        8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91 1021283
        usr/share/backgrounds/mate/nature/Dune.jpg
        972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e 80905
        usr/share/backgrounds/mate/nature/FreshFlower.jpg
        d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78 264831
        usr/share/backgrounds/mate/nature/Garden.jpg
        8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832 183377
        usr/share/backgrounds/mate/nature/GreenMeadow.jpg
        e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d 351588
        usr/share/backgrounds/mate/nature/LadyBird.jpg
        77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957 695070
        usr/share/backgrounds/mate/nature/Storm.jpg
        665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb 881400
        usr/share/backgrounds/mate/nature/TwoWings.jpg
        19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07 525520
        usr/share/backgrounds/mate/nature/Wood.jpg
        254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306 267440
        usr/share/backgrounds/mate/nature/YellowFlower.jpg
        """
    ),
    megabytes=46.6,
)
PHOTOS = tuple(
    Path(member.path).stem for part in (_SCIKIT_IMAGE, _MATE_BACKGROUNDS) for member in part.members
)
register_download(Download("photos", (_SCIKIT_IMAGE, _MATE_BACKGROUNDS), _convert))
