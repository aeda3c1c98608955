"""Resampling, and weighted particles under any solver: counts, seeds, states, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise, generator
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import (
    GRIDS,
    SCHEMES,
    SOLVERS,
    FeynmanKac,
    GuidanceConfig,
    Query,
    SolverState,
    effective_size,
    guide,
    initial_noise,
    integrate,
    resample,
    sample,
)

F64 = torch.float64
VP = PROCESSES.parse("vp_linear").build()
DATA = Mixture(torch.tensor([[1.0], [-1.0]]), torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6]))
WEIGHTS = torch.tensor([0.05, 0.3, 0.0, 0.15, 0.5], dtype=F64)


class Weighted:
    """A denoiser whose particles gain weight as ``rate(x)`` says."""

    def __init__(self, rate: Any = lambda x: torch.zeros(len(x), dtype=F64)) -> None:
        self.inner, self.process, self.rate = ExactDenoiser(VP, DATA), VP, rate

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self.inner(x, t, Condition()).replace(weight_rate=self.rate(x))


def solver(**settings: Any) -> FeynmanKac:
    made = SOLVERS.parse({"kind": "feynman_kac", **settings}).build()
    assert isinstance(made, FeynmanKac)
    return made


def run(part: Any, seeds: Any, denoiser: Any = None, steps: int = 12, cond: Any = None) -> Tensor:
    """Samples of a solver part, or of a built solver."""
    noise = SampleNoise(list(seeds))
    x = initial_noise(VP, (1,), noise)
    times = GRIDS.parse("lambda").build(VP, steps)
    built = part if isinstance(part, FeynmanKac) else SOLVERS.parse(part).build()
    with torch.no_grad():
        made: Tensor = integrate(
            denoiser or Weighted(), x, cond or Condition(), times, built, noise
        )
    return made


# Resampling


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_particle_is_copied_as_often_as_it_weighs_on_average(scheme: Any) -> None:
    systems, each = 1000, 20  # 10^5 draws
    weights = WEIGHTS.repeat(each) / each
    rngs = [generator(0, scheme)] * systems  # one after the other
    rows = resample(weights.log().expand(systems, -1), scheme, rngs)
    counts = torch.nn.functional.one_hot(rows, len(weights)).sum(1).double()
    assert rows.shape == (systems, 5 * each) and bool((counts.sum(1) == 5 * each).all())
    torch.testing.assert_close(
        counts.mean(0).reshape(each, 5).mean(0), 5 * WEIGHTS, rtol=0, atol=0.03
    )
    low, high = torch.floor(5 * WEIGHTS).repeat(each), torch.ceil(5 * WEIGHTS).repeat(each)
    if scheme in ("systematic", "residual"):
        assert bool((counts >= low).all())
    if scheme == "systematic":
        assert bool((counts <= high).all())
    assert not bool(counts[:, 2::5].any())  # of weight 0
    drawn_alone = float((5 * each * weights * (1 - weights)).sum())
    assert scheme == "multinomial" or float(counts.var(0).sum()) < 0.9 * drawn_alone


def test_equal_weights_leave_everyone_in_place() -> None:
    log = torch.full((3, 64), -700.0)
    rngs = [generator(seed, "equal") for seed in range(3)]
    for scheme in ("systematic", "stratified", "residual"):
        assert torch.equal(resample(log, scheme, rngs), torch.arange(64).expand(3, -1))


def test_weights_count_by_their_ratio_however_small_they_are() -> None:
    log = torch.log(WEIGHTS)[None]
    for shift in (-1e5, 0.0, 1e5):
        rows = [resample(log + shift, scheme, [generator(1, "x")]) for scheme in SCHEMES]
        other = [resample(log, scheme, [generator(1, "x")]) for scheme in SCHEMES]
        assert all(torch.equal(a, b) for a, b in zip(rows, other, strict=True))


def test_effective_size_is_all_for_equal_weights_and_one_for_a_single_one() -> None:
    one_hot = torch.full((7,), float("-inf"), dtype=F64)
    one_hot[3] = 0.0
    log = torch.stack([torch.full((7,), -3.0, dtype=F64), one_hot, torch.arange(7.0, dtype=F64)])
    sizes = effective_size(log)
    weights = torch.softmax(log[2], 0)
    assert sizes[:2].tolist() == pytest.approx([7.0, 1.0])
    assert float(sizes[2]) == pytest.approx(float(1.0 / weights.square().sum()))
    assert torch.allclose(effective_size(log.flip(1)), sizes)


# Particles


@pytest.mark.parametrize("inner", ["ancestral", "sde_dpmpp_1s", "sde_dpmpp_2m"])
def test_without_weights_it_is_the_solver_itself_to_the_bit(inner: str) -> None:
    part = {"kind": "feynman_kac", "solver": inner, "ess": 1.0}
    assert torch.equal(run(part, range(8)), run(inner, range(8)))


def test_a_system_depends_on_its_own_seeds_alone() -> None:
    part = {"kind": "feynman_kac", "particles": 4, "ess": 1.0}
    tilted = Weighted(lambda x: 0.5 * x[:, 0].double())
    first, second = range(10, 14), range(20, 24)
    both = run(part, [*first, *second], tilted)
    torch.testing.assert_close(both[:4], run(part, first, tilted), rtol=0, atol=1e-6)
    torch.testing.assert_close(both[4:], run(part, second, tilted), rtol=0, atol=1e-6)
    # Inside a system particles compete: with another neighbour, particle 1 becomes another.
    other = run(part, [10, 11, 12, 99], tilted)
    assert not torch.allclose(other[:3], both[:3], atol=1e-3)


def test_weights_draw_particles_to_where_they_are_large_and_are_reported() -> None:
    made = solver(particles=50, ess=0.7)
    x = run(made, range(200), Weighted(lambda x: 2.0 * x[:, 0].double().clamp(-2, 2)), steps=16)
    plain = run("ancestral", range(200), steps=16)
    assert float(x.mean()) > float(plain.mean()) + 0.3
    record = made.record
    assert (record.particles, record.systems, len(record.steps)) == (50, 4, 16)
    for step in record.steps:
        assert all(1.0 <= ess <= 50.0 + 1e-9 for ess in step.ess)
        assert all(1 / 50 - 1e-12 <= weight <= 1.0 for weight in step.max_weight)
        assert all(1 <= count <= 50 for count in step.ancestors)
        assert not any(step.clamped)
    counts = [sum(step.ancestors) for step in record.steps]
    assert counts[0] == 200 and counts == sorted(counts, reverse=True) and counts[-1] < 200
    summary = record.summary()
    assert 0 < summary["ess_least"] <= summary["ess_mean"] <= 1 and summary["resampled"] >= 1
    assert not record.log_weights.any() and record.ancestors.shape == (4, 50)
    assert record.as_json()["steps"][0]["ess"] == record.steps[0].ess


def test_a_constant_rate_is_the_normaliser_and_nothing_else() -> None:
    made = solver(ess=1.0)
    x = run(made, range(6), Weighted(lambda x: torch.full((len(x),), 0.3, dtype=F64)))
    assert torch.equal(x, run(made.config.solver, range(6)))
    lam = VP.lam(GRIDS.parse("lambda").build(VP, 12)[:-1])
    assert made.record.normaliser().item() == pytest.approx(
        0.3 * (float(lam[-1] - lam[0]) + 0.5), rel=1e-5
    )


def test_the_normaliser_survives_resampling() -> None:
    """E[exp(sum of rates)] over the same walk: with and without resampling, the same number."""
    rate = Weighted(lambda x: 0.15 * x[:, 0].double())
    found = []
    for ess in (1.0, 1e-6):
        made = solver(ess=ess)
        run(made, range(1500), rate)
        found.append(made.record.normaliser().item())
    assert found[0] == pytest.approx(found[1], abs=0.07) and abs(found[0]) > 0.1


def test_weights_that_are_left_stand_for_the_same_law() -> None:
    rate = Weighted(lambda x: x[:, 0].double().clamp(-2, 2))
    made = solver(ess=1e-6, final="weights")
    x = run(made, range(1500), rate)
    weights = torch.softmax(made.record.log_weights[0], 0)
    mean = float((weights * x[:, 0].double()).sum())
    again = run({"kind": "feynman_kac", "ess": 0.9}, range(1500, 3000), rate)
    assert float(again.mean()) == pytest.approx(mean, abs=0.1)
    assert abs(mean - float(x.mean())) > 0.2


def test_clamping_cuts_increments_about_their_mean_and_counts_them() -> None:
    made = solver(clamp=0.05)
    run(made, range(40), Weighted(lambda x: 5.0 * x[:, 0].double()))
    assert 0.5 < made.record.summary()["clamped"] <= 1.0
    spread = made.record.steps[0]
    assert spread.ess[0] > 39.0  # e^0.05 is almost 1
    none = solver(interval=(0.0, 1e-9))
    run(none, range(40), Weighted(lambda x: 5.0 * x[:, 0].double()))
    assert none.record.summary()["ess_least"] == pytest.approx(1.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_state_of_a_multistep_solver_goes_with_its_particle(scheme: str) -> None:
    """After a resampling, each particle moves on as its ancestor would have."""
    made = solver(solver="sde_dpmpp_2m", ess=1.0, scheme=scheme)
    plain = SOLVERS.parse("sde_dpmpp_2m").build()
    times = GRIDS.parse("lambda").build(VP, 8)
    query = Query(Weighted(lambda x: 3.0 * x[:, 0].double()), Condition())
    noise, same = SampleNoise(range(6)), SampleNoise(range(6))
    x = y = initial_noise(VP, (1,), SampleNoise(range(50, 56)))
    state, shadow = SolverState(), SolverState()
    for t, u in itertools.pairwise(times[:4]):
        y, shadow = plain.step(query, query(x, t), u, shadow, same)
        x, state = made.step(query, query(x, t), u, state, noise)
        rows = [int((y[:, 0] == value).nonzero()[0]) for value in x[:, 0]]
        assert torch.equal(x, y[rows]) and rows != list(range(6))
        y, shadow = y[rows], shadow.index(torch.tensor(rows))
        assert torch.equal(state.inner.previous, shadow.previous)


def test_callbacks_see_the_rate_of_every_step() -> None:
    seen: list[Any] = []
    noise = SampleNoise(range(4))
    sample(
        Weighted(lambda x: x[:, 0].double()), initial_noise(VP, (1,), noise), Condition(),
        solver=SOLVERS.parse("feynman_kac"), grid=GRIDS.parse("uniform"), steps=3, noise=noise,
        callback=lambda step, t, x, prediction: seen.append((step, prediction.weight_rate)),
    )  # fmt: skip
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(rate.shape == (4,) for _, rate in seen)


def test_settings_survive_json_and_count_calls() -> None:
    part = SOLVERS.parse({"kind": "feynman_kac", "solver": {"kind": "ancestral", "eta": 0.7}})
    assert SOLVERS.parse(part.model_dump(mode="json")) == part
    assert part.evaluations(20) == 20 and part.build().zeta == 0.7


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "heun"}, "solver: 'heun' .*copies of a particle would stay copies"),
        ({"solver": {"kind": "ancestral", "eta": 0.0}}, "solver: 'ancestral'"),
        ({"solver": "edm_churn"}, "solver: 'edm_churn'"),
        ({"solver": {"kind": "feynman_kac"}}, "a solver of one particle"),
        ({"scheme": "wheel"}, "scheme: 'wheel'"),
        ({"ess": 0.0}, "ess: 0"),
        ({"ess": 1.5}, "ess: 1.5"),
        ({"clamp": -1.0}, "clamp: -1"),
        ({"particles": 0}, "particles: 0"),
        ({"interval": (0.6, 0.2)}, "interval"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SOLVERS.parse({"kind": "feynman_kac", **settings})


def test_what_cannot_be_weighted_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"particles: 4 .*divisor of the 6 samples"):
        run({"kind": "feynman_kac", "particles": 4}, range(6))
    mixed = Condition(label=torch.tensor([0, 0, 1, 0]))
    with pytest.raises(ConfigError, match=r"cond\.label: .*one condition for each system"):
        run("feynman_kac", range(4), cond=mixed)
    run(
        {"kind": "feynman_kac", "particles": 2},
        range(4),
        cond=mixed.index(torch.arange(2).repeat(2).sort().values),
    )
    with pytest.raises(DataError, match=r"prediction\.weight_rate: None"):
        run("feynman_kac", range(4), ExactDenoiser(VP, DATA))
    guided = guide(Weighted(), GuidanceConfig(weight=2.0))
    with pytest.raises(DataError, match=r"weight_rate: \(8,\) .*guidance over one changes"):
        run("feynman_kac", range(4), guided, cond=Condition(label=torch.zeros(4).long()))
    broken = Weighted(lambda x: torch.full((len(x),), float("nan"), dtype=F64))
    with pytest.raises(DataError, match="NaN or infinity at step 0"):
        run("feynman_kac", range(4), broken)
