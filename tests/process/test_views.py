"""Views, exact denoisers, flow maps and transport between processes."""

import itertools

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.core.prediction import VIEWS, Condition, Prediction
from coterie.process import (
    PROCESSES,
    ExactDenoiser,
    Mixture,
    OneCall,
    Transported,
    as_view,
    convert,
    error_scale,
    target_of,
    transport,
    view_slope,
)

F64 = torch.float64
KINDS = PROCESSES.kinds()


def build(kind, **settings):
    return PROCESSES.parse({"kind": kind, **settings}).build()


def times_in(process, count):
    unit = torch.linspace(0.05, 0.95, count, dtype=F64)
    return process.time_of_unit(unit)


def tensors(process, count=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, count, 3, 4, generator=rng, dtype=F64)
    t = times_in(process, count)
    return x0, eps, process.diffuse(x0, eps, t), t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", VIEWS)
def test_round_trips(kind, source):
    process = build(kind)
    x0, eps, x, t = tensors(process)
    value = target_of(process, x0, eps, source, t)
    for target in VIEWS:
        there = convert(process, value, source, target, x, t)
        expected = target_of(process, x0, eps, target, t)
        scale = 1.0 + float(expected.abs().max())
        torch.testing.assert_close(there / scale, expected / scale, rtol=0, atol=1e-11)
        back = convert(process, there, target, source, x, t)
        torch.testing.assert_close(back, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(VIEWS, 2)))
def test_round_trips_at_random_levels(source, target):
    """alpha and sigma away from 0: float64 precision, 1e-12."""
    process = build("trig")
    rng = torch.Generator().manual_seed(1)
    t = 0.2 + 0.6 * torch.rand(32, generator=rng, dtype=F64)
    x, value = torch.randn(2, 32, 5, generator=rng, dtype=F64)
    there = convert(process, value, source, target, x, t)
    back = convert(process, there, target, source, x, t)
    torch.testing.assert_close(back, value, rtol=0, atol=1e-12 * 10)
    assert float((there - value).abs().max()) > 1e-3


def test_stable_where_alpha_or_sigma_is_zero():
    process = build("rectified_flow")
    x0, eps = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 1.0])
    x = process.diffuse(x0, eps, t)
    for view in ("flow", "v"):
        value = target_of(process, x0, eps, view, t)
        torch.testing.assert_close(convert(process, value, view, "x0", x, t), x0)
        torch.testing.assert_close(convert(process, value, view, "eps", x, t), eps)


def test_unknown_views():
    process, x = build("trig"), torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="source: 'noise' is not allowed"):
        convert(process, x, "noise", "x0", x, torch.ones(1))
    with pytest.raises(ConfigError, match="did you mean 'score'"):
        convert(process, x, "x0", "scores", x, torch.ones(1))
    with pytest.raises(ConfigError, match="logits"):
        target_of(process, x, x, "logits", torch.ones(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", VIEWS)
def test_error_scale_is_the_squared_slope(kind, view):
    process = build(kind)
    x0, _, x, t = tensors(process)
    shift = torch.full_like(x0, 0.1)
    first = convert(process, x0, "x0", view, x, t)
    second = convert(process, x0 + shift, "x0", view, x, t)
    measured = (second - first).square().mean((1, 2)) / 0.01
    torch.testing.assert_close(error_scale(process, t, view), measured, rtol=1e-6, atol=1e-9)


def test_as_view_keeps_the_rest():
    process = build("cosine")
    x0, eps, x, t = tensors(process)
    made = as_view(process, Prediction(eps, "eps", variance=x0), "flow", x, t)
    assert made.view == "flow" and made.variance is x0
    torch.testing.assert_close(made.value, target_of(process, x0, eps, "flow", t))


def gaussian(std=0.4):
    return Mixture.gaussian(torch.tensor([1.3, -0.7], dtype=F64), std)


def mixture():
    means = torch.tensor([[1.0, 1.0], [-1.0, 0.5], [0.0, -1.5]], dtype=F64)
    stds = torch.tensor([0.3, 0.2, 0.5], dtype=F64)
    return Mixture(means, stds, torch.tensor([0.2, 0.5, 0.3], dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_denoiser_is_the_score_of_its_density(kind):
    process, data = build(kind), mixture()
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = times_in(process, 8)
    at = x.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(data.log_prob(process, at, t).sum(), at)
    answer = ExactDenoiser(process, data, "score")(x, t, Condition()).value
    torch.testing.assert_close(answer, score, rtol=1e-8, atol=1e-8)


def test_mixture_sampling_labels_and_components():
    data = mixture()
    x0, label = data.sample(4000, torch.Generator().manual_seed(0))
    for k in range(3):
        rows = x0[label == k]
        assert len(rows) / 4000 == pytest.approx(float(data.weights[k]), abs=0.04)
        torch.testing.assert_close(rows.mean(0), data.means[k], rtol=0, atol=0.06)
        assert float((rows - data.means[k]).std()) == pytest.approx(float(data.stds[k]), rel=0.1)
    process = build("vp_linear")
    x, t = x0[:3], torch.full((3,), 0.3, dtype=F64)
    labelled = ExactDenoiser(process, data)(x, t, Condition(label=torch.tensor([0, 2, -1])))
    torch.testing.assert_close(labelled.value[0], data.component(0).denoise(process, x, t)[0])
    torch.testing.assert_close(labelled.value[1], data.component(2).denoise(process, x, t)[1])
    torch.testing.assert_close(labelled.value[2], data.denoise(process, x, t)[2])


def test_closed_forms_refuse_nonsense():
    with pytest.raises(ConfigError, match="weights"):
        Mixture(torch.zeros(2, 1), torch.ones(2), torch.ones(3))
    one = torch.ones(1, dtype=F64)
    with pytest.raises(ConfigError, match="components: 3 is not allowed"):
        mixture().flow_map(build("trig"), torch.zeros(1, 2, dtype=F64), one, one)


@pytest.mark.parametrize("kind", KINDS)
def test_flow_velocity_is_the_derivative_of_the_exact_map(kind):
    process, data = build(kind), gaussian()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = times_in(process, 5)
    denoised = data.denoise(process, x, t)
    flow = convert(process, denoised, "x0", "flow", x, t)
    ones = torch.ones_like(t)
    _, slope = torch.func.jvp(lambda u: data.flow_map(process, x, t, u), (t,), (ones,))
    torch.testing.assert_close(flow, slope, rtol=1e-9, atol=1e-9)
    parts = target_of(process, denoised, convert(process, denoised, "x0", "eps", x, t), "flow", t)
    torch.testing.assert_close(flow, parts, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "ddpm"])
def test_flow_map_semigroup_and_meanflow_identity(kind):
    process, data = build(kind), gaussian()
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, u, r = (process.time_of_unit(torch.full((4,), p, dtype=F64)) for p in (0.8, 0.5, 0.2))
    hop = data.flow_map(process, data.flow_map(process, x, t, u), u, r)
    torch.testing.assert_close(hop, data.flow_map(process, x, t, r), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(data.flow_map(process, x, t, t), x, rtol=0, atol=1e-14)

    def average(x, t):
        return (x - data.flow_map(process, x, t, r)) / (t - r)[:, None]

    flow = convert(process, data.denoise(process, x, t), "x0", "flow", x, t)
    value, total = torch.func.jvp(average, (x, t), (flow, torch.ones_like(t)))
    residual = value - (flow - (t - r)[:, None] * total)
    assert float(residual.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.permutations(["vp_linear", "trig", "ve"], 2))
)
def test_transport_keeps_lam_and_the_ratio_to_alpha(source, target):
    a, b = build(source), build(target)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    lam = torch.linspace(-3.5, 4.0, 4, dtype=F64)
    t = a.time_of_lam(lam)
    moved, at = transport(a, b, x, t)
    torch.testing.assert_close(b.lam(at), lam, rtol=1e-10, atol=1e-10)
    ratio = moved / b.alpha(at)[:, None] - x / a.alpha(t)[:, None]
    assert float(ratio.abs().max()) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_transported_expert_is_the_expert_of_the_new_process(kind):
    home, data = build("vp_linear", t_min=1e-4), mixture()
    process = build(kind)
    served = Transported(ExactDenoiser(home, data, "eps"), process)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = process.time_of_lam(torch.linspace(-4.0, 3.0, 6, dtype=F64))
    prediction = served(x, t, Condition())
    assert prediction.view == "x0" and served.process is process
    torch.testing.assert_close(prediction.value, data.denoise(process, x, t), rtol=0, atol=1e-8)


def test_transport_from_pure_noise_is_finite():
    a, b = build("rectified_flow"), build("ve")
    x = torch.ones(1, 2, dtype=F64)
    moved, at = transport(a, b, x, torch.ones(1, dtype=F64))
    assert float(at) == 80.0
    torch.testing.assert_close(moved, 80.0 * x, rtol=1e-3, atol=0)


def test_transport_from_pure_noise_reaches_processes_that_never_get_there():
    a = build("rectified_flow")
    for kind in ("vp_linear", "cosine"):
        b = build(kind)
        moved, at = transport(a, b, torch.ones(1, 2, dtype=F64), torch.ones(1, dtype=F64))
        torch.testing.assert_close(at, torch.full((1,), b.t_max, dtype=F64))
        torch.testing.assert_close(moved, torch.ones(1, 2, dtype=F64), rtol=1e-3, atol=0)


def test_remembered_coefficients_are_those_of_the_process_at_the_times_asked() -> None:
    process = PROCESSES.parse("cosine").build()
    once, counted = OneCall(process), []
    times, others = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for t in (times, others, times):
        for name in ("alpha", "sigma", "dalpha", "dsigma", "lam", "dlam"):
            torch.testing.assert_close(getattr(once, name)(t), getattr(process, name)(t))
            counted.append(once.alpha(t))
    assert counted[0] is counted[1] and counted[0] is not counted[6]


@pytest.mark.parametrize("source", VIEWS)
@pytest.mark.parametrize("target", VIEWS)
def test_the_slope_of_a_view_is_the_change_of_one_by_the_other(source: str, target: str) -> None:
    process = PROCESSES.parse("cosine").build()
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    x, value, step = torch.randn(3, 2, 4, dtype=torch.float64)
    change = convert(process, value + step, source, target, x, t)
    change = change - convert(process, value, source, target, x, t)
    torch.testing.assert_close(change, view_slope(process, t, source, target)[:, None] * step)
