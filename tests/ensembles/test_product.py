"""Compositions: what cancels exactly, who is asked what, whole runs on mixtures, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.ensembles import ENSEMBLES
from coterie.ensembles.product import Composition, CompositionConfig, compose
from coterie.ensembles.product_rates import drift_per_lam
from coterie.process import PROCESSES, ExactDenoiser, Mixture, convert
from coterie.solvers import GRIDS, SOLVERS, FeynmanKac, guide, integrate, sample
from coterie.solvers.guidance import GuidanceConfig

F64 = torch.float64
VP = PROCESSES.parse("vp_linear").build()
NOTHING = Condition()


def mixture(means: Any, stds: Any, weights: Any) -> Mixture:
    return Mixture(*(torch.tensor(value, dtype=F64) for value in (means, stds, weights)))


ONE = mixture([[-2.0, 0.3], [2.0, -0.5]], [0.5, 1.0], [0.5, 0.5])
TWO = mixture([[-1.0, 0.0], [2.5, 0.4]], [0.8, 0.8], [0.7, 0.3])


def expert(data: Mixture = ONE, view: Any = "eps", kind: Any = VP) -> ExactDenoiser:
    return ExactDenoiser(kind, data, view)


def states(count: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=rng, dtype=F64)
    return 1.5 * x, torch.linspace(0.01, 0.99, count, dtype=F64)


def ask(made: Composition, cond: Condition = NOTHING, seed: int = 0) -> Prediction:
    x, t = states(seed=seed)
    return made(x, t, cond)


def rate(made: Composition, cond: Condition = NOTHING) -> Tensor:
    found = ask(made, cond).weight_rate
    assert found is not None and found.dtype == F64
    return found


# What cancels


@pytest.mark.parametrize("view", ["x0", "eps", "score", "flow", "v"])
def test_one_expert_to_the_power_one_is_itself_to_the_bit(view: Any) -> None:
    x, t = states()
    alone = expert(view=view)(x, t, NOTHING)
    made = compose([expert(view=view)], mode="anneal")
    got = made(x, t, NOTHING)
    assert torch.equal(got.value, alone.value) and got.view == view
    assert not rate(made).any() and made.prior_scale == 1.0
    noise, same = SampleNoise(range(6)), SampleNoise(range(6))
    options: dict[str, Any] = {"grid": GRIDS.parse("lambda"), "steps": 9}
    plain = sample(
        expert(view=view), VP.prior_std() * same.normal((2,)), NOTHING,
        solver=SOLVERS.parse("feynman_kac").solver, noise=same, **options,
    )  # fmt: skip
    weighted = sample(
        made, made.initial((2,), noise), NOTHING,
        solver=SOLVERS.parse("feynman_kac"), noise=noise, **options,
    )  # fmt: skip
    assert torch.equal(plain, weighted)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_guidance_of_weight_0_or_1_has_no_weights(weight: float) -> None:
    made = compose([expert(ONE), expert(TWO)], (1.0 - weight, weight), mode="average")
    torch.testing.assert_close(rate(made), torch.zeros(20, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [-1.0, 0.3, 4.0])
def test_equal_experts_have_no_weights_under_any_guidance(weight: float) -> None:
    assert not rate(compose([expert(), expert()], (1.0 - weight, weight))).any()


def test_guidance_weights_are_the_closed_form_of_the_difference() -> None:
    w = 3.0
    x, t = states()
    scores = [expert(data, "score")(x, t, NOTHING).value for data in (ONE, TWO)]
    made = compose([expert(ONE), expert(TWO)], (1.0 - w, w), mode="average")
    per_time = 0.5 * VP.diffusion(t) * w * (w - 1.0) * (scores[1] - scores[0]).square().sum(1)
    torch.testing.assert_close(rate(made) * -VP.dlam(t), per_time)


def test_a_power_is_a_product_of_equal_experts() -> None:
    power, product = compose([expert()], (3.0,)), compose([expert()] * 3)
    one, other = ask(power), ask(product)
    torch.testing.assert_close(one.value, other.value)
    torch.testing.assert_close(rate(power), rate(product))
    assert power.prior_scale == product.prior_scale == pytest.approx(3.0**-0.5)


def test_the_order_of_experts_and_of_particles_changes_nothing() -> None:
    made = compose([expert(ONE), expert(TWO), expert(ONE, "v")], (0.5, 1.5, 0.7))
    other = compose([expert(TWO), expert(ONE, "v"), expert(ONE)], (1.5, 0.7, 0.5))
    torch.testing.assert_close(ask(made).value, ask(other).value)
    torch.testing.assert_close(rate(made), rate(other))
    x, t = states()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    flipped = made(x[order], t[order], NOTHING)
    torch.testing.assert_close(flipped.value, ask(made).value[order], rtol=1e-12, atol=1e-12)
    assert flipped.weight_rate is not None
    torch.testing.assert_close(flipped.weight_rate, rate(made)[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", ["x0", "eps", "score", "flow", "v"])
@pytest.mark.parametrize("betas", [(0.4, 0.6), (-2.0, 3.0), (1.0, 1.0), (0.8, 1.7)])
def test_sums_in_a_shared_view_are_those_of_converted_answers(view: Any, betas: Any) -> None:
    """Experts of one view are summed in it, and only the sum is converted."""
    x, t = states()
    eps = [expert(data, "eps")(x, t, NOTHING).value for data in (ONE, TWO)]
    made = compose([expert(ONE, view), expert(TWO, view)], betas)
    found = made(x, t, NOTHING)
    total = sum(beta * one for beta, one in zip(betas, eps, strict=True))
    torch.testing.assert_close(convert(VP, found.value, found.view, "eps", x, t), total)
    plain = total.square().sum(1) - sum(
        beta * one.square().sum(1) for beta, one in zip(betas, eps, strict=True)
    )
    drift = (sum(betas) - 1.0) * 2 * drift_per_lam(VP, t)
    assert found.weight_rate is not None
    torch.testing.assert_close(found.weight_rate, plain + drift)


def test_a_shared_view_is_converted_once_whatever_the_number_of_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(process: Any, value: Tensor, source: str, *rest: Any) -> Tensor:
        calls.append(source)
        return convert(process, value, source, *rest)

    monkeypatch.setattr("coterie.ensembles.product.convert", counted)
    monkeypatch.setattr("coterie.process.views.convert", counted)
    x, t = states()
    compose([expert(ONE, "flow"), expert(TWO, "flow"), expert(ONE, "flow")])(x, t, NOTHING)
    assert [source for source in calls if source == "flow"] == ["flow", "flow"]  # sum and slope


@pytest.mark.parametrize("kind", ["vp_linear", "rectified_flow", "ve", "cosine"])
def test_the_rate_solves_the_equation_it_is_named_after(kind: str) -> None:
    """d p/ds + div(p v) - (zeta g)^2 / 2 Lap p = p (w - E w), by differences of log p itself."""
    process = PROCESSES.parse(kind).build()
    made = compose([expert(ONE, "x0", process), expert(TWO, "v", process)], (0.8, 1.3))
    own = made.process
    x = torch.tensor([[0.3, -0.4]], dtype=F64).requires_grad_(True)
    t = own.time_of_lam(torch.tensor([0.2], dtype=F64)).requires_grad_(True)

    def log_p(x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * ONE.log_prob(own, x, t) + 1.3 * TWO.log_prob(own, x, t)

    value = log_p(x, t)
    change, gradient = torch.autograd.grad(value.sum(), (t, x), create_graph=True)
    laplace = sum(
        torch.autograd.grad(gradient[0, axis], x, retain_graph=True)[0][0, axis] for axis in (0, 1)
    )
    a, g2 = own.drift(t), own.diffusion(t)
    # v = -a x + g^2 score, zeta = 1: everything over p, in falling time.
    divergence = -2.0 * a + g2 * laplace + ((-a * x + g2 * gradient) * gradient).sum()
    diffusion = 0.5 * g2 * (laplace + gradient.square().sum())
    wanted = -change + divergence - diffusion
    got = made(x.detach(), t.detach(), NOTHING).weight_rate
    assert got is not None
    torch.testing.assert_close(got * -own.dlam(t), wanted)


# Who is asked what


class Labelled:
    """Remembers the labels it was asked with."""

    def __init__(self) -> None:
        self.process, self.view, self.asked = VP, "eps", []

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.asked.append(None if cond.label is None else cond.label.tolist())
        return Prediction(torch.zeros_like(x), "eps")


def test_each_expert_is_told_its_own_label() -> None:
    experts = [Labelled() for _ in range(3)]
    made = compose(experts, labels=("given", "null", 7))
    x, t = states(2)
    made(x, t, Condition(label=torch.tensor([3, 4])))
    assert [one.asked for one in experts] == [[[3, 4]], [[NULL_LABEL] * 2], [[7, 7]]]
    made(x, t, NOTHING)
    assert experts[2].asked[-1] == [7, 7]


def test_without_a_corrector_it_is_the_sum_of_scores_that_any_solver_takes() -> None:
    made = compose([expert(ONE), expert(TWO)], corrector="none")
    x, t = states()
    got = made(x, t, NOTHING)
    parts = [expert(data, "score")(x, t, NOTHING).value for data in (ONE, TWO)]
    score = convert(VP, got.value, got.view, "score", x, t)
    torch.testing.assert_close(score, parts[0] + parts[1])
    assert got.weight_rate is not None and not got.weight_rate.any()
    options: dict[str, Any] = {"grid": GRIDS.parse("uniform"), "steps": 4}
    drawn = []
    for solver in ("heun", SOLVERS.parse("feynman_kac").solver, "feynman_kac"):
        noise = SampleNoise(range(3))
        x = made.initial((2,), noise)
        options |= {"solver": SOLVERS.parse(solver), "noise": noise}
        drawn.append(sample(made, x, NOTHING, **options))
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_reward_guidance_without_a_corrector_takes_the_whole_gradient() -> None:
    def reward(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return x.sum(1)

    x, t = states()
    plain = compose([expert()], mode="tilt", tilt=2.0, reward=reward, corrector="none")
    half = compose([expert()], mode="tilt", tilt=2.0, reward=reward)
    base = expert()(x, t, NOTHING).value
    moved, halved = plain(x, t, NOTHING).value - base, half(x, t, NOTHING).value - base
    torch.testing.assert_close(moved, 2.0 * halved)
    wanted = -2.0 * VP.alpha(t).square() * VP.sigma(t)
    torch.testing.assert_close(moved, wanted[:, None].expand(-1, 2))


def test_a_composition_is_an_ensemble_by_its_configuration() -> None:
    part = ENSEMBLES.parse({"kind": "composition", "betas": [0.5, 0.5], "mode": "average"})
    assert ENSEMBLES.parse(part.model_dump(mode="json")) == part
    made = part.build([expert(ONE), expert(TWO)])
    assert isinstance(made, Composition) and made.betas == (0.5, 0.5)
    assert compose([expert(ONE), expert(TWO)], mode="average").betas == (0.5, 0.5)
    assert compose([expert(ONE), expert(TWO)]).betas == (1.0, 1.0)


@pytest.mark.parametrize("view", ["eps", "score"])
def test_D12_experts_that_answer_in_noise_are_asked_where_there_is_signal(view: str) -> None:
    flow = PROCESSES.parse("rectified_flow").build()
    made = compose([expert(ONE, view, flow), expert(TWO, view, flow)], mode="average")
    assert 0.99 < made.process.t_max < 1.0
    noise = SampleNoise(range(16))
    solver = SOLVERS.parse({"kind": "feynman_kac", "particles": 16}).build()
    times = GRIDS.parse("uniform").build(made.process, 10)
    with torch.no_grad():
        x = integrate(made, made.initial((2,), noise), NOTHING, times, solver, noise)
    assert bool(torch.isfinite(x).all())


def test_sampling_begins_where_there_is_signal_if_the_normaliser_changes() -> None:
    flow = PROCESSES.parse("rectified_flow").build()
    pair = [expert(ONE, "flow", flow), expert(TWO, "flow", flow)]
    average, product = compose(pair, mode="average"), compose(pair)
    assert average.process == flow
    assert 0.99 < product.process.t_max < 1.0
    for made in (average, product):
        noise = SampleNoise(range(64))
        solver = SOLVERS.parse({"kind": "feynman_kac", "particles": 32}).build()
        times = GRIDS.parse("uniform").build(made.process, 20)
        with torch.no_grad():
            x = integrate(made, made.initial((2,), noise), NOTHING, times, solver, noise)
        assert bool(torch.isfinite(x).all()) and x.dtype == torch.float32


# In distribution


def distance(x: Tensor, log_density: Any) -> float:
    """Total variation on 16 bins of [-8, 8]."""
    grid = torch.linspace(-8, 8, 16 * 100 + 1, dtype=F64)
    middle = 0.5 * (grid[1:] + grid[:-1])[:, None]
    wanted = log_density(middle).exp().reshape(16, 100).sum(1)
    found = torch.histc(x.double(), 16, -8, 8) / len(x)
    return float((found - wanted / wanted.sum()).abs().sum() / 2)


def test_weighted_particles_find_the_product_that_summed_scores_miss() -> None:
    a = mixture([[-2.0], [2.0]], [0.5, 1.0], [0.5, 0.5])
    clean = torch.full((1600,), 1e-5, dtype=F64)

    def squared(x: Tensor) -> Tensor:
        return 2.0 * a.log_prob(VP, x, clean)

    found = {}
    for corrector, solver in (("none", "ancestral"), ("fkc", "feynman_kac")):
        made = compose([expert(a)], (2.0,), corrector=corrector)
        noise = SampleNoise(range(2000))
        x = sample(
            made, made.initial((1,), noise), NOTHING,
            solver=SOLVERS.parse(solver), grid=GRIDS.parse("uniform"), steps=150, noise=noise,
        )  # fmt: skip
        found[corrector] = distance(x, squared)
    assert found["none"] > 0.09 and found["fkc"] < 0.5 * found["none"]


def test_the_log_normaliser_of_an_average_of_gaussians() -> None:
    """Of sqrt(q_1 q_2): sqrt(2 s t / (s^2 + t^2)) exp(-(m - n)^2 / (4 (s^2 + t^2)))."""
    pair = [mixture([[-1.0]], [0.6], [1.0]), mixture([[1.0]], [0.8], [1.0])]
    made = compose([expert(data) for data in pair], mode="average")
    noise = SampleNoise(range(600))
    solver = SOLVERS.parse({"kind": "feynman_kac", "ess": 0.8}).build()
    assert isinstance(solver, FeynmanKac) and made.log_prior(1) == pytest.approx(0.0)
    times = GRIDS.parse("lambda").build(VP, 120)
    with torch.no_grad():
        integrate(made, made.initial((1,), noise), NOTHING, times, solver, noise)
    found = made.log_prior(1) + float(solver.record.normaliser())
    assert found == pytest.approx(0.5 * math.log(0.96) - 1.0, abs=0.12)


# Bad input


class Nameless:
    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        raise AssertionError("never asked")


class ScoreOnly:
    def __init__(self) -> None:
        self.process, self.view = VP, "score"

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(-x, "score")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, -1.0)}, "betas: .*sum is above 0"),
        ({"betas": (1.0, -2.0)}, "betas: .*could not be normalised"),
        ({"betas": (1.0, 0.5), "mode": "average"}, "betas: .*add up to 1"),
        ({"betas": (1.0, 1.0), "mode": "anneal"}, "betas: .*one number"),
        ({"betas": (1.0,)}, "betas: .*2, one per expert"),
        ({"mode": "anneal"}, "mode: 'anneal' .*one expert"),
        ({"noisy_betas": (0.1, -0.2)}, "noisy_betas: .*sum is above 0"),
        ({"labels": ("given",)}, "labels: .*2, one per expert"),
        ({"tilt": 1.0}, "tilt: 1.0 .*0 in mode"),
        ({"mode": "tilt"}, "reward: None .*a function"),
        ({"mode": "sum"}, "mode: 'sum'"),
        ({"zeta": 0.0}, "zeta: 0"),
        ({"betas": (float("inf"), 1.0)}, "betas"),
    ],
)
def test_targets_that_are_not_defined(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([expert(ONE), expert(TWO)], **settings)


def test_experts_that_do_not_fit_each_other() -> None:
    flow = PROCESSES.parse("rectified_flow").build()
    mixed = [expert(ONE), expert(TWO, "flow", flow)]
    with pytest.raises(ConfigError, match=r"process: 'experts of RectifiedFlow, VPLinear'"):
        compose(mixed)
    assert compose(mixed, process="vp_linear").process == VP
    with pytest.raises(ConfigError, match=r"experts\.1: 'Nameless' .*noising process"):
        compose([expert(), Nameless()])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"experts\.b: 'not given' .*without one the target"):
        compose({"a": expert(), "b": None})
    with pytest.raises(ConfigError, match=r"noisy_betas: .*knows a score and no density"):
        compose([expert(), ScoreOnly()], (1.0, 1.0), noisy_betas=(0.5, 1.0))
    with pytest.raises(ConfigError, match=r"router: .*every expert is asked"):
        CompositionConfig().build([expert()], router=expert())
    with pytest.raises(ConfigError, match=r"reward: .*none"):
        compose([expert()], reward=lambda x, t, cond: x.sum(1))


def test_a_reward_of_the_wrong_shape_and_a_solver_of_other_noise() -> None:
    made = compose([expert()], mode="tilt", tilt=1.0, reward=lambda x, t, cond: x)
    with pytest.raises(DataError, match=r"reward: \(20, 2\)"):
        ask(made)
    good = compose([expert()], mode="tilt", tilt=1.0, reward=lambda x, t, cond: x.sum(1))
    noise = SampleNoise(range(3))
    solver = SOLVERS.parse({"kind": "feynman_kac", "solver": {"kind": "ancestral", "eta": 0.5}})
    with pytest.raises(ConfigError, match=r"solver\.zeta: 0\.5 .*zeta = 1\.0"):
        sample(
            good, good.initial((2,), noise), NOTHING,
            solver=solver, grid=GRIDS.parse("uniform"), steps=3, noise=noise,
        )  # fmt: skip


def test_guidance_over_a_composition_is_another_target() -> None:
    made = compose([expert(ONE), expert(TWO)], mode="average")
    noise = SampleNoise(range(2))
    cond = Condition(label=torch.zeros(2, dtype=torch.long))
    with pytest.raises(DataError, match="guidance over one changes the target"):
        sample(
            guide(made, GuidanceConfig(weight=2.0)), made.initial((2,), noise), cond,
            solver=SOLVERS.parse("feynman_kac"), grid=GRIDS.parse("uniform"), steps=3, noise=noise,
        )  # fmt: skip
