"""The discrete process whose alphas are given as a table, down to pure noise at the last index."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition
from coterie.process import PROCESSES, ExactDenoiser, Mixture, convert
from coterie.solvers import GRIDS, SOLVERS, integrate

F64 = torch.float64
STEPS = 40


def squares(zero: bool) -> tuple[float, ...]:
    roots = (1.0 - torch.linspace(1e-3, 0.2, STEPS, dtype=F64)).cumprod(0).sqrt()
    if zero:  # as published for zero terminal SNR: shifted to 0 at the end, scaled at the start
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return tuple(roots.square().tolist())


def table(zero: bool = True) -> Any:
    fields = {"kind": "ddpm", "schedule": "table", "num_steps": STEPS}
    return PROCESSES.parse({**fields, "alphas_cumprod": squares(zero)}).build()


def test_A1_a_table_of_a_known_schedule_is_that_schedule() -> None:
    known = {"kind": "ddpm", "num_steps": STEPS, "beta_start": 1e-3, "beta_end": 0.2}
    plain, found = PROCESSES.parse(known).build(), table(zero=False)
    t = torch.linspace(plain.t_clean, 1.0, 333, dtype=F64)[1:]
    for name in ("alpha", "sigma", "lam", "dalpha", "dsigma", "dlam"):
        torch.testing.assert_close(getattr(found, name)(t), getattr(plain, name)(t))
    torch.testing.assert_close(found.betas(), plain.betas())


def test_A1_alpha_is_zero_at_the_last_index_and_nothing_is_undefined_there() -> None:
    process = table()
    grid = process.time_of_index(torch.arange(STEPS), F64)
    wanted = torch.tensor(squares(True), dtype=F64)
    torch.testing.assert_close(process.alpha(grid).square(), wanted, rtol=1e-12, atol=1e-15)
    end = torch.ones(1, dtype=F64)
    assert float(process.alpha(end)) == 0.0 and float(process.sigma(end)) == 1.0
    assert float(process.lam(end)) == float("-inf") and process.prior_std() == 1.0
    t = torch.linspace(process.t_clean, 1.0, 2001, dtype=F64)
    torch.testing.assert_close(process.time_of_lam(process.lam(t[1:])), t[1:], rtol=0, atol=1e-9)
    for value, rate in (("alpha", process.dalpha), ("sigma", process.dsigma)):
        level = getattr(process, value)(t)
        slope = rate(t)
        assert bool(torch.isfinite(slope[1:]).all())
        change = (slope[1:-1] + slope[2:]) / 2 * t.diff()[1:]  # by trapezia, kinks included
        torch.testing.assert_close(level[1:] - level[1], torch.cat([end * 0, change.cumsum(0)]),
                                   rtol=0, atol=2e-3)  # fmt: skip
    assert bool((process.alpha(t).diff() < 0).all())


@pytest.mark.parametrize("view", ["v", "x0", "flow"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "ancestral"])
def test_A1_sampling_starts_at_pure_noise(view: str, solver: str) -> None:
    process = table()
    data = Mixture.gaussian(torch.full((4,), 1.5, dtype=F64), 0.3)
    denoiser = ExactDenoiser(process, data, view)  # type: ignore[arg-type]
    eps = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    end = torch.ones(400, dtype=F64)
    answer = denoiser(eps, end, Condition()).value
    mean = convert(process, answer, view, "x0", eps, end)
    torch.testing.assert_close(mean, torch.full_like(eps, 1.5))  # noise tells nothing
    settings = {"kind": solver, **({"eta": 0.0} if solver == "ancestral" else {})}
    times = GRIDS.parse("uniform").build(process, STEPS)
    made = integrate(denoiser, eps, Condition(), times, SOLVERS.parse(settings).build())
    assert abs(float(made.mean()) - 1.5) < 0.05 and abs(float(made.std()) - 0.3) < 0.06


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alphas_cumprod": (0.9, 0.5)}, "alphas_cumprod: '2 numbers'"),
        ({"alphas_cumprod": (0.9, 0.95, 0.1), "num_steps": 3}, "alphas_cumprod.1: 0.95"),
        ({"alphas_cumprod": (1.0, 0.5, 0.1), "num_steps": 3}, "alphas_cumprod.0: 1.0"),
        ({"alphas_cumprod": (0.9, 0.5, -0.1), "num_steps": 3}, "alphas_cumprod.2: -0.1"),
        ({"alphas_cumprod": (0.9, float("nan")), "num_steps": 2}, "alphas_cumprod.1"),
        ({"alphas_cumprod": (0.9, 0.0), "num_steps": 2}, "num_steps: 2"),
        ({"alphas_cumprod": (0.9, 0.1), "num_steps": 2, "beta_end": 0.1}, "beta_end: 0.1"),
        ({"alphas_cumprod": (0.9, 0.1), "num_steps": 2, "schedule": "linear"}, "schedule"),
        ({}, "alphas_cumprod: '0 numbers'"),
    ],
)
def test_A1_tables_that_are_none_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match="not allowed") as found:
        PROCESSES.parse({"kind": "ddpm", "schedule": "table", **fields})
    assert words in str(found.value)


def test_A1_a_table_survives_its_file() -> None:
    fields = {"kind": "ddpm", "schedule": "table", "num_steps": STEPS}
    config = PROCESSES.parse({**fields, "alphas_cumprod": squares(True)})
    assert PROCESSES.parse(config.model_dump(mode="json")) == config
    assert config.build() == table() and len(repr(config)) < 200
