"""Toys have the densities they claim; the mixture's closed forms agree with each other."""

import math

import numpy as np
import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.data import SOURCES, Mixture, build_source
from coterie.data.worlds.toys import GaussianConfig, GaussianMixtureConfig


def _mixture():
    generator = torch.Generator().manual_seed(0)
    return Mixture(
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        torch.randn(3, 2, generator=generator, dtype=torch.float64),
        torch.rand(3, 2, generator=generator, dtype=torch.float64) * 0.4 + 0.1,
    )


def test_density_integrates_to_one():
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    for alpha, sigma in ((1.0, 0.0), (0.6, 0.8)):
        total = _mixture().log_prob(points, alpha, sigma).exp().sum() * cell
        assert abs(float(total) - 1) < 1e-6


def test_denoiser_satisfies_tweedie():
    # E[x0 | x] = (x + sigma^2 grad log p(x)) / alpha, with the gradient from autograd.
    mixture = _mixture()
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    for alpha, sigma in ((1.0, 0.3), (0.6, 0.8), (0.05, 1.0)):
        (score,) = torch.autograd.grad(mixture.log_prob(x, alpha, sigma).sum(), x)
        wanted = (x + sigma**2 * score) / alpha
        assert torch.allclose(mixture.denoise(x, alpha, sigma), wanted, atol=1e-10)


def test_denoiser_is_the_conditional_mean_of_samples():
    mixture = _mixture()
    points, _ = mixture.sample(200_000, np.random.default_rng(0))
    x0 = torch.from_numpy(points).double()
    alpha, sigma = 0.7, 0.6
    query = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    weight = torch.softmax(-((query - alpha * x0) ** 2).sum(1) / (2 * sigma**2), dim=0)
    wanted = (weight[:, None] * x0).sum(0)
    assert torch.allclose(mixture.denoise(query, alpha, sigma)[0], wanted, atol=0.01)


def test_posterior_is_certain_without_noise_and_the_prior_under_pure_noise():
    mixture = GaussianMixtureConfig(weights=(1.0, 3.0), num_modes=2).mixture()
    assert torch.allclose(mixture.posterior(mixture.means, 1.0, 1e-3), torch.eye(2).double())
    prior = mixture.posterior(torch.randn(5, 2), 0.0, 1.0)
    assert torch.allclose(prior, torch.tensor([0.25, 0.75]).expand(5, 2), atol=1e-6)


def test_gaussian_has_its_moments():
    config = GaussianConfig(mean=(0.5, -0.25, 0.0), std=(0.1, 0.2, 0.4))
    x = config.build().get(np.arange(20_000)).x
    assert torch.allclose(x.mean(0), torch.tensor(config.mean), atol=0.02)
    assert torch.allclose(x.std(0), torch.tensor(config.std), rtol=0.03)


@pytest.mark.parametrize(("layout", "modes"), [("ring", 8), ("grid", 9), ("grid", 1)])
def test_modes_are_where_they_should_be(layout, modes):
    config = GaussianMixtureConfig(layout=layout, num_modes=modes, dim=3)
    source = config.build()
    batch = source.get(np.arange(len(source)))
    means = config.mixture().means
    gap = torch.cdist(batch.x.double(), means)
    assert (gap.gather(1, batch.cond.label[:, None]) < 6 * config.std).all()
    assert np.bincount(batch.cond.label).min() > 0.8 * len(source) / modes
    if modes > 1:
        assert torch.pdist(means).min() > 4 * config.std
    if layout == "ring":
        assert torch.allclose(means.norm(dim=1), torch.full((modes,), 0.8).double())


def test_checkerboard_leaves_light_cells_empty():
    x = build_source("checkerboard").get(np.arange(20_000)).x
    cells = ((x + 1) * 2).floor().long()
    assert (cells.sum(1) % 2 == 0).all()
    assert np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16).max() < 20_000 / 8 * 1.1


def test_moons_and_roll_lie_on_their_curves():
    moons = build_source({"kind": "two-moons", "noise": 0.0}).get(np.arange(500))
    raw = moons.x * 1.5 + torch.tensor([0.5, 0.25])
    centre = torch.stack([moons.cond.label, moons.cond.label / 2], dim=1)
    assert torch.allclose((raw - centre).norm(dim=1), torch.ones(500), atol=1e-5)
    roll = build_source({"kind": "swiss-roll", "noise": 0.0}).get(np.arange(500)).x
    radius = roll.norm(dim=1) * 4.5 * math.pi
    angle = torch.atan2(roll[:, 1], roll[:, 0])
    off = (radius - angle) / (2 * math.pi)
    assert torch.allclose(off, off.round(), atol=1e-4)


def test_seed_and_split_choose_the_points():
    same = [build_source({"kind": "swiss-roll", "seed": 1}).get([0]).x for _ in range(2)]
    other = build_source({"kind": "swiss-roll", "seed": 2}).get([0]).x
    assert torch.equal(*same) and not torch.equal(same[0], other)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "gaussian", "std": (1.0,)}, "std"),
        ({"kind": "gaussian", "std": (1.0, -1.0)}, "std"),
        ({"kind": "gaussian-mixture", "layout": "grid", "num_modes": 8}, "num_modes"),
        ({"kind": "gaussian-mixture", "weights": (1.0,)}, "weights"),
        ({"kind": "checkerboard", "cells": 1}, "cells"),
    ],
)
def test_impossible_toys_are_named(options, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        SOURCES.parse(options)
