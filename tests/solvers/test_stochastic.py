"""Stochastic solvers on a Gaussian, by the deterministic recursion of mean and covariance.

For Gaussian data every step is affine in (x, previous D, z). The coefficients are read off the
solver itself by probing, then means and covariances are propagated without Monte Carlo.
"""

import itertools
import math

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition, Prediction
from coterie.process import PROCESSES, ExactDenoiser, Mixture, transition
from coterie.solvers import GRIDS, SOLVERS, Query, SolverState

F64 = torch.float64
MEAN, STD = 1.3, 0.4
DATA = Mixture.gaussian(torch.tensor([MEAN], dtype=F64), STD)


def build(kind, **settings):
    return PROCESSES.parse({"kind": kind, **settings}).build()


def solver_of(kind, **settings):
    return SOLVERS.parse({"kind": kind, **settings}).build()


class FixedNoise:
    """Stands in for SampleNoise: the last of the probe's rows sees z = 1."""

    def __init__(self, rows):
        self.rows = rows

    def normal(self, shape):
        z = torch.zeros(self.rows, *shape)
        z[-1] = 1.0
        return z


def probe(solver, denoiser, t, u, lam_step):
    """Offset and coefficients of x, D_prev, z in (x_new, D_new): [2], [2, 2], [2]."""
    x = torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=F64)
    state = SolverState()
    if lam_step is not None:
        previous = torch.tensor([[0.0], [0.0], [1.0], [0.0]], dtype=F64)
        state = SolverState(previous, torch.ones(4, dtype=torch.bool), lam_step)
    query = Query(denoiser, Condition())
    estimate = query(x, t)
    moved, after = solver.step(query, estimate, u, state, FixedNoise(4))
    rows = torch.cat([moved, estimate.x0], dim=1)
    offset = rows[0]
    return offset, torch.stack([rows[1] - offset, rows[2] - offset], 1), rows[3] - offset, after


def terminal(process, solver, times):
    """Mean and variance of x at the last time, started from the exact marginal."""
    t = times[:1]
    alpha = process.alpha(t)[0]
    var = DATA.variances(process, t)[0, 0]
    mean = torch.stack([alpha * MEAN, torch.zeros((), dtype=F64)])
    cov = torch.diag(torch.stack([var, torch.zeros((), dtype=F64)]))
    denoiser, lam_step = ExactDenoiser(process, DATA), None
    for now, after in itertools.pairwise(times):
        offset, matrix, noise, state = probe(solver, denoiser, now, after, lam_step)
        mean = offset + matrix @ mean
        cov = matrix @ cov @ matrix.T + torch.outer(noise, noise)
        lam_step = state.lam_step
    return float(mean[0]), float(cov[0, 0])


RANGES = {
    "vp_linear": {},
    "cosine": {"t_max": 0.98},
    "rectified_flow": {"t_max": 0.999},
}


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(
    ("solver", "order", "counts"),
    [
        ("ancestral", 1, (80, 160)),
        ("sde_dpmpp_1s", 1, (80, 160)),
        ("sde_dpmpp_2m", 2, (80, 160)),
    ],
)
def test_terminal_variance_order(kind, solver, order, counts):
    process = build(kind, **RANGES[kind])
    ends = torch.tensor([process.t_max, process.t_min], dtype=F64)
    low, high = process.lam(ends).tolist()
    exact = float(DATA.variances(process, ends[1:])[0, 0])
    target = float(process.alpha(ends[1])) * MEAN
    gaps = []
    for count in counts:
        times = process.time_of_lam(torch.linspace(low, high, count + 1, dtype=F64))
        mean, var = terminal(process, solver_of(solver), times)
        assert mean == pytest.approx(target, abs=1e-10)
        gaps.append(abs(var - exact))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(order, abs=0.2)


def _variance_ratio(process, solver, times, std=STD):
    """Of what a solver reaches, over the true one; without the noise that is left."""
    t = times[-1:]
    mean, var = terminal(process, solver, times)
    assert mean == pytest.approx(float(process.alpha(t)) * MEAN, abs=1e-6)
    return float((var - process.sigma(t).square()) / (process.alpha(t) * std).square())


@pytest.mark.parametrize("grid", ["lambda", "uniform"])
@pytest.mark.parametrize("kind", ["vp_linear", "cosine", "rectified_flow"])
def test_C8_particles_keep_the_variance_at_40_steps(kind, grid):
    process = build(kind)
    times = GRIDS.parse(grid).build(process, 40)[:-1]
    moves = SOLVERS.parse("feynman_kac").solver.build()
    assert 0.9 < _variance_ratio(process, moves, times) < 1.12
    assert _variance_ratio(process, solver_of("ancestral"), times) < 0.9  # the published step


@pytest.mark.parametrize("steps", [3, 10, 40])
def test_C8_the_step_is_exact_for_data_of_its_standard_deviation(steps):
    process = build("rectified_flow")  # from alpha = 0
    times = torch.linspace(1.0, 0.01, steps + 1, dtype=F64)
    solver = solver_of("ancestral", data_std=STD)
    assert _variance_ratio(process, solver, times) == pytest.approx(1.0, abs=1e-9)


def test_C8_noise_for_a_spread_needs_noise():
    with pytest.raises(ConfigError, match=r"data_std: 0\.5 is not allowed"):
        SOLVERS.parse({"kind": "ancestral", "eta": 0.0, "data_std": 0.5})


@pytest.mark.parametrize("kind", PROCESSES.kinds())
def test_ancestral_is_sde_dpmpp_1s_and_the_posterior(kind):
    process = build(kind)
    t, u = process.time_of_lam(torch.tensor([-1.0, 0.3], dtype=F64))
    denoiser = ExactDenoiser(process, DATA)
    made = [
        probe(solver_of(name), denoiser, t, u, None)[:3] for name in ("ancestral", "sde_dpmpp_1s")
    ]
    for first, second in zip(*made):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-13)
    step = transition(process, t, u)
    torch.testing.assert_close(made[0][2][0], step.var_posterior.sqrt(), rtol=1e-12, atol=0)
    x = torch.tensor([[0.7]], dtype=F64)
    query = Query(denoiser, Condition())
    estimate = query(x, t)
    posterior = step.x_coef * x + step.d_coef * estimate.x0
    quiet = FixedNoise(2)  # of two rows, the first sees z = 0
    both = query(x.expand(2, 1), t)
    moved, _ = solver_of("ancestral").step(query, both, u, SolverState(), quiet)
    torch.testing.assert_close(moved[:1], posterior, rtol=0, atol=1e-13)


def test_ancestral_without_noise_is_ddim():
    process = build("vp_linear")
    t, u = process.time_of_lam(torch.tensor([-1.0, 0.3], dtype=F64))
    query = Query(ExactDenoiser(process, DATA), Condition())
    estimate = query(torch.tensor([[0.7]], dtype=F64), t)
    first, second = (
        solver.step(query, estimate, u, SolverState(), None)[0]
        for solver in (solver_of("ancestral", eta=0.0), solver_of("ddim"))
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-15)


class WithVariance:
    """An exact denoiser that also predicts a constant learned variance."""

    def __init__(self, process, variance):
        self.inner, self.process, self.variance = ExactDenoiser(process, DATA), process, variance

    def __call__(self, x, t, cond):
        prediction = self.inner(x, t, cond)
        return Prediction(prediction.value, "x0", variance=torch.full_like(x, self.variance))


@pytest.mark.parametrize("variance", [-1.0, 1.0])
def test_learned_variance_between_posterior_and_forward(variance):
    process = build("ddpm")
    t, u = process.time_of_index(torch.tensor([600, 560]), F64)
    step = transition(process, t, u)
    expected = step.var_posterior if variance < 0 else step.var_forward
    noise = probe(solver_of("ancestral"), WithVariance(process, variance), t, u, None)[2]
    torch.testing.assert_close(noise[0], expected.sqrt(), rtol=1e-12, atol=0)
    # Only at eta = 1, and only on a discrete process.
    half = probe(solver_of("ancestral", eta=0.5), WithVariance(process, variance), t, u, None)[2]
    torch.testing.assert_close(half[0], 0.5 * step.var_posterior.sqrt(), rtol=1e-12, atol=0)
    other = build("vp_linear")
    plain = probe(solver_of("ancestral"), WithVariance(other, variance), t, u, None)[2]
    torch.testing.assert_close(plain[0], transition(other, t, u).var_posterior.sqrt())


@pytest.mark.parametrize("kind", ["ve", "vp_linear", "rectified_flow", "ddpm"])
def test_churn_keeps_the_marginal(kind):
    """Raising the noise level maps the marginal at t to the marginal at the raised time."""
    process = build(kind)
    solver = solver_of("edm_churn", churn=4.0, noise_scale=1.0)
    t = process.time_of_lam(torch.tensor(0.2, dtype=F64))
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
    moved, raised = solver.perturb(process, x, t, 10, FixedNoise(3))
    s, s_raised = torch.exp(-process.lam(t)), torch.exp(-process.lam(raised))
    assert float(s_raised / s) == pytest.approx(1.4, rel=1e-9)
    scale, std = moved[1, 0] - moved[0, 0], moved[2, 0] - moved[0, 0]
    before, after = (DATA.variances(process, at[None])[0, 0] for at in (t, raised))
    torch.testing.assert_close(scale.square() * before + std.square(), after, rtol=1e-9, atol=0)
    torch.testing.assert_close(scale, process.alpha(raised) / process.alpha(t))


def test_churn_limits():
    process = build("ve")
    x = torch.ones(2, 1, dtype=F64)
    for settings, t, gamma in (
        ({"churn": 40.0}, 1.0, math.sqrt(2) - 1),
        ({"churn": 1.0}, 1.0, 0.1),
        ({"churn": 1.0, "s_max": 0.5}, 1.0, 0.0),
        ({"churn": 1.0, "s_min": 2.0}, 1.0, 0.0),
        ({"churn": 40.0, "s_max": 100.0}, 80.0, 0.0),
    ):
        at = torch.tensor(t, dtype=F64)
        _, raised = solver_of("edm_churn", **settings).perturb(process, x, at, 10, FixedNoise(2))
        assert float(raised) == pytest.approx(t * (1 + gamma), rel=1e-12)
