"""Weightings, times, preconditioning and the terms of the variational bound."""

import itertools
import math

import pytest
import torch
from torch import nn

from coterie.core.errors import ConfigError
from coterie.core.prediction import VIEWS
from coterie.process import (
    PRECONDITIONS,
    PROCESSES,
    TIMES,
    WEIGHTINGS,
    Mixture,
    cluster_of,
    convert,
    elbo_weights,
    error_scale,
    learned_log_variance,
    transition,
    vlb_bits,
)

F64 = torch.float64
KINDS = PROCESSES.kinds()
FIXED = ["edm", "elbo", "min_snr", "p2", "snr"]


def build(kind, **settings):
    return PROCESSES.parse({"kind": kind, **settings}).build()


def times_in(process, count):
    return process.time_of_unit(torch.linspace(0.05, 0.95, count, dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", FIXED)
def test_weighted_loss_is_the_same_in_every_view(kind, rule):
    process = build(kind)
    weighting = WEIGHTINGS.parse(rule).build(process)
    rng = torch.Generator().manual_seed(0)
    x0, eps, guess = torch.randn(3, 8, 5, generator=rng, dtype=F64)
    t = times_in(process, 8)
    x = process.diffuse(x0, eps, t)
    losses = []
    for view in VIEWS:
        truth = convert(process, x0, "x0", view, x, t)
        error = (convert(process, guess, "x0", view, x, t) - truth).square().mean(1)
        losses.append(float(weighting.combine(error, t, view)))
    assert losses == pytest.approx([losses[0]] * len(VIEWS), rel=1e-5)


def test_min_snr_published_forms():
    process = build("vp_linear")
    t = times_in(process, 9)
    snr = process.snr(t)
    weighting = WEIGHTINGS.parse({"kind": "min_snr", "gamma": 5.0}).build(process)
    for view, expected in (
        ("x0", snr.clamp(max=5.0)),
        ("eps", snr.clamp(max=5.0) / snr),
        ("v", snr.clamp(max=5.0) / (snr + 1)),
    ):
        torch.testing.assert_close(weighting(t, view).double(), expected, rtol=1e-6, atol=0)


def test_other_published_forms():
    process = build("vp_linear")
    t = times_in(process, 9)
    snr, s = process.snr(t), process.sigma(t) / process.alpha(t)
    for rule, view, expected in (
        ("snr", "eps", torch.ones_like(t)),
        ("edm", "x0", (s**2 + 0.25) / (0.5 * s) ** 2),
        ("p2", "eps", 1 / (1 + snr)),
        ("elbo", "x0", -snr * process.dlam(t)),
        ("constant", "flow", torch.ones_like(t)),
    ):
        made = WEIGHTINGS.parse(rule).build(process)(t, view)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("view", ["x0", "eps", "flow", "v"])
def test_weights_are_finite_at_both_ends(rule, view):
    process = build("rectified_flow")
    weight = WEIGHTINGS.parse(rule).build(process)(torch.tensor([1e-3, 1.0]), view)
    assert bool(torch.isfinite(weight).all())


def test_discrete_elbo_weight_is_half_the_snr_difference():
    process = build("ddpm")
    index = torch.tensor([0, 1, 500, 999])
    t = process.time_of_index(index)
    snr = process.snr(process.time_of_index(torch.arange(1000), F64))
    expected = 0.5 * torch.stack(
        [snr[0], snr[0] - snr[1], snr[499] - snr[500], snr[998] - snr[999]]
    )
    made = WEIGHTINGS.parse("elbo").build(process)(t, "x0").double()
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=0)


def test_uncertainty_follows_its_formula():
    process = build("ddpm")
    module = WEIGHTINGS.parse("uncertainty").build(process)
    assert isinstance(module, nn.Module) and module.lr == 0.025
    t = TIMES.parse("stratified").build(process).sample(32, torch.Generator().manual_seed(0))
    losses = torch.rand(32, generator=torch.Generator().manual_seed(1))
    cluster = cluster_of(process, t, 8)
    assert torch.equal(torch.bincount(cluster, minlength=8), torch.full((8,), 4))
    means = torch.stack([losses[cluster == i].mean() / 8 for i in range(8)])
    total = module.combine(losses, t, "eps")
    torch.testing.assert_close(total, 0.5 * means.sum())
    with torch.no_grad():
        module.log_variance.copy_(torch.linspace(-1, 1, 8))
    s = module.log_variance
    total = module.combine(losses, t, "eps")
    torch.testing.assert_close(total, (0.5 * (torch.exp(-s) * means + s)).sum())
    (grad,) = torch.autograd.grad(total, s)
    torch.testing.assert_close(grad, (0.5 * (1 - torch.exp(-s) * means)).detach())


def test_uncertainty_without_a_cluster_leaves_it_alone():
    process = build("vp_linear")
    module = WEIGHTINGS.parse("uncertainty").build(process)
    module.combine(torch.ones(2), torch.tensor([0.05, 0.95]), "eps").backward()
    grad = module.log_variance.grad
    assert bool((grad[1:7] == 0).all()) and float(grad[0]) != 0 and float(grad[7]) != 0


def test_time_uncertainty_learns_the_loss():
    """The minimum of exp(-u) L + u is u = log L."""
    process = build("rectified_flow")
    module = WEIGHTINGS.parse({"kind": "time_uncertainty", "base": "constant"}).build(process)
    t = torch.linspace(0.01, 0.99, 64)
    losses = torch.exp(-2.0 * t)
    assert float(module.u(t).detach().abs().max()) == 0.0
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        module.combine(losses, t, "flow").backward()
        optimiser.step()
    torch.testing.assert_close(module.u(t).detach(), losses.log(), rtol=0, atol=0.12)
    torch.testing.assert_close(module(t, "flow").detach(), 1 / losses, rtol=0.15, atol=0)


def test_weighting_configurations():
    for kind in WEIGHTINGS.kinds():
        config = WEIGHTINGS.parse(kind)
        assert WEIGHTINGS.parse(config.model_dump(mode="json")) == config
        weighting = config.build(build("cosine"))
        with pytest.raises(ConfigError, match="view"):
            weighting(torch.tensor([0.5]), "noise")
    with pytest.raises(ConfigError, match="gamma"):
        WEIGHTINGS.parse({"kind": "min_snr", "gamma": -1})
    with pytest.raises(ConfigError, match="did you mean 'min_snr'"):
        WEIGHTINGS.parse("min_srn")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", TIMES.kinds())
def test_times_are_in_range_reproducible_and_on_the_grid(kind, rule):
    process = build(kind)
    times = TIMES.parse(rule).build(process)
    t = times.sample(64, torch.Generator().manual_seed(3))
    assert t.shape == (64,) and t.dtype == torch.float32
    assert torch.equal(t, times.sample(64, torch.Generator().manual_seed(3)))
    assert not torch.equal(t, times.sample(64, torch.Generator().manual_seed(4)))
    assert bool((t >= process.t_min * (1 - 1e-6)).all() and (t <= process.t_max * (1 + 1e-6)).all())
    if process.discrete:
        assert torch.equal(process.time_of_index(process.step_index(t)), t)


def test_times_have_their_distributions():
    rng = torch.Generator().manual_seed(0)
    process = build("rectified_flow")
    logit = torch.logit(TIMES.parse("logit_normal").build(process).sample(8000, rng))
    assert float(logit.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.05)
    sigma = TIMES.parse("log_normal_sigma").build(build("ve")).sample(8000, rng).log()
    assert float(sigma.mean()) == pytest.approx(-1.2, abs=0.06)
    assert float(sigma.std()) == pytest.approx(1.2, abs=0.06)
    index = build("ddpm", num_steps=10).step_index(
        TIMES.parse("uniform").build(build("ddpm", num_steps=10)).sample(8000, rng)
    )
    counts = torch.bincount(index, minlength=10)
    assert int(counts.min()) > 650 and int(counts.max()) < 950


@pytest.mark.parametrize("num_steps", [1000, 13])
def test_stratified_shares_over_clusters(num_steps):
    process = build("ddpm", num_steps=num_steps)
    times = TIMES.parse({"kind": "stratified", "clusters": 8}).build(process)
    rng = torch.Generator().manual_seed(0)
    for batch in (8, 16, 20):
        counts = torch.bincount(cluster_of(process, times.sample(batch, rng), 8), minlength=8)
        assert int(counts.max()) - int(counts.min()) <= (batch % 8 > 0)
    seen = cluster_of(process, torch.cat([times.sample(1, rng) for _ in range(80)]), 8)
    assert len(seen.unique()) == 8
    every = process.step_index(torch.cat([times.sample(64, rng) for _ in range(30)]))
    assert len(every.unique()) > 0.8 * num_steps


@pytest.mark.parametrize("kind", KINDS)
def test_edm_preconditioning(kind):
    process, data = build(kind), 0.5
    t = times_in(process, 9)
    precondition = PRECONDITIONS.parse({"kind": "edm", "sigma_data": data}).build(process)
    c_in, c_skip, c_out = precondition.coefficients(t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = (alpha * data) ** 2 + sigma**2
    one = torch.ones_like(t)
    torch.testing.assert_close(c_in**2 * variance, one, rtol=1e-12, atol=0)
    weight = WEIGHTINGS.parse({"kind": "edm", "sigma_data": data}).build(process)(t, "x0")
    torch.testing.assert_close(weight.double() * c_out**2, one, rtol=1e-6, atol=0)
    # The target (x0 - c_skip x) / c_out has unit variance: c_skip is the best linear denoiser.
    target = (1 - c_skip * alpha) ** 2 * data**2 + (c_skip * sigma) ** 2
    torch.testing.assert_close(target / c_out**2, one, rtol=1e-9, atol=0)
    best = Mixture.gaussian(torch.zeros(1, dtype=F64), data)
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    torch.testing.assert_close(c_skip[:, None] * x, best.denoise(process, x, t))


def test_edm_coefficients_of_the_paper_and_at_alpha_zero():
    c_in, c_skip, c_out = (
        PRECONDITIONS.parse("edm").build(build("ve")).coefficients(torch.tensor([2.0], dtype=F64))
    )
    root = math.sqrt(4.25)
    assert [float(c_in), float(c_skip), float(c_out)] == pytest.approx(
        [1 / root, 0.25 / 4.25, 2.0 * 0.5 / root]
    )
    ends = PRECONDITIONS.parse("edm").build(build("rectified_flow")).coefficients(torch.ones(1))
    assert [float(c) for c in ends] == pytest.approx([1.0, 0.0, 0.5])
    none = PRECONDITIONS.parse("none").build(build("ve"))
    assert none.view is None and [float(c) for c in none.coefficients(torch.ones(1))] == [1, 0, 1]


def test_transition_is_the_ddpm_posterior():
    process = build("ddpm")
    beta, bar = process.betas(), torch.cumprod(1 - process.betas(), 0)
    index = torch.tensor([1, 10, 500, 999])
    step = transition(
        process, process.time_of_index(index, F64), process.time_of_index(index - 1, F64)
    )
    b, now, before = beta[index], bar[index], bar[index - 1]
    torch.testing.assert_close(step.var_forward, b, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.var_posterior, b * (1 - before) / (1 - now), rtol=1e-9, atol=0)
    torch.testing.assert_close(step.d_coef, before.sqrt() * b / (1 - now), rtol=1e-9, atol=0)
    expected = (1 - b).sqrt() * (1 - before) / (1 - now)
    torch.testing.assert_close(step.x_coef, expected, rtol=1e-9, atol=0)
    variance = torch.tensor([[-1.0], [1.0], [0.0], [0.0]], dtype=F64)
    made = learned_log_variance(variance, step.var_posterior, step.var_forward)[:, 0].exp()
    torch.testing.assert_close(made[0], step.var_posterior[0])
    torch.testing.assert_close(made[1], step.var_forward[1])
    torch.testing.assert_close(made[2], (step.var_posterior[2] * step.var_forward[2]).sqrt())


def test_vlb_is_the_weighted_error_for_the_posterior_variance():
    process = build("ddpm")
    rng = torch.Generator().manual_seed(0)
    x0, eps, denoised = torch.randn(3, 4, 6, generator=rng, dtype=F64)
    index = torch.tensor([1, 7, 300, 999])
    t = process.time_of_index(index, F64)
    x = process.diffuse(x0, eps, t)
    bits = vlb_bits(process, x0, x, t, denoised, -torch.ones_like(x0))
    weight = WEIGHTINGS.parse("elbo").build(process)(t, "x0").double()
    expected = weight * (denoised - x0).square().mean(1) / math.log(2)
    torch.testing.assert_close(bits, expected, rtol=1e-5, atol=1e-10)
    perfect = vlb_bits(process, x0, x, t, x0, -torch.ones_like(x0))
    assert float(perfect.abs().max()) < 1e-12


def test_vlb_gradient_of_the_variance_and_index_zero():
    process = build("ddpm")
    rng = torch.Generator().manual_seed(0)
    x0 = (torch.randint(0, 256, (2, 50), generator=rng).double() / 127.5) - 1.0
    t = process.time_of_index(torch.tensor([0, 400]), F64)
    x = process.diffuse(x0, torch.randn(2, 50, generator=rng, dtype=F64), t)
    variance = torch.zeros_like(x0, requires_grad=True)
    bits = vlb_bits(process, x0, x, t, x0, variance)
    (grad,) = torch.autograd.grad(bits.sum(), variance)
    # Above the posterior's variance, with the exact mean: both terms want it smaller.
    assert bool((grad > 0).all())
    # Decoder: N(x0, v) over bins 2/255 wide, v between the variances of indices 1 and 0.
    low = transition(process, process.time_of_index(torch.tensor(1), F64), t[0]).var_posterior
    high = process.sigma(t[0]).square()
    std = float((low * high) ** 0.25)
    inside = 2 * torch.special.ndtr(torch.tensor(1 / 255 / std)) - 1
    inner = (x0[0].abs() < 0.999).double().mean()
    outer = torch.special.ndtr(torch.tensor(1 / 255 / std))
    expected = -(inner * inside.log2() + (1 - inner) * outer.log2())
    assert float(bits[0].detach()) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ConfigError, match="a discrete process"):
        vlb_bits(build("trig"), x0, x, t, x0, variance)


def test_likelihood_of_all_bins_is_one():
    from coterie.process.variational import discretized_log_likelihood

    bins = torch.arange(256, dtype=F64) / 127.5 - 1.0
    for mean, std in ((0.1, 0.3), (-0.9, 0.05), (1.2, 0.5)):
        log = discretized_log_likelihood(bins, torch.tensor(mean), torch.tensor(std).log())
        assert float(log.exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["vp_linear", "rectified_flow", "ve"])
def test_elbo_equals_negative_log_likelihood_of_a_gaussian(kind):
    """Averaged over data N(m, s^2): bound -> entropy as the chain gets finer, first order."""
    process = build(kind, **({"t_max": 0.999} if kind == "rectified_flow" else {}))
    s, entropy, gaps = 0.4, 0.5 * math.log(2 * math.pi * math.e * 0.16), []
    for steps in (400, 800, 1600):
        lam = torch.linspace(-5.0, 5.0, steps + 1, dtype=F64)
        times = process.time_of_lam(lam)
        snr = process.snr(times)
        error = s**2 / (1 + snr[:-1] * s**2)
        diffusion = (elbo_weights(process, times) * error).sum()
        prior = 0.5 * torch.log1p(snr[0] * s**2)
        reconstruction = 0.5 * torch.log(2 * math.pi * math.e * s**2 / (1 + snr[-1] * s**2))
        gaps.append(float(diffusion + prior + reconstruction) - entropy)
    assert all(gap > 0 for gap in gaps) and gaps[-1] < 0.03
    for coarse, fine in itertools.pairwise(gaps):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ConfigError, match="times from noise to clean"):
        elbo_weights(process, times.flip(0))


def test_error_scale_of_flow_matching_is_one_over_t_squared():
    t = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(
        error_scale(build("rectified_flow"), t, "flow"), t**-2, rtol=1e-9, atol=0
    )
