"""Guidance and thresholds, against formulas and exact posteriors."""

import dataclasses

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.core.prediction import VIEWS, Condition, Prediction
from coterie.process import PROCESSES, ExactDenoiser, Mixture, convert
from coterie.solvers import (
    ClassifierGuided,
    GuidanceConfig,
    ThresholdConfig,
    Thresholded,
    guide,
)

F64 = torch.float64
PROCESS = PROCESSES.parse("vp_linear").build()
MIXTURE = Mixture(
    torch.tensor([[1.0, 0.5], [-1.0, 0.0]], dtype=F64),
    torch.tensor([0.3, 0.2], dtype=F64),
    torch.tensor([0.3, 0.7], dtype=F64),
)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
T = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=F64)
LABELS = Condition(label=torch.tensor([0, 1, 1, 0]))
NONE = Condition(label=torch.full((4,), -1))


class Recording:
    """Remembers what it was asked; predicts a variance equal to its label."""

    def __init__(self, view="eps", mixture=MIXTURE):
        self.inner, self.process, self.calls = ExactDenoiser(PROCESS, mixture, view), PROCESS, []

    def __call__(self, x, t, cond):
        self.calls.append((x, t, cond))
        variance = cond.label[:, None].to(x).expand_as(x)
        return dataclasses.replace(self.inner(x, t, cond), variance=variance)


def config(**settings):
    return GuidanceConfig.from_dict(settings)


def parts(view="eps"):
    denoiser = ExactDenoiser(PROCESS, MIXTURE, view)
    return denoiser(X, T, LABELS).value, denoiser(X, T, NONE).value


def test_weight_one_is_one_plain_call():
    denoiser = Recording()
    made = guide(denoiser, config(weight=1.0))(X, T, LABELS)
    assert len(denoiser.calls) == 1 and denoiser.calls[0][0] is X
    assert torch.equal(made.value, parts()[0])


@pytest.mark.parametrize("view", VIEWS)
def test_formula_and_the_stacked_batch(view):
    denoiser = Recording(view)
    made = guide(denoiser, config(weight=2.3))(X, T, LABELS)
    strong, weak = parts(view)
    torch.testing.assert_close(made.value, weak + 2.3 * (strong - weak), rtol=1e-12, atol=1e-12)
    assert made.view == view and len(denoiser.calls) == 1
    x, t, cond = denoiser.calls[0]
    assert torch.equal(x, torch.cat([X, X])) and torch.equal(t, torch.cat([T, T]))
    assert cond.label.tolist() == [0, 1, 1, 0, -1, -1, -1, -1]
    assert made.variance[:, 0].tolist() == [0, 1, 1, 0]


def test_all_views_guide_alike():
    made = [
        convert(PROCESS, p.value, p.view, "x0", X, T)
        for p in (guide(Recording(view), config(weight=3.0))(X, T, LABELS) for view in VIEWS)
    ]
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=1e-9, atol=1e-9)


def test_equal_halves_are_left_alone():
    made = guide(Recording(), config(weight=7.0))(X, T, NONE)
    torch.testing.assert_close(made.value, parts()[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("unit", ["t", "sigma"])
def test_interval(unit):
    bounds = torch.tensor([0.2, 0.7], dtype=F64)
    if unit == "sigma":
        bounds = torch.exp(-PROCESS.lam(bounds))
    denoiser = Recording()
    settings = config(weight=2.0, interval=bounds.tolist(), interval_in=unit)
    made = guide(denoiser, settings)(X, T, LABELS).value
    strong, weak = parts()
    rows = torch.tensor([False, True, True, False])[:, None]
    torch.testing.assert_close(made, torch.where(rows, 2 * strong - weak, strong))
    assert torch.equal(made[[0, 3]], strong[[0, 3]])
    outside = guide(Recording(), settings)
    outside(X, torch.full((4,), 0.9, dtype=F64), LABELS)
    assert outside.denoiser.calls[0][0].shape == X.shape


@pytest.mark.parametrize("place", ["x0", "eps"])
def test_rescale_matches_the_conditional_spread(place):
    def spread(settings):
        p = guide(Recording("v"), settings)(X, T, LABELS)
        return convert(PROCESS, p.value, p.view, place, X, T).std(1)

    plain = spread(config(weight=4.0))
    full = spread(config(weight=4.0, rescale=1.0, rescale_view=place))
    half = spread(config(weight=4.0, rescale=0.5, rescale_view=place))
    goal = parts(place)[0].std(1)
    torch.testing.assert_close(full, goal)
    torch.testing.assert_close(half, 0.5 * (plain + goal))
    assert float((plain - goal).abs().max()) > 0.05


def test_first_channels_only():
    made = guide(Recording(), config(weight=2.0, channels=1))(X, T, LABELS).value
    strong, weak = parts()
    torch.testing.assert_close(made[:, 0], (2 * strong - weak)[:, 0])
    assert torch.equal(made[:, 1], strong[:, 1])


def test_autoguidance_uses_the_weak_denoiser_on_the_same_condition():
    wide = Mixture(MIXTURE.means, MIXTURE.stds * 2.0, MIXTURE.weights)
    denoiser, weak = Recording("eps"), Recording("x0", wide)
    made = guide(denoiser, config(mode="auto", weight=2.0), weak)(X, T, LABELS)
    answer = convert(PROCESS, weak.inner(X, T, LABELS).value, "x0", "eps", X, T)
    torch.testing.assert_close(made.value, 2 * parts()[0] - answer)
    assert len(denoiser.calls) == len(weak.calls) == 1
    assert torch.equal(weak.calls[0][2].label, LABELS.label)


def test_classifier_guidance_turns_the_mixture_into_its_component():
    """With the exact classifier and weight 1, Bayes' rule holds at every noise level."""

    def log_prob(x, t, cond):
        share = MIXTURE.responsibilities(PROCESS, x, t)
        return share[torch.arange(len(x)), cond.label].log()

    unconditional = guide(ExactDenoiser(PROCESS, MIXTURE), config())

    class Blind:
        process = PROCESS

        def __call__(self, x, t, cond):
            return unconditional(x, t, Condition())

    with torch.no_grad():
        made = ClassifierGuided(Blind(), log_prob, 1.0)(X, T, LABELS)
        none = ClassifierGuided(Blind(), log_prob, 0.0)(X, T, LABELS)
    assert made.view == none.view == "x0" and not made.value.requires_grad
    torch.testing.assert_close(made.value, parts("x0")[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(none.value, Blind()(X, T, LABELS).value)


def test_bad_guidance():
    for settings, words in (
        ({"weight": float("nan")}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"interval": [0.7, 0.2]}, "interval"),
        ({"rescale": 1.5}, "rescale"),
        ({"channels": 0}, "channels"),
        ({"mode": "cgf"}, "mode"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(**settings)
    with pytest.raises(ConfigError, match="weak: None is not allowed"):
        guide(Recording(), config(mode="auto"))
    with pytest.raises(ConfigError, match="mode: 'cfg' is not allowed"):
        guide(Recording(), config(), Recording())
    foreign = ExactDenoiser(PROCESSES.parse("trig").build(), MIXTURE)
    with pytest.raises(ConfigError, match="Transported"):
        guide(Recording(), config(mode="auto"), foreign)
    with pytest.raises(ConfigError, match="a condition to guide towards"):
        guide(Recording(), config(weight=2.0))(X, T, Condition())
    with pytest.raises(ConfigError, match="weight"):
        ClassifierGuided(Recording(), lambda x, t, cond: x.sum(1), float("nan"))


class Fixed:
    process = PROCESS

    def __init__(self, value, view="x0"):
        self.value, self.view = value, view

    def __call__(self, x, t, cond):
        value = convert(PROCESS, self.value, "x0", self.view, x, t)
        return Prediction(value, self.view)


def test_clip_states_its_view():
    value = torch.tensor([[-2.0, 0.5], [0.9, 3.0]], dtype=F64)
    denoiser = Thresholded(Fixed(value, "eps"), ThresholdConfig())
    made = denoiser(X[:2], T[:2], Condition())
    assert made.view == "x0"
    torch.testing.assert_close(made.value, value.clamp(-1, 1))


def test_dynamic_threshold_per_sample():
    value = torch.stack([torch.linspace(-2, 2, 101), torch.linspace(-0.5, 0.5, 101)])
    settings = ThresholdConfig(mode="dynamic", quantile=0.9)
    x = torch.zeros_like(value)
    made = Thresholded(Fixed(value), settings)(x, torch.full((2,), 0.5), Condition()).value
    bound = torch.quantile(value[0].abs(), 0.9)
    torch.testing.assert_close(made[0], value[0].clamp(-bound, bound) / bound)
    torch.testing.assert_close(made[1], value[1])
    for bad in ({"quantile": 0.0}, {"limit": -1.0}, {"mode": "soft"}):
        with pytest.raises(ConfigError, match="not allowed"):
            ThresholdConfig.from_dict(bad)
