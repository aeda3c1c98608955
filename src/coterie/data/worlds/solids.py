"""Procedural solids: point clouds of furniture and aeroplanes made of boxes, ellipsoids and
cylinders.

A cloud is drawn on the surface of a union of parts with random proportions. Held-out solids have
other proportions than those of training. y is up, x to the side, z to the front. Legend: P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Seed
from coterie.core.rng import numpy_generator
from coterie.data.points.clouds import Array, CloudConfig, MadeClouds, to_unit_ball
from coterie.data.source import SOURCES, ArraySource, SourceInfo, Split

Rng = np.random.Generator
Kind = Literal["box", "ellipsoid", "cylinder"]  # a cylinder is round, its axis is y


def turn(axis: Literal["x", "y", "z"], degrees: float) -> Array:
    """Rotation matrix [3, 3] about one axis."""
    a, b = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    out, angle = np.eye(3), math.radians(degrees)
    out[a, a] = out[b, b] = math.cos(angle)
    out[a, b], out[b, a] = -math.sin(angle), math.sin(angle)
    return out


@dataclass(frozen=True, eq=False)
class Part:
    """A primitive: half sizes along its own axes, turned by ``rotation``, moved to ``centre``.

    A cylinder has half sizes (radius, half its height, radius).
    """

    kind: Kind
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    rotation: Array = field(default_factory=lambda: np.eye(3))

    @property
    def area(self) -> float:
        x, y, z = self.half
        if self.kind == "box":
            return 8 * (x * y + y * z + z * x)
        if self.kind == "cylinder":
            return 2 * math.pi * x * (2 * y + z)
        p = 1.6075  # Thomsen's approximation, within 1.1 %
        mean = ((x * y) ** p + (y * z) ** p + (z * x) ** p) / 3
        return 4 * math.pi * mean ** (1 / p)

    def surface(self, count: int, rng: Rng) -> Array:
        """``count`` points [count, 3] drawn evenly on the surface."""
        draw = {"box": self._box, "ellipsoid": self._ellipsoid, "cylinder": self._cylinder}
        return draw[self.kind](count, rng) @ self.rotation.T + np.asarray(self.centre)

    def inside(self, points: Array) -> Array:
        """bool [P]: strictly inside, by more than rounding."""
        local = (points - np.asarray(self.centre)) @ self.rotation / np.asarray(self.half)
        if self.kind == "box":
            return (np.abs(local) < 1 - 1e-6).all(axis=1)
        if self.kind == "ellipsoid":
            return np.square(local).sum(axis=1) < 1 - 1e-6
        flat = np.square(local[:, [0, 2]]).sum(axis=1) < 1 - 1e-6
        return flat & (np.abs(local[:, 1]) < 1 - 1e-6)

    def _box(self, count: int, rng: Rng) -> Array:
        x, y, z = self.half
        faces = np.array([y * z, z * x, x * y])
        axis = rng.choice(3, size=count, p=faces / faces.sum())
        points = rng.uniform(-1, 1, (count, 3))
        points[np.arange(count), axis] = rng.choice((-1.0, 1.0), count)
        return points * self.half

    def _ellipsoid(self, count: int, rng: Rng) -> Array:
        """Directions, of which those stay (more often) where the sphere is stretched more."""
        half = np.asarray(self.half)
        found = [np.zeros((0, 3))]
        missing = count
        while missing > 0:
            unit = rng.standard_normal((4 * missing, 3))
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            stretch = np.linalg.norm(unit / half, axis=1) * half.min()
            kept = unit[rng.uniform(size=len(unit)) < stretch][:missing]
            found.append(kept)
            missing -= len(kept)
        return np.concatenate(found) * half

    def _cylinder(self, count: int, rng: Rng) -> Array:
        x, y, z = self.half
        on_cap = rng.uniform(size=count) < 2 * math.pi * x * z / self.area
        angle = rng.uniform(0, 2 * math.pi, count)
        radius = np.where(on_cap, np.sqrt(rng.uniform(size=count)), 1.0)
        height = np.where(on_cap, rng.choice((-1.0, 1.0), count), rng.uniform(-1, 1, count))
        return np.stack([x * radius * np.cos(angle), y * height, z * radius * np.sin(angle)], 1)


def sample_union(parts: list[Part], count: int, rng: Rng) -> Array:
    """``count`` points [count, 3] drawn evenly on the outer surface of a union of parts."""
    areas = np.array([part.area for part in parts])
    found: list[Array] = []
    missing = count
    while missing > 0:
        shares = rng.multinomial(2 * missing, areas / areas.sum())
        for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
            points = part.surface(int(share), rng)
            for other in parts[:index] + parts[index + 1 :]:
                points = points[~other.inside(points)]
            found.append(points)
        missing = count - sum(len(points) for points in found)
    every = np.concatenate(found)
    return every[rng.permutation(len(every))[:count]]


def legs(rng: Rng, x: float, z: float, height: float, thick: float) -> list[Part]:
    """Four at the corners (+-x, +-z), from the floor to ``height``; square or round."""
    kind: Kind = "box" if rng.uniform() < 0.6 else "cylinder"
    half = (thick, height / 2, thick)
    return [Part(kind, (i * x, height / 2, k * z), half) for i in (-1, 1) for k in (-1, 1)]


def chair(rng: Rng) -> list[Part]:
    """A seat on four legs or on a foot, a leaning back, sometimes arms."""
    x, z, thick = rng.uniform(0.38, 0.55), rng.uniform(0.38, 0.55), rng.uniform(0.03, 0.08)
    seat, back = rng.uniform(0.75, 1.0), rng.uniform(0.35, 0.75)
    parts = [Part("box", (0, seat, 0), (x, thick, z))]
    if rng.uniform() < 0.75:
        leg = rng.uniform(0.03, 0.06)
        parts += legs(rng, x - leg, z - leg, seat, leg)
    else:
        parts.append(Part("cylinder", (0, seat / 2, 0), (0.06, seat / 2, 0.06)))
        parts.append(Part("cylinder", (0, 0.04, 0), (0.8 * x, 0.04, 0.8 * x)))
    lean = turn("x", -rng.uniform(0, 14))
    middle = lean @ np.array([0, back, 0])
    centre = (0.0, seat + float(middle[1]), -z + thick + float(middle[2]))
    parts.append(Part("box", centre, (x, back, 0.7 * thick), lean))
    if rng.uniform() < 0.4:
        up = rng.uniform(0.25, 0.4)
        for side in (-1, 1):
            at = side * (x - 0.04)
            parts.append(Part("box", (at, seat + up, 0), (0.05, 0.04, z)))
            parts.append(Part("box", (at, seat + up / 2, z - 0.06), (0.04, up / 2, 0.04)))
    return parts


def table(rng: Rng) -> list[Part]:
    """A rectangular or round top on four legs or on one foot, sometimes with a shelf."""
    x, z = rng.uniform(0.6, 1.1), rng.uniform(0.45, 0.75)
    height, thick = rng.uniform(0.55, 1.0), rng.uniform(0.03, 0.07)
    if rng.uniform() < 0.3:
        parts = [Part("cylinder", (0, height, 0), (z + 0.2, thick, z + 0.2))]
        x = z
    else:
        parts = [Part("box", (0, height, 0), (x, thick, z))]
    if rng.uniform() < 0.7:
        leg, inset = rng.uniform(0.03, 0.07), rng.uniform(0.08, 0.2)
        parts += legs(rng, x - inset, z - inset, height, leg)
        if rng.uniform() < 0.3:
            low = rng.uniform(0.2, 0.5) * height
            parts.append(Part("box", (0, low, 0), (x - inset, 0.03, z - inset)))
    else:
        parts.append(Part("cylinder", (0, height / 2, 0), (0.09, height / 2, 0.09)))
        parts.append(Part("cylinder", (0, 0.04, 0), (0.6 * z, 0.04, 0.6 * z)))
    return parts


def plane(rng: Rng) -> list[Part]:
    """A body along z, swept wings, tailplane and fin; engines under the wings or a propeller."""
    body, span, sweep = rng.uniform(0.9, 1.1), rng.uniform(0.6, 1.1), rng.uniform(0, 35)
    thick = rng.uniform(0.1, 0.15)
    parts = [Part("ellipsoid", (0, 0, 0), (thick, thick, body))]
    chord, low = rng.uniform(0.12, 0.2), rng.uniform(-0.6, 0.6) * thick
    for side in (-1, 1):
        rotation = turn("y", side * sweep)
        wing = rotation @ np.array([side * span / 2, 0, 0])
        parts.append(Part("box", (wing[0], low, wing[2] + 0.1), (span / 2, 0.02, chord), rotation))
        tail = rotation @ np.array([side * 0.18 * span, 0, 0])
        half = (0.18 * span, 0.015, 0.5 * chord)
        parts.append(Part("box", (tail[0], 0.03, tail[2] - 0.82 * body), half, rotation))
    fin = rng.uniform(0.14, 0.24)
    parts.append(Part("box", (0, fin, -0.84 * body), (0.015, fin, 0.45 * chord), turn("x", -sweep)))
    if rng.uniform() < 0.6:
        at = rng.uniform(0.3, 0.5) * span
        back = 0.1 - at * math.tan(math.radians(sweep)) + 0.6 * chord
        for side in (-1, 1):
            parts.append(Part("ellipsoid", (side * at, low - 0.07, back), (0.05, 0.05, 0.16)))
    else:
        parts.append(Part("box", (0, 0, body), (0.02, 0.25, 0.015), turn("z", rng.uniform(0, 90))))
    return parts


def lamp(rng: Rng) -> list[Part]:
    """A foot, a pole and a shade; short ones stand on tables, tall ones on the floor."""
    height, shade = rng.uniform(0.8, 1.9), rng.uniform(0.22, 0.45)
    foot = rng.uniform(0.18, 0.4)
    kind: Kind = "cylinder" if rng.uniform() < 0.6 else "ellipsoid"
    return [
        Part("cylinder", (0, 0.03, 0), (foot, 0.03, foot)),
        Part("cylinder", (0, height / 2, 0), (0.03, height / 2, 0.03)),
        Part(kind, (0, height, 0), (shade, rng.uniform(0.18, 0.35), shade)),
    ]


SOLIDS: dict[str, Callable[[Rng], list[Part]]] = {
    "chair": chair,
    "table": table,
    "plane": plane,
    "lamp": lamp,
}


@SOURCES.register
class SolidsConfig(CloudConfig):
    """Point clouds of procedural furniture and aeroplanes."""

    kind: Literal["solids"] = "solids"
    classes: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(SOLIDS)
    """kinds of solids, in turn"""
    count: int = Field(default=4_000, ge=1, le=10_000_000)  # training clouds
    held_out: int = Field(default=400, ge=1, le=10_000_000)
    """held-out clouds, with other proportions"""
    seed: Seed = 0  # of the proportions
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="procedural solids (synthetic): class = kind of furniture, or plane",
        modality="points",
        shape="512x3, or any number of points",
        count="any (4000 + 400)",
        licence="none needed: generated",
    )

    @model_validator(mode="after")
    def _known_classes(self) -> Self:
        for name in self.classes:
            if name not in SOLIDS:
                raise ConfigError(describe("classes", name, ", ".join(SOLIDS)))
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(describe("classes", self.classes, "different names"))
        return self

    def build(self, split: Split = "train") -> ArraySource:
        count = self.count if split == "train" else self.held_out
        names, points, seed = self.classes, self.num_points, self.seed

        def make(row: int) -> Array:
            rng = numpy_generator(seed, "solids", split, row)
            parts = SOLIDS[names[row % len(names)]](rng)
            return to_unit_ball(sample_union(parts, points, rng), f"solids {row}")

        return ArraySource(
            self.kind,
            "points",
            MadeClouds(count, make, points),
            shape=self.shape(),
            licence=self.info.licence,
            labels=np.arange(count) % len(names),
            class_names=names,
        )
