"""Orders of convergence, identities between solvers, and the exact Gaussian as the truth."""

import math

import pytest
import torch

from coterie.core.prediction import VIEWS, Condition
from coterie.process import PROCESSES, ExactDenoiser, Mixture, Transported, transport
from coterie.solvers import GRIDS, SOLVERS, Query, SolverState, integrate

F64 = torch.float64
NOTHING = Condition()
DATA = Mixture.gaussian(torch.tensor([1.3], dtype=F64), 0.4)

RANGES = {
    "vp_linear": {"t_min": 1e-3, "t_max": 1.0},
    "cosine": {"t_min": 1e-3, "t_max": 0.98},
    "rectified_flow": {"t_min": 1e-3, "t_max": 0.999},
    "ve": {},
}
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "ddim": 1, "dpm_solver_2": 2, "dpmpp_2m": 2}
# Where a Gaussian's variance is quadratic in t the midpoint rule gains an order.
GAINS = {("rectified_flow", "midpoint"): 1, ("ve", "midpoint"): 1}


def build(kind, **settings):
    return PROCESSES.parse({"kind": kind, **settings}).build()


def solver_of(kind, **settings):
    return SOLVERS.parse({"kind": kind, **settings}).build()


def times_of(process, kind, solver, intervals):
    """Times t_max -> t_min without the clean end: the grids the orders are stated for."""
    if kind == "ve":
        return GRIDS.parse("karras").build(process, intervals + 1)[:-1]
    if solver in ("ddim", "dpmpp_2m", "dpm_solver_2"):
        return GRIDS.parse("lambda").build(process, intervals + 1)[:-1]
    return torch.linspace(process.t_max, process.t_min, intervals + 1, dtype=F64)


def starts(process):
    return process.prior_std() * torch.tensor([[-1.5], [-0.4], [0.6], [1.7]], dtype=F64)


def error(process, kind, solver, intervals):
    times = times_of(process, kind, solver, intervals)
    x = starts(process)
    made = integrate(ExactDenoiser(process, DATA), x, NOTHING, times, solver_of(solver))
    t, u = (torch.full((4,), float(end), dtype=F64) for end in (times[0], times[-1]))
    return float((made - DATA.flow_map(process, x, t, u)).abs().max())


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(kind, solver):
    process = build(kind, **RANGES[kind])
    coarse, fine = (error(process, kind, solver, n) for n in (60, 120))
    order = ORDERS[solver] + GAINS.get((kind, solver), 0)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("kind", "intervals"), [("vp_linear", 40), ("cosine", 40), ("rectified_flow", 120), ("ve", 40)]
)
def test_order_of_rk4(kind, intervals):
    process = build(kind, **RANGES[kind])
    coarse, fine = (error(process, kind, "rk4", n) for n in (intervals, 2 * intervals))
    assert math.log2(coarse / fine) == pytest.approx(4.0, abs=0.4)


def test_published_errors_on_vp():
    process = build("vp_linear", **RANGES["vp_linear"])
    assert error(process, "vp_linear", "euler", 160) == pytest.approx(6.4e-3, rel=0.4)
    assert error(process, "vp_linear", "heun", 160) == pytest.approx(2.1e-4, rel=0.4)
    assert error(process, "vp_linear", "dpmpp_2m", 160) == pytest.approx(1.9e-4, rel=0.4)


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("kind", PROCESSES.kinds())
def test_C7_rk45_meets_its_tolerance_in_the_last_interval_too(kind, steps):
    process = build(kind)
    times = GRIDS.parse("uniform").build(process, steps)  # down to sigma = 0
    x, solver = starts(process), solver_of("rk45", rtol=1e-6, atol=1e-6)
    made = integrate(ExactDenoiser(process, DATA), x, NOTHING, times, solver)
    start = torch.full((4,), process.t_max, dtype=F64)
    end = torch.full((4,), process.t_min, dtype=F64)
    least = DATA.flow_map(process, x, start, end)
    wanted = ExactDenoiser(process, DATA)(least, end, NOTHING).value
    assert float((made - wanted).abs().max()) < 1e-4  # 0.7 and more in one jump


@pytest.mark.parametrize("kind", PROCESSES.kinds())
def test_rk45_meets_its_tolerance(kind):
    process = build(kind)
    low = process.time_of_lam(torch.tensor(4.0, dtype=F64))
    high = process.time_of_lam(torch.tensor(-3.5, dtype=F64))
    times = torch.stack([high, process.time_of_lam(torch.tensor(0.0, dtype=F64)), low])
    x = starts(process) * 0.7
    errors = []
    for tolerance in (1e-4, 1e-7):
        solver = solver_of("rk45", rtol=tolerance, atol=tolerance)
        made = integrate(ExactDenoiser(process, DATA), x, NOTHING, times, solver)
        exact = DATA.flow_map(process, x, high.expand(4), low.expand(4))
        errors.append(float((made - exact).abs().max()))
    assert errors[0] < 5e-2 and errors[1] < 1e-4 and errors[1] < errors[0] / 50


def test_rk45_particles_do_not_share_steps():
    process = build("vp_linear")
    data = Mixture(
        torch.tensor([[1.0], [-1.0]], dtype=F64),
        torch.tensor([0.02, 0.3], dtype=F64),
        torch.tensor([0.5, 0.5], dtype=F64),
    )
    times = torch.tensor([1.0, 0.4, 1e-2], dtype=F64)
    denoiser, x = ExactDenoiser(process, data), starts(process)
    together = integrate(denoiser, x, NOTHING, times, solver_of("rk45"))
    alone = torch.cat(
        [integrate(denoiser, row[None], NOTHING, times, solver_of("rk45")) for row in x]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", PROCESSES.kinds())
@pytest.mark.parametrize("solver", ["heun", "rk4", "dpmpp_2m"])
def test_every_process_from_data_to_noise_and_back(kind, solver):
    process = build(kind)
    lams = torch.linspace(3.0, -3.0, 25, dtype=F64)
    times = process.time_of_lam(lams)
    denoiser, x = ExactDenoiser(process, DATA), torch.tensor([[0.9], [1.9]], dtype=F64)
    up = integrate(denoiser, x, NOTHING, times, solver_of(solver))
    exact = DATA.flow_map(process, x, times[:1].expand(2), times[-1:].expand(2))
    torch.testing.assert_close(up, exact, rtol=3e-2, atol=3e-2)
    back = integrate(denoiser, up, NOTHING, times.flip(0), solver_of(solver))
    torch.testing.assert_close(back, x, rtol=0, atol=3e-2)


@pytest.mark.parametrize("kind", PROCESSES.kinds())
def test_all_views_give_the_same_ddim_step(kind):
    process = build(kind)
    t, u = process.time_of_lam(torch.tensor([-1.0, 0.5], dtype=F64))
    x = torch.tensor([[0.3], [1.1]], dtype=F64)
    made = []
    for view in VIEWS:
        query = Query(ExactDenoiser(process, DATA, view), NOTHING)
        made.append(solver_of("ddim").step(query, query(x, t), u, SolverState(), None)[0])
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["rectified_flow", "ve"])
def test_ddim_is_euler_on_straight_paths(kind):
    process = build(kind)
    times = GRIDS.parse("karras" if kind == "ve" else "uniform").build(process, 12)
    denoiser, x = ExactDenoiser(process, DATA, "flow"), starts(process)
    first, second = (
        integrate(denoiser, x, NOTHING, times, solver_of(name)) for name in ("ddim", "euler")
    )
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PROCESSES.kinds())
def test_first_step_of_dpmpp_is_ddim(kind):
    process = build(kind)
    t, u = process.time_of_lam(torch.tensor([-2.0, 0.5], dtype=F64))
    x = torch.tensor([[0.3], [1.1]], dtype=F64)
    denoiser = ExactDenoiser(process, DATA)
    times = torch.stack([t, u])
    first, second = (
        integrate(denoiser, x, NOTHING, times, solver_of(name)) for name in ("ddim", "dpmpp_2m")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_midpoint_is_dpm_solver_2_in_the_limit_of_small_steps():
    """Both are second order, so their difference falls like h^2 over a fixed range."""
    process = build("trig")
    gaps = []
    for count in (40, 80):
        times = process.time_of_lam(torch.linspace(-2.0, 2.0, count + 1, dtype=F64))
        made = [
            integrate(ExactDenoiser(process, DATA), starts(process), NOTHING, times, solver_of(s))
            for s in ("midpoint", "dpm_solver_2")
        ]
        gaps.append(float((made[0] - made[1]).abs().max()))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(2.0, abs=0.3)


def test_one_expert_served_in_two_processes_gives_one_sample():
    """An expert of vp_linear, integrated at home and as a rectified flow: equal to 1e-6."""
    home, away = build("vp_linear"), build("rectified_flow")
    data = Mixture(
        torch.tensor([[1.0], [-1.0]], dtype=F64),
        torch.tensor([0.3, 0.4], dtype=F64),
        torch.tensor([0.3, 0.7], dtype=F64),
    )
    expert = ExactDenoiser(home, data, "eps")
    lams = torch.linspace(-4.0, 3.0, 101, dtype=F64)
    at_home, at_away = home.time_of_lam(lams), away.time_of_lam(lams)
    x = starts(home)
    y, start = transport(home, away, x, at_home[:1].expand(4))
    torch.testing.assert_close(start, at_away[:1].expand(4))
    x = integrate(expert, x, NOTHING, at_home, solver_of("rk4"))
    y = integrate(Transported(expert, away), y, NOTHING, at_away, solver_of("rk4"))
    expected, _ = transport(home, away, x, at_home[-1:].expand(4))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
