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


@pytest.mark.parametrize("corrected_with", [1.0, 0.7, 2.0**-0.5])
def test_the_noise_of_the_solver_does_not_change_the_target(corrected_with: float) -> None:
    experts = [(1.0, 0.5)]
    made = made_of(experts, (3.0,))
    noisy, clean = ends(made)
    got = flow(made, exact(made, experts, noisy), float(clean), zeta=corrected_with)
    assert got.variance == pytest.approx(0.25 / 3, abs=1e-4)


@pytest.mark.parametrize("kind", ["vp_linear", "rectified_flow", "ve"])
@pytest.mark.parametrize("zeta", [1.0, 1.4])
def test_a_reward_tilts_the_density_exactly(kind: str, zeta: float) -> None:
    rng = random.Random(f"tilt {kind} {zeta}")
    experts = [(rng.uniform(-1, 1), rng.uniform(0.5, 1.0)) for _ in range(2)]
    centre, width = 1.2, 0.5

    def reward(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return -0.5 * ((x[:, 0] - centre) / width).square()

    made = made_of(
        experts, (0.6, 0.9), kind, mode="tilt", tilt=1.5, zeta=zeta, reward=reward
    )  # fmt: skip
    assert made.zeta == zeta
    noisy, clean = ends(made)
    tilt = (centre, width)
    got = flow(made, exact(made, experts, noisy, tilt), float(clean), zeta=zeta)
    assert got == pytest.approx(exact(made, experts, clean, tilt), abs=1e-4)
    wrong = flow(made, exact(made, experts, noisy, tilt), float(clean), zeta=zeta, weighted=False)
    assert abs(wrong.variance - got.variance) > 1e-3 or abs(wrong.mean - got.mean) > 1e-3


@pytest.mark.parametrize("kind", ["vp_linear", "rectified_flow"])
def test_betas_that_change_on_the_way_need_and_use_densities(kind: str) -> None:
    experts = [(0.4, 0.6), (-0.8, 0.9)]
    made = made_of(experts, (2.0, 0.5), kind, noisy_betas=(0.5, 1.0))
    assert made.changing and made.zeta is None
    noisy, clean = ends(made)
    got = flow(made, exact(made, experts, noisy), float(clean))
    assert got == pytest.approx(exact(made, experts, clean), abs=1e-4)


def test_experts_of_other_processes_are_matched_by_their_noise() -> None:
    experts = [(-1.0, 0.6), (1.5, 0.4)]
    denoisers = [
        gaussian(process(kind, **low), mean, std, view)
        for kind, low, view, (mean, std) in zip(
            ("rectified_flow", "ve"),
            ({"t_min": CLEAN}, {"sigma_min": 1e-4, "sigma_max": 1e4}),
            ("flow", "eps"),
            experts,
            strict=True,
        )
    ]
    made = compose(denoisers, process={"kind": "vp_linear", "t_min": CLEAN})
    noisy, clean = ends(made)
    got = flow(made, exact(made, experts, noisy), float(clean))
    assert got == pytest.approx(exact(made, experts, clean), abs=1e-4)


def test_the_prior_knows_its_own_normaliser() -> None:
    experts = [(-1.0, 0.6), (1.5, 0.4), (0.2, 0.9)]
    made = made_of(experts, (1.0, 0.5, 0.7))
    noisy, _ = ends(made)
    assert made.log_prior(1) == pytest.approx(exact(made, experts, noisy).log_z, abs=1e-3)
    assert made.prior_scale == pytest.approx(2.2**-0.5)
