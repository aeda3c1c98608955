"""Real models of furniture, plants, people and vehicles: point clouds of Sweet Home 3D's library.

The models come as OBJ files in five catalogues of one Debian package. Fetching draws points on
each surface once; a sample is some of them, scaled a little along each axis. All clouds of one
model, and of models with the same geometry, fall into the same split.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.rng import numpy_generator
from coterie.data.download.cache import save_array
from coterie.data.download.clients import Package, members
from coterie.data.download.fetch import Download, Files, load, register_download
from coterie.data.points.clouds import Array, CloudConfig, MadeClouds, to_unit_ball
from coterie.data.points.meshes import read_obj, sample_surface
from coterie.data.source import SOURCES, ArraySource, SourceInfo, Split, is_held_out

STORED = 8192  # points kept of every model
CATALOGUE = "PluginFurnitureCatalog.properties"
_LOG = logging.getLogger(__name__)

# The first rule that matches names the class; what matches none is left out.
RULES: tuple[tuple[str, str, str], ...] = (  # class, words in the name, words of the category
    ("", r"fan|tennis bat|chest freezer|speech|air conditioning|ottoman|box", r""),
    ("lamp", r"lamp|lights?|lantern|spotlight", r""),
    ("cabinet", r"cabinet|wardrobe|bookcase|chest|dresser|cupboard|shelves", r""),
    ("chair", r"(arm)?chair", r""),
    ("sofa", r"sofa|couch", r""),
    ("bed", r"bed", r""),
    ("table", r"table|desk", r""),
    ("plant", r"plant|tree|pine|hedge|flowers", r""),
    ("person", r"(fe)?male|boy|girl", r"Characters"),
    ("vehicle", r"", r"Vehicles"),
)
CLASSES = tuple(dict.fromkeys(name for name, _, _ in RULES if name))


@dataclass(frozen=True)
class Entry:
    """What a catalogue says of one model. ``size``: width, height, depth in centimetres."""

    name: str
    category: str
    model: str
    creator: str
    size: tuple[float, float, float]
    rotation: tuple[float, ...]  # 9 numbers, row by row


def class_of(name: str, category: str) -> str:
    """The class of a model by its English name and category; "" for none."""
    for label, words, place in RULES:
        named = not words or re.search(rf"\b({words})\b", name, re.IGNORECASE)
        if named and re.fullmatch(place or ".*", category):
            return label
    return ""


def read_catalogue(text: str) -> Iterator[Entry]:
    """Entries of a ``.properties`` file with lines ``key#number=value``."""
    found: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        match = re.match(r"(\w+)#(\d+)=(.*)", line)
        if match:
            found.setdefault(int(match[2]), {})[match[1]] = match[3].strip()
    for number in sorted(found):
        entry = found[number]
        width, height, depth = (float(entry.get(key, 0)) for key in ("width", "height", "depth"))
        turned = entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()
        yield Entry(
            entry["name"],
            entry.get("category", ""),
            entry["model"].lstrip("/"),
            entry.get("creator", ""),
            (width, height, depth),
            tuple(float(value) for value in turned),
        )


def cloud_of(content: bytes, entry: Entry) -> tuple[Array, str]:
    """Points f32 [STORED, 3] in the unit ball, and a key that equal geometry shares."""
    triangles = read_obj(content, entry.model) @ np.reshape(entry.rotation, (3, 3)).T
    corners = triangles.reshape(-1, 3)
    extent = corners.max(axis=0) - corners.min(axis=0)
    # The catalogue's sizes are what the program shows; some files are in other proportions.
    sized = (np.array(entry.size) > 0) & (extent > 0)
    scale = np.where(sized, np.array(entry.size) / np.where(sized, extent, 1), 1)
    shape = to_unit_ball(corners, entry.model).round(3) + 0.0  # no negative zeros
    key = hashlib.blake2b(np.unique(shape, axis=0).tobytes(), digest_size=16).hexdigest()
    rng = numpy_generator(0, "furniture3d", key)
    return to_unit_ball(sample_surface(triangles * scale, STORED, rng), entry.model), key


def _convert(files: Sequence[Files], folder: Path) -> None:
    clouds: list[Array] = []
    rows: list[dict[str, str]] = []
    skipped: dict[str, str] = {}
    for path in sorted(files[0]):
        with zipfile.ZipFile(io.BytesIO(files[0][path])) as library:
            for entry in read_catalogue(library.read(CATALOGUE).decode("latin-1")):
                label = class_of(entry.name, entry.category)
                if not label:
                    continue
                try:
                    cloud, key = cloud_of(library.read(entry.model), entry)
                except (DataError, KeyError) as error:
                    skipped[entry.model] = str(error)
                    continue
                clouds.append(cloud.astype(np.float16))
                row = {"model": entry.model, "name": entry.name, "creator": entry.creator}
                rows.append({**row, "class": label, "key": key, "library": Path(path).stem})
    if skipped:
        _LOG.warning("furniture3d: %d models left out: %s", len(skipped), "; ".join(skipped))
    save_array(folder, "clouds", np.stack(clouds))
    save_array(folder, "labels", np.array([CLASSES.index(row["class"]) for row in rows]))
    held_out = [is_held_out(f"furniture3d/{row['key']}", one_in=5) for row in rows]
    save_array(folder, "held_out", np.array(held_out))
    text = json.dumps({"models": rows, "left_out": skipped}, indent=1)
    (folder / "models.json").write_text(text, encoding="utf-8")


@SOURCES.register
class Furniture3dConfig(CloudConfig):
    """``copies`` samples of every model, each with other points of its surface; those of training
    are stretched along each axis by up to the share ``stretch`` and turned by up to ``yaw`` degrees
    about the vertical."""

    kind: Literal["furniture3d"] = "furniture3d"
    classes: Annotated[tuple[str, ...], Field(min_length=1)] = CLASSES
    """kinds of things that are used"""
    copies: int = Field(default=16, ge=1, le=100_000)
    """samples per model, each with other points of its surface"""
    stretch: float = Field(default=0.1, ge=0, lt=1)
    """largest relative stretch along each axis in training"""
    yaw: float = Field(default=0.0, ge=0, le=180)
    """largest rotation about the vertical in training, in degrees"""
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="models of furniture, lamps, plants, people, vehicles; class = kind of thing",
        modality="points",
        shape="512x3, or up to 8192 points",
        count="3696 + 960 (16 of each of 231 + 60 models)",
        licence="CC BY 3.0 (Scopia, Reallusion, A. Kator & J. Legaz, Blend Swap authors) and CC0",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_points > STORED:
            raise ConfigError(describe("num_points", self.num_points, f"2..{STORED}"))
        for name in self.classes:
            if name not in CLASSES:
                raise ConfigError(describe("classes", name, ", ".join(CLASSES)))
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(describe("classes", self.classes, "different names"))
        return self

    def build(self, split: Split = "train") -> ArraySource:
        clouds, labels, held_out = load(self.kind, "clouds", "labels", "held_out")
        wanted = np.isin(labels, [CLASSES.index(name) for name in self.classes])
        models = np.flatnonzero(wanted & (held_out == (split == "held_out")))

        def make(row: int) -> Array:
            model = int(models[row % len(models)])
            rng = numpy_generator(0, "furniture3d", model, row // len(models))
            points = clouds[model][rng.permutation(STORED)[: self.num_points]].astype(np.float64)
            if split == "train":
                points = self._vary(points, rng)
            return to_unit_ball(points, f"{self.kind} model {model}")

        known = np.array([self.classes.index(CLASSES[label]) for label in labels[models]])
        count = self.copies * len(models)
        return ArraySource(
            self.kind,
            "points",
            MadeClouds(count, make, self.num_points),
            shape=self.shape(),
            licence=self.info.licence,
            labels=np.resize(known, count),
            class_names=self.classes,
        )

    def _vary(self, points: Array, rng: np.random.Generator) -> Array:
        angle = np.radians(rng.uniform(-self.yaw, self.yaw))
        stretch = 1 + rng.uniform(-self.stretch, self.stretch, 3)
        x, y, z = (points * stretch).T
        turned = (x * np.cos(angle) + z * np.sin(angle), y, z * np.cos(angle) - x * np.sin(angle))
        return np.stack(turned, axis=1)


register_download(
    Download(
        "furniture3d",
        (
            Package(
                "apt",
                "sweethome3d-furniture",
                "",
                members(
                    """
                    e0ebfede91e3be09f2ffddd5f1c6822a332918206b4081fb6d85d02047fb1f39 130398812
                    usr/share/sweethome3d/furniture/*.sh3f
                    """
                ),
                megabytes=119.8,
            ),
        ),
        _convert,
    )
)
