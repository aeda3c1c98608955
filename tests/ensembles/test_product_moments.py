"""Compositions of Gaussians: mean, variance and normaliser of the weighted law, exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gaussian_moments import F64, exact, flow, gaussian, process

from coterie.ensembles.product import Composition, compose

CLEAN = 1e-5


def made_of(
    experts: list[tuple[float, float]], betas: Any, kind: str = "vp_linear", **settings: Any
) -> Composition:
    views = ("x0", "eps", "score", "flow", "v")
    range_of_time = {"t_min": CLEAN} if kind != "ve" else {"sigma_min": 1e-3}
    own = process(kind, **range_of_time)
    denoisers = [
        gaussian(own, mean, std, views[index % len(views)])
        for index, (mean, std) in enumerate(experts)
    ]
    return compose(denoisers, betas, **settings)


def ends(made: Composition) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([made.process.t_max], dtype=F64),
        torch.tensor([made.process.t_min], dtype=F64),
    )


CASES = {
    "power 3": ([(1.0, 0.5)], (3.0,), (1.0, 0.25 / 3), 0.05),
    "power 1/2": ([(1.0, 0.5)], (0.5,), (1.0, 0.5), 3.359),
    "product": ([(-1.0, 0.6), (1.5, 0.4)], (1.0, 1.0), (0.7308, 0.11077), 0.07618),
    "guidance 3": ([(0.0, 1.0), (1.0, 0.6)], (-2.0, 3.0), (1.3158, 0.15789), 0.11182),
}
"""Experts, betas; mean and variance with weights; variance without."""


@pytest.mark.parametrize("name", CASES)
def test_weighted_moments_are_those_of_the_target(name: str) -> None:
    experts, betas, (mean, variance), unweighted = CASES[name]
    made = made_of(experts, betas)
    noisy, clean = ends(made)
    start = exact(made, experts, noisy)
    got = flow(made, start, float(clean))
    assert got.mean == pytest.approx(mean, abs=1e-4)
    assert got.variance == pytest.approx(variance, abs=1e-4)
    assert got.log_z == pytest.approx(exact(made, experts, clean).log_z, abs=1e-4)
    plain = flow(made, start, float(clean), weighted=False)
    assert plain.variance == pytest.approx(unweighted, abs=1e-3)


@pytest.mark.parametrize("kind", ["vp_linear", "cosine", "rectified_flow", "ve", "trig"])
@pytest.mark.parametrize("case", range(3))
def test_moments_of_random_products_in_every_process(kind: str, case: int) -> None:
    rng = random.Random(f"{kind} {case}")
    experts = [(rng.uniform(-1.5, 1.5), rng.uniform(0.3, 1.2)) for _ in range(rng.randint(1, 4))]
    betas = tuple(rng.uniform(0.3, 2.0) for _ in experts)
    made = made_of(experts, betas, kind)
    noisy, clean = ends(made)
    got = flow(made, exact(made, experts, noisy), float(clean), zeta=rng.uniform(0.7, 1.3))
    wanted = exact(made, experts, clean)
    assert got == pytest.approx(wanted, abs=1e-4)
