"""Weather laid over clean pictures: rain, drops on the lens, snow, haze.

Every operator is ``operator(picture [3, H, W] in [0, 1], strength in [0, 1], rng) -> the same``,
the identity at strength 0, and a function of its generator alone. Haze follows the scattering model
``I = J t + A (1 - t)``, ``t = exp(-beta depth)``; the others are layers of light.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy import ndimage
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition
from coterie.core.rng import numpy_generator
from coterie.data.images.photos import PhotosConfig
from coterie.data.ordering import order
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, as_rows

Operator = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
Weather = Literal["rain", "drops", "snow", "haze"]


def haze_through(picture: np.ndarray, passing: np.ndarray, light: float) -> np.ndarray:
    """``picture * passing + light * (1 - passing)``; ``passing`` [H, W] is the share t that
    reaches the camera, ``light`` A the brightness of the air."""
    return picture * passing + light * (1 - passing)


def haze(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Distance grows upwards, with smooth random relief."""
    height, width = picture.shape[1:]
    relief = ndimage.gaussian_filter(rng.standard_normal((height, width)), height / 8)
    relief = (relief - relief.min()) / max(float(np.ptp(relief)), 1e-6)
    depth = 0.4 + 0.6 * np.linspace(1, 0, height)[:, None] + 0.6 * relief
    passing = np.exp(-2.0 * strength * depth)
    return haze_through(picture, passing, rng.uniform(0.75, 0.95))


def rain(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Bright streaks of one direction, and a veil."""
    height, width = picture.shape[1:]
    seeds = (rng.random((height, width)) < 0.03 * strength).astype(np.float64)
    length = int(rng.integers(height // 8, height // 4))
    slope = rng.uniform(-0.6, 0.6)
    streaks = np.zeros_like(seeds)
    for step in range(length):
        streaks += np.roll(seeds, (step, round(slope * step)), axis=(0, 1)) * (1 - step / length)
    streaks = ndimage.gaussian_filter(streaks, 0.5)
    veil = 0.12 * strength
    return picture * (1 - veil) + 0.7 * veil + 0.8 * np.clip(streaks, 0, 1) * (1 - picture)


def snow(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Soft flakes of three sizes: the nearer, the larger and the rarer."""
    height, width = picture.shape[1:]
    cover = np.zeros((height, width))
    for radius, density in ((0.6, 0.03), (1.2, 0.012), (2.2, 0.004)):
        flakes = (rng.random((height, width)) < density * strength).astype(np.float64)
        soft = ndimage.gaussian_filter(flakes, radius) * (2 * np.pi * radius**2)
        cover = 1 - (1 - cover) * (1 - np.clip(soft, 0, 1))
    return picture * (1 - 0.95 * cover) + 0.95 * cover


def drops(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Drops on the lens: each disc shows its surroundings upside down and out of focus."""
    height, width = picture.shape[1:]
    blurred = np.stack([ndimage.gaussian_filter(channel, 1.5) for channel in picture])
    out = picture.copy()
    for _ in range(rng.binomial(16, 0.75 * strength)):
        top, left = rng.uniform(0, height), rng.uniform(0, width)
        radius, oval = rng.uniform(0.04, 0.13) * height, rng.uniform(0.8, 1.25)
        rows = np.arange(max(0, int(top - radius)), min(height, int(top + radius) + 2))
        columns = np.arange(max(0, int(left - 1.3 * radius)), min(width, int(left + 1.3 * radius)))
        y, x = rows[:, None] - top, columns - left
        inside = np.clip(1 - np.hypot(y, x * oval) / radius, 0, 1)
        seen_y = np.clip(top - 3 * y, 0, height - 1).astype(int)
        seen_x = np.clip(left - 3 * x, 0, width - 1).astype(int)
        shown = blurred[:, seen_y, seen_x] + 0.08 * inside
        here = np.ix_(np.arange(3), rows, columns)
        alpha = np.clip(3 * inside, 0, 1)
        out[here] = out[here] * (1 - alpha) + shown * alpha
    return out


WEATHERS: dict[Weather, Operator] = {"rain": rain, "drops": drops, "snow": snow, "haze": haze}


@SOURCES.register
class WeatherConfig(SourceConfig):
    """Clean photographs as ``x``, the same under synthetic weather as ``cond.channels``; class =
    weather.

    Sample i has its own crop, weather, strength and seed, all fixed by i. Held-out samples have
    other photographs and seeds.
    """

    kind: Literal["weather"] = "weather"
    size: int = Field(default=64, ge=8, le=96)  # side of a crop in pixels
    count: int = Field(default=4000, ge=1, le=1_000_000)  # training samples; a tenth held out
    weathers: Annotated[tuple[Weather, ...], Field(min_length=1)] = tuple(WEATHERS)
    """kinds of weather, in turn"""
    strength: tuple[float, float] = (0.5, 1.0)  # drawn evenly between these
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="photographs under synthetic rain, drops, snow and haze, with the clean ones",
        modality="restoration",
        shape="3x64x64",
        count="4000 + 400",
        licence=PhotosConfig.info.licence,
    )

    @model_validator(mode="after")
    def _strengths(self) -> Self:
        low, high = self.strength
        if not 0 <= low <= high <= 1:
            raise ConfigError(describe("strength", self.strength, "0 <= low <= high <= 1"))
        return self

    def build(self, split: Split = "train") -> WeatherSource:
        return WeatherSource(self, split)


class WeatherSource:
    """Pairs made when they are first asked for, and kept as u8."""

    def __init__(self, config: WeatherConfig, split: Split) -> None:
        self.name: str = config.kind
        self.modality = "restoration"
        self.shape: tuple[int, ...] = (3, config.size, config.size)
        self.class_names: tuple[str, ...] = tuple(config.weathers)
        self.num_classes = len(self.class_names)
        self.licence = config.info.licence
        self._config, self._split = config, split
        count = config.count if split == "train" else max(1, config.count // 10)
        self._photos = PhotosConfig().build(split)
        self._rows = order(0, 0, count, len(self._photos))
        self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, indices: object) -> Batch:
        rows = as_rows(indices, len(self), self.name)
        pairs = [self._pair(index) for index in rows.tolist()]
        clean, bad = (scaled([pair[part] for pair in pairs], self.shape) for part in (0, 1))
        label = torch.from_numpy(rows % self.num_classes)
        return Batch(clean, Condition(label=label, channels=bad), torch.from_numpy(rows))

    def _pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._made:
            row = self._rows[index]
            self._made[index] = _pair(self._config, self._split, index, self._photos, row)
        return self._made[index]


def scaled(pictures: Sequence[np.ndarray], shape: tuple[int, ...]) -> Tensor:
    """u8 pictures of ``shape`` -> f32 [B, *shape] in [-1, 1]."""
    stacked = np.stack(pictures) if pictures else np.zeros((0, *shape), np.uint8)
    return torch.from_numpy(stacked).float().div_(127.5).sub_(1.0)


def _pair(
    config: WeatherConfig, split: Split, index: int, photos: object, row: int
) -> tuple[np.ndarray, np.ndarray]:
    """(clean, degraded), both u8 [3, size, size]."""
    rng = numpy_generator(0, "weather", split, index)
    whole = photos.get(np.array([row])).x[0].numpy()  # type: ignore[attr-defined]
    top, left = (int(rng.integers(0, edge - config.size + 1)) for edge in whole.shape[1:])
    clean = (whole[:, top : top + config.size, left : left + config.size] + 1) / 2
    if rng.random() < 0.5:
        clean = clean[:, :, ::-1]
    operator = WEATHERS[config.weathers[index % len(config.weathers)]]
    bad = operator(clean, float(rng.uniform(*config.strength)), rng)
    return _to_u8(clean), _to_u8(bad)


def _to_u8(picture: np.ndarray) -> np.ndarray:
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
