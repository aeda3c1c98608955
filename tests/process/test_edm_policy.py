"""EDM as diffusion policies use it: unit variances, loss on F, times, ten steps of DDIM."""

from __future__ import annotations

import math

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.process import PRECONDITIONS, PROCESSES, TIMES
from coterie.process.closed_form import ExactDenoiser, Mixture
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample
from coterie.train.learning_rate import SCHEDULES

VE = PROCESSES.parse({"kind": "ve", "sigma_min": 0.001, "sigma_max": 80.0}).build()
EDM = PRECONDITIONS.parse("edm").build(VE)


@pytest.mark.parametrize("sigma", [0.001, 0.05, 0.5, 3.0, 80.0])
def test_input_and_target_have_unit_variance(sigma: float) -> None:
    """For data of standard deviation sigma_data; and F = target gives the action back."""
    rng = torch.Generator().manual_seed(0)
    action = 0.5 * torch.randn(200_000, generator=rng, dtype=torch.float64)
    noisy = action + sigma * torch.randn(200_000, generator=rng, dtype=torch.float64)
    c_in, c_skip, c_out = EDM.coefficients(torch.tensor(sigma, dtype=torch.float64))
    target = (action - c_skip * noisy) / c_out
    assert float((c_in * noisy).var()) == pytest.approx(1.0, rel=0.02)
    assert float(target.var()) == pytest.approx(1.0, rel=0.02)
    assert torch.allclose(c_skip * noisy + c_out * target, action, atol=1e-12)


def test_times_are_log_logistic_and_cut_off() -> None:
    draw = TIMES.parse("log_logistic_sigma").build(VE)
    sigma = draw.sample(200_000, torch.Generator().manual_seed(0)).double()
    assert float(sigma.min()) >= 0.001 and float(sigma.max()) <= 80.0
    for x in (0.1, 0.5, 2.0, 20.0):  # the distribution function of ln sigma
        share = 1 / (1 + math.exp(-(math.log(x) - math.log(0.5)) / 0.5))
        assert float((sigma < x).double().mean()) == pytest.approx(share, abs=4e-3)
    narrow = PROCESSES.parse({"kind": "ve", "sigma_min": 0.4, "sigma_max": 0.6}).build()
    cut = TIMES.parse("log_logistic_sigma").build(narrow)
    inside = cut.sample(20_000, torch.Generator().manual_seed(0))
    assert float(inside.median()) == pytest.approx(0.49, abs=0.01)
    # Truncated, not clamped: no heaps at the ends.
    assert float((inside <= 0.402).float().mean()) < 0.02


@pytest.mark.parametrize("steps", [10, 100])
def test_steps_of_the_exact_denoiser_are_those_of_first_order(steps: int) -> None:
    """Noise levels fall exponentially to 0.001, then to 0, where the answer is the denoised one.

    A step takes (x - m) times (s^2 + sigma sigma') / (s^2 + sigma^2): ten of them keep the mean
    and 0.73 of the standard deviation s, a hundred 0.96 of it.
    """
    times = GRIDS.parse("lambda").build(VE, steps)
    assert len(times) == steps + 1 and (float(times[0]), float(times[-1])) == (80.0, 0.0)
    assert float(times[-2]) == pytest.approx(0.001)
    ratios = times[1:-1] / times[:-2]
    assert torch.allclose(ratios, ratios[:1].expand(steps - 1))
    mean = torch.tensor([0.3, -0.2])
    denoiser = ExactDenoiser(VE, Mixture.gaussian(mean, 0.5))
    noise = SampleNoise(list(range(2000)))
    x = sample(
        denoiser,
        initial_noise(VE, (2,), noise),
        Condition(),
        solver=SOLVERS.parse("ddim"),
        grid=GRIDS.parse("lambda"),
        steps=steps,
    )
    factor = ((0.25 + times[:-1] * times[1:]) / (0.25 + times[:-1].square())).prod()
    assert torch.isfinite(x).all()
    assert torch.allclose(x.mean(0), mean, atol=0.04)
    assert torch.allclose(x.std(0), 80 * factor.float().expand(2), rtol=0.05)
    assert float(80 * factor) == pytest.approx(0.5 * {10: 0.73, 100: 0.96}[steps], rel=0.02)


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    rate = SCHEDULES.parse("tri_stage").build()
    assert rate(0.0) == pytest.approx(0.1) and rate(0.01) == pytest.approx(0.55)
    assert rate(0.02) == rate(0.06) == rate(0.1) == 1.0
    assert rate(0.55) == pytest.approx(1e-3) and rate(1.0) == pytest.approx(1e-6)
    with pytest.raises(ConfigError, match=r"hold: 0\.99 .*less than 0\.98"):
        SCHEDULES.parse({"kind": "tri_stage", "hold": 0.99})
