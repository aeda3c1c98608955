"""Schedules: derivatives, inverses, derived quantities, discrete grids, bad configurations."""

import math

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.process import PROCESSES, Mixture

F64 = torch.float64


def build(kind, **settings):
    return PROCESSES.parse({"kind": kind, **settings}).build()


ALL = [
    ("ddpm", {}),
    ("ddpm", {"schedule": "scaled_linear"}),
    ("ddpm", {"schedule": "cosine", "num_steps": 100}),
    ("vp_linear", {}),
    ("cosine", {}),
    ("rectified_flow", {}),
    ("rectified_flow", {"shift": 3.0}),
    ("ve", {}),
    ("trig", {}),
]
every = pytest.mark.parametrize(
    "process", [build(k, **s) for k, s in ALL], ids=[f"{k}-{s}" for k, s in ALL]
)


def inner_times(process, count=33):
    """Times strictly inside the range, none of them on a discrete grid."""
    unit = torch.linspace(0.0107, 0.9893, count, dtype=F64)
    return process.t_min + unit * (process.t_max - process.t_min)


@every
def test_derivatives_match_autograd(process):
    t = inner_times(process).requires_grad_(True)
    for value, claimed in (
        (process.alpha(t), process.dalpha(t)),
        (process.sigma(t), process.dsigma(t)),
        (process.lam(t), process.dlam(t)),
    ):
        grad = torch.zeros_like(t)
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.sum(), t)
        torch.testing.assert_close(claimed, grad, rtol=1e-10, atol=1e-11)


@every
def test_diffusion_is_minus_two_sigma_squared_dlam(process):
    t = inner_times(process)
    expected = -2.0 * process.sigma(t).square() * process.dlam(t)
    torch.testing.assert_close(process.diffusion(t), expected, rtol=1e-10, atol=1e-12)
    assert bool((process.diffusion(t) > 0).all())


@every
def test_time_of_lam_inverts_lam_and_snr_is_consistent(process):
    t = inner_times(process)
    torch.testing.assert_close(process.time_of_lam(process.lam(t)), t, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(process.snr(t), torch.exp(2 * process.lam(t)), rtol=1e-10, atol=0)


@every
def test_monotone_clean_end_and_index_round_trip(process):
    t = torch.linspace(process.t_clean, process.t_max, 400, dtype=F64)
    assert bool((process.sigma(t).diff() > 0).all()) and bool((process.alpha(t).diff() <= 0).all())
    assert float(process.sigma(t[0])) == 0.0 and float(process.alpha(t[0])) == 1.0
    index = torch.arange(process.num_steps)
    times = process.time_of_index(index)
    assert times.dtype == torch.float32
    assert torch.equal(process.step_index(times), index)
    assert process.prior_std() == pytest.approx(float(process.sigma(t[-1])))


@every
def test_dtype_is_kept_and_float32_is_accurate(process):
    t = inner_times(process)
    for name in ("alpha", "sigma", "dalpha", "dsigma", "lam", "snr", "drift", "diffusion"):
        double = getattr(process, name)(t.float().double())
        single = getattr(process, name)(t.float())
        assert double.dtype == F64 and single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=2e-4, atol=2e-5)
    assert process.time_input(t).dtype == torch.float32


@every
def test_diffuse_has_the_marginal_variance(process):
    rng = torch.Generator().manual_seed(0)
    t = inner_times(process, 3)[1:2]
    x0 = 0.5 * torch.randn(20000, 1, generator=rng, dtype=F64)
    eps = torch.randn(20000, 1, generator=rng, dtype=F64)
    x = process.diffuse(x0, eps, t.expand(20000))
    expected = Mixture.gaussian(torch.zeros(1, dtype=F64), 0.5).variances(process, t)
    assert float(x.var()) == pytest.approx(float(expected), rel=0.05)


@every
def test_frozen_and_equal_by_value(process):
    with pytest.raises((AttributeError, TypeError)):
        process.num_steps = 3
    assert hash(process) == hash(process)


def test_equality_tells_processes_apart():
    assert build("ve") == build("ve") and build("ve") != build("ve", sigma_max=50.0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_ddpm_is_exact_on_its_grid(schedule):
    process = build("ddpm", schedule=schedule)
    bar = torch.cumprod(1.0 - process.betas(), 0)
    index = torch.arange(1000)
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 1e-7)):
        t = process.time_of_index(index, dtype)
        torch.testing.assert_close(
            process.alpha(t).double().square(), bar, rtol=0, atol=2 * tolerance
        )
        torch.testing.assert_close(
            process.sigma(t).double(), (1 - bar).sqrt(), rtol=3 * tolerance, atol=tolerance
        )
        assert torch.equal(process.time_input(t), index.float())


def test_ddpm_published_betas():
    linear = build("ddpm").betas()
    assert float(linear[0]) == 1e-4 and float(linear[-1]) == pytest.approx(0.02)
    scaled = build("ddpm", schedule="scaled_linear").betas()
    assert float(scaled[0]) == pytest.approx(0.00085) and float(scaled[-1]) == pytest.approx(0.012)
    assert float(scaled[500]) < 0.5 * (0.00085 + 0.012)
    cosine = build("ddpm", schedule="cosine").betas()
    assert float(cosine.max()) == 0.999
    bar = torch.cumprod(1 - cosine, 0)
    expected = math.cos(math.pi / 2 * (0.5 + 0.008) / 1.008) ** 2
    expected /= math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    assert float(bar[499]) == pytest.approx(expected, rel=1e-9)
    short = build("ddpm", num_steps=250).betas()
    assert float(short[0]) == pytest.approx(4e-4) and float(short[-1]) == pytest.approx(0.08)


def test_ddpm_approaches_the_continuous_process():
    discrete, continuous = build("ddpm"), build("vp_linear")
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    torch.testing.assert_close(discrete.alpha(t), continuous.alpha(t), rtol=0.01, atol=0.003)


def test_ddpm_outside_its_lam_range():
    process = build("ddpm")
    ends = process.lam(torch.tensor([0.0, 1.0], dtype=F64))
    noisier = process.time_of_lam(ends[1:] - 1.0)
    cleaner = process.time_of_lam(ends[:1] + 1.0)
    assert float(noisier) == 1.0 and process.t_clean < float(cleaner) < 0.0
    torch.testing.assert_close(process.lam(cleaner), ends[:1] + 1.0, rtol=1e-12, atol=0)


def test_shift_moves_lam_by_its_logarithm():
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    plain, shifted = build("rectified_flow"), build("rectified_flow", shift=3.0)
    torch.testing.assert_close(shifted.lam(t), plain.lam(t) - math.log(3.0), rtol=0, atol=1e-12)
    moved = 3.0 * t / (1.0 + 2.0 * t)
    torch.testing.assert_close(shifted.time_input(t), plain.time_input(moved))


def test_ve_unit_time_is_log_sigma():
    process = build("ve")
    t = torch.tensor([0.002, math.sqrt(0.002 * 80.0), 80.0], dtype=F64)
    torch.testing.assert_close(process.unit_time(t), torch.tensor([0.0, 0.5, 1.0], dtype=F64))
    torch.testing.assert_close(process.time_of_unit(process.unit_time(t)), t)
    torch.testing.assert_close(process.time_input(t), (250 * t.log()).float())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "vp_liner"}, "did you mean 'vp_linear'"),
        ({"kind": "ve", "sigma_min": 0.0}, "sigma_min"),
        ({"kind": "ve", "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max: 1.0 is not allowed"),
        ({"kind": "vp_linear", "t_min": 0.0}, "t_min: 0.0 is not allowed"),
        ({"kind": "trig", "t_min": 0.7, "t_max": 0.5}, "t_min"),
        ({"kind": "cosine", "t_max": 1.5}, "t_max: 1.5 is not allowed; allowed: at most 1"),
        ({"kind": "vp_linear", "beta_max": 0.01}, "beta_max"),
        ({"kind": "rectified_flow", "shift": 0.0}, "shift"),
        ({"kind": "ddpm", "schedule": "quadratic"}, "schedule"),
        ({"kind": "ddpm", "num_steps": 1}, "num_steps"),
        ({"kind": "ddpm", "beta_start": 0.03}, "beta_end"),
        ({"kind": "ddpm", "schedule": "cosine", "beta_end": 0.1}, "beta_end"),
        ({"kind": "ve", "sigma_max": float("nan")}, "sigma_max"),
        ({"kind": "ddpm", "steps": 10}, "num_steps"),
    ],
)
def test_bad_configurations(settings, words):
    with pytest.raises(ConfigError, match="not allowed") as caught:
        PROCESSES.parse(settings)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", PROCESSES.kinds())
def test_configuration_round_trip(kind):
    config = PROCESSES.parse(kind)
    assert PROCESSES.parse(config.model_dump(mode="json")) == config
