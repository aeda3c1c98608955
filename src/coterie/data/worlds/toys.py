"""Toy distributions: points from a known density.

Every toy keeps its samples at about [-1, 1]. The Gaussian ones have their :class:`Mixture`, whose
noised density and exact denoiser are known, so that solvers and compositions can be tested. Legend:
B batch, K modes, D dimensions, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Seed
from coterie.core.rng import numpy_generator
from coterie.data.source import SOURCES, ArraySource, SourceConfig, SourceInfo, Split


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K axis-aligned Gaussians: ``weights`` [K], ``means`` [K, D], ``stds`` [K, D]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_prob(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """log density [B] of ``alpha x0 + sigma eps`` at x [B, D]; x's dtype is used."""
        return torch.logsumexp(self.joint(x, alpha, sigma), dim=1)

    def posterior(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """P(mode | x_t) [B, K]."""
        return torch.softmax(self.joint(x, alpha, sigma), dim=1)

    def joint(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """log of (weight times density) of every mode, [B, K]."""
        means, variance = alpha * self.means.to(x), self._variance(x, alpha, sigma)
        gap = (x[:, None, :] - means).square() / variance
        norm = torch.log(2 * math.pi * variance)
        return self.weights.to(x).log() - 0.5 * (gap + norm).sum(dim=2)

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x_t = x], [B, D]: the optimal denoiser."""
        means, stds = self.means.to(x), self.stds.to(x)
        gain = alpha * stds.square() / self._variance(x, alpha, sigma)
        per_mode = means + gain * (x[:, None, :] - alpha * means)
        return (self.posterior(x, alpha, sigma)[:, :, None] * per_mode).sum(dim=1)

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(points f32 [count, D], modes i64 [count])."""
        modes = rng.choice(len(self.weights), size=count, p=self.weights.double().numpy())
        noise = rng.standard_normal((count, self.means.shape[1]))
        points = self.means.numpy()[modes] + self.stds.numpy()[modes] * noise
        return points.astype(np.float32), modes.astype(np.int64)

    def _variance(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (alpha * self.stds.to(x)).square() + sigma**2


class ToyConfig(SourceConfig):
    """Options of every toy: ``count`` training points, a quarter as many held out."""

    count: int = Field(default=20_000, ge=4, le=100_000_000)
    """training points; a quarter as many are held out"""
    seed: Seed = 0  # of the points

    def _draw(self, split: Split) -> tuple[int, np.random.Generator]:
        count = self.count if split == "train" else self.count // 4
        return count, numpy_generator(self.seed, "toy", self.kind, split)

    def _source(
        self, points: np.ndarray, labels: np.ndarray | None = None, names: tuple[str, ...] = ()
    ) -> ArraySource:
        return ArraySource(
            self.kind,
            "vector",
            points.astype(np.float32),
            shape=points.shape[1:],
            licence="none needed: generated",
            labels=labels,
            class_names=names,
        )


def _info(summary: str, shape: str = "2") -> SourceInfo:
    return SourceInfo(summary, "vector", shape, "any (20000 + 5000)", "none needed: generated")


@SOURCES.register
class GaussianConfig(ToyConfig):
    """One axis-aligned Gaussian."""

    kind: Literal["gaussian"] = "gaussian"
    mean: tuple[float, ...] = Field(default=(0.0, 0.0), min_length=1)  # per dimension
    std: tuple[float, ...] = Field(default=(0.5, 0.5), min_length=1)
    """standard deviation per dimension"""
    info: ClassVar[SourceInfo] = _info("one Gaussian", "D")

    @model_validator(mode="after")
    def _one_std_per_dimension(self) -> Self:
        if len(self.std) != len(self.mean) or min(self.std) <= 0:
            allowed = f"{len(self.mean)} positive numbers, one per dimension of mean"
            raise ConfigError(describe("std", self.std, allowed))
        return self

    def mixture(self) -> Mixture:
        means, stds = torch.tensor([self.mean]), torch.tensor([self.std])
        return Mixture(torch.ones(1), means, stds)

    def build(self, split: Split = "train") -> ArraySource:
        return self._source(self.mixture().sample(*self._draw(split))[0])


@SOURCES.register
class GaussianMixtureConfig(ToyConfig):
    """Equally wide modes on a ring or a square grid; the class is the mode."""

    kind: Literal["gaussian-mixture"] = "gaussian-mixture"
    num_modes: int = Field(default=8, ge=1, le=1024)  # number of Gaussians
    layout: Literal["ring", "grid"] = "ring"  # of the means
    dim: int = Field(default=2, ge=2, le=1024)  # modes differ in the first two only
    radius: float = Field(default=0.8, gt=0)  # of the ring, or half the side of the grid
    std: float = Field(default=0.05, gt=0)  # standard deviation of a mode
    weights: tuple[float, ...] | None = None  # None = equal
    info: ClassVar[SourceInfo] = _info("Gaussian modes on a ring or grid", "D")

    @model_validator(mode="after")
    def _modes_fit(self) -> Self:
        side = math.isqrt(self.num_modes)
        if self.layout == "grid" and side * side != self.num_modes:
            near = f"a square number such as {side * side} or {(side + 1) ** 2}"
            raise ConfigError(describe("num_modes", self.num_modes, near, "the layout is a grid"))
        if self.weights is not None and (
            len(self.weights) != self.num_modes or min(self.weights) <= 0
        ):
            allowed = f"{self.num_modes} positive numbers"
            raise ConfigError(describe("weights", self.weights, allowed))
        return self

    def mixture(self) -> Mixture:
        means = torch.zeros(self.num_modes, self.dim, dtype=torch.float64)
        if self.layout == "ring":
            angle = torch.arange(self.num_modes, dtype=torch.float64) * (2 * math.pi / len(means))
            means[:, 0], means[:, 1] = self.radius * angle.cos(), self.radius * angle.sin()
        else:
            side = math.isqrt(self.num_modes)
            steps = torch.linspace(-self.radius, self.radius, side) if side > 1 else torch.zeros(1)
            means[:, :2] = torch.cartesian_prod(steps, steps).reshape(-1, 2)
        raw = torch.tensor(self.weights or (1.0,) * self.num_modes, dtype=torch.float64)
        return Mixture(raw / raw.sum(), means, torch.full_like(means, self.std))

    def build(self, split: Split = "train") -> ArraySource:
        points, modes = self.mixture().sample(*self._draw(split))
        return self._source(points, modes, tuple(f"mode {k}" for k in range(self.num_modes)))


@SOURCES.register
class TwoMoonsConfig(ToyConfig):
    kind: Literal["two-moons"] = "two-moons"
    noise: float = Field(default=0.03, ge=0)  # standard deviation about the half circles
    info: ClassVar[SourceInfo] = _info("two interleaved half circles")

    def build(self, split: Split = "train") -> ArraySource:
        count, rng = self._draw(split)
        labels = rng.integers(0, 2, count)
        angle = rng.uniform(0, math.pi, count)
        sign = 1 - 2 * labels
        points = np.stack([labels + sign * np.cos(angle), labels / 2 + sign * np.sin(angle)], 1)
        points = (points - (0.5, 0.25)) / 1.5 + self.noise * rng.standard_normal((count, 2))
        return self._source(points, labels, ("upper", "lower"))


@SOURCES.register
class CheckerboardConfig(ToyConfig):
    kind: Literal["checkerboard"] = "checkerboard"
    cells: int = Field(default=4, ge=2, le=64)  # per side
    info: ClassVar[SourceInfo] = _info("uniform on the dark cells of a board")

    def build(self, split: Split = "train") -> ArraySource:
        count, rng = self._draw(split)
        dark = np.argwhere(np.indices((self.cells, self.cells)).sum(0) % 2 == 0)
        labels = rng.integers(0, len(dark), count)
        points = (dark[labels] + rng.uniform(size=(count, 2))) * (2 / self.cells) - 1
        return self._source(points, labels, tuple(f"cell {row},{col}" for row, col in dark))


@SOURCES.register
class SwissRollConfig(ToyConfig):
    kind: Literal["swiss-roll"] = "swiss-roll"
    noise: float = Field(default=0.02, ge=0)  # standard deviation about the spiral
    info: ClassVar[SourceInfo] = _info("a spiral; no classes")

    def build(self, split: Split = "train") -> ArraySource:
        count, rng = self._draw(split)
        angle = 1.5 * math.pi * (1 + 2 * rng.uniform(size=count))
        points = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        points = points / (4.5 * math.pi) + self.noise * rng.standard_normal((count, 2))
        return self._source(points)
