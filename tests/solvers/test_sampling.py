"""The loop: grids, counts, seeds, state, dtypes, whole runs on mixtures, and bad input."""

import pytest
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.solvers import (
    GRIDS,
    SOLVERS,
    Query,
    SolverState,
    asked_times,
    initial_noise,
    integrate,
    sample,
)

F64 = torch.float64
KINDS = PROCESSES.kinds()
ALONE = [kind for kind in SOLVERS.kinds() if kind != "feynman_kac"]  # that one wants a composition


def build(kind, **settings):
    return PROCESSES.parse({"kind": kind, **settings}).build()


def mixture():
    return Mixture(
        torch.tensor([[1.0, 0.5], [-1.0, 0.0]]),
        torch.tensor([0.1, 0.2]),
        torch.tensor([0.3, 0.7]),
    )


class Counting:
    """Counts calls and remembers the times asked about."""

    def __init__(self, inner):
        self.inner, self.process, self.times = inner, inner.process, []

    def __call__(self, x, t, cond):
        assert t.shape == (x.shape[0],)
        self.times.append(t[0])
        return self.inner(x, t, cond)


def run(process, solver, grid="uniform", steps=5, seeds=(1, 2, 3), **kwargs):
    noise = SampleNoise(seeds)
    x = initial_noise(process, (2,), noise)
    denoiser = kwargs.pop("denoiser", None) or ExactDenoiser(process, mixture())
    return sample(
        denoiser,
        x,
        kwargs.pop("cond", Condition()),
        solver=SOLVERS.parse(solver),
        grid=GRIDS.parse(grid),
        steps=steps,
        noise=noise,
        **kwargs,
    )


def grids_for(process):
    return [kind for kind in GRIDS.kinds() if kind != "respaced" or process.discrete]


@pytest.mark.parametrize("kind", KINDS)
def test_grids_fall_from_noise_to_clean(kind):
    process = build(kind)
    for grid in grids_for(process):
        for steps in (1, 2, 9):
            times = GRIDS.parse(grid).build(process, steps)
            assert times.shape == (steps + 1,) and times.dtype == F64
            assert bool((times.diff() < 0).all())
            assert float(times[0]) == process.t_max
            assert float(process.sigma(times[-1])) == 0.0
            assert bool((times[:-1] >= process.t_min).all())


def test_grid_shapes():
    vp, ve = build("vp_linear"), build("ve")
    lam = vp.lam(GRIDS.parse("lambda").build(vp, 9)[:-1]).diff()
    torch.testing.assert_close(lam, lam[0].expand(8), rtol=1e-8, atol=0)
    sigma = GRIDS.parse("karras").build(ve, 18)
    i = torch.arange(18, dtype=F64) / 17
    expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma[:-1], expected, rtol=1e-11, atol=0)
    rf = build("rectified_flow")
    made = rf.lam(GRIDS.parse({"kind": "shift", "shift": 3.0}).build(rf, 10)[1:-1])
    plain = rf.lam(GRIDS.parse("uniform").build(rf, 10)[1:-1])
    torch.testing.assert_close(made, plain - torch.tensor(3.0, dtype=F64).log())


@pytest.mark.parametrize(
    ("settings", "total", "steps", "expected"),
    [
        ({"spacing": "leading"}, 1000, 4, [750, 500, 250, 0]),
        ({"spacing": "leading", "offset": 1}, 1000, 4, [751, 501, 251, 1]),
        ({"spacing": "trailing"}, 1000, 4, [999, 749, 499, 249]),
        ({"spacing": "linspace"}, 1000, 4, [999, 666, 333, 0]),
        ({"spacing": "leading"}, 10, 3, [6, 3, 0]),
        ({"spacing": "trailing"}, 10, 3, [9, 6, 2]),
        ({"spacing": "linspace"}, 10, 3, [9, 4, 0]),
        ({"spacing": "linspace"}, 10, 1, [9]),
    ],
)
def test_respaced_indices(settings, total, steps, expected):
    grid = GRIDS.parse({"kind": "respaced", **settings})
    assert grid.indices(total, steps).tolist() == expected


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_respaced_models_are_asked_at_exact_integers(spacing):
    process = build("ddpm")
    grid = GRIDS.parse({"kind": "respaced", "spacing": spacing})
    for steps in (7, 100):
        counting = Counting(ExactDenoiser(process, mixture()))
        run(process, "ancestral", grid, steps, denoiser=counting, seeds=(1,))
        asked = process.time_input(torch.stack(counting.times))
        assert asked.tolist() == grid.indices(1000, steps).tolist()


@pytest.mark.parametrize("solver", ALONE)
def test_counts_of_evaluations(solver):
    process = build("vp_linear")
    config = SOLVERS.parse(solver)
    for steps in (1, 2, 5):
        counting = Counting(ExactDenoiser(process, mixture()))
        run(process, solver, steps=steps, denoiser=counting)
        claimed = config.evaluations(steps)
        assert len(counting.times) == claimed if claimed is not None else solver == "rk45"
    open_ended = config.evaluations(5, to_clean=False)
    if open_ended is not None:
        counting = Counting(ExactDenoiser(process, mixture()))
        times = torch.linspace(1.0, 0.1, 6, dtype=F64)
        noise = SampleNoise([0])
        integrate(counting, torch.zeros(1, 2), Condition(), times, config.build(), noise)
        assert len(counting.times) == open_ended


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ALONE)
def test_samples_depend_on_their_own_seed_only(kind, solver):
    process = build(kind)
    three = run(process, solver, seeds=(5, 6, 7))
    assert three.dtype == torch.float32 and bool(torch.isfinite(three).all())
    torch.testing.assert_close(three[1:2], run(process, solver, seeds=(6,)), rtol=0, atol=3e-5)
    torch.testing.assert_close(
        three.flip(0), run(process, solver, seeds=(7, 6, 5)), rtol=0, atol=3e-5
    )
    assert not torch.allclose(three[0], three[1])


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow", "ve"])
@pytest.mark.parametrize("solver", ALONE)
def test_samples_come_from_the_mixture(kind, solver):
    process = build(kind)
    steps = {"euler": 60, "ancestral": 60, "sde_dpmpp_1s": 60, "ddim": 60}.get(solver, 25)
    x = run(process, solver, "lambda", steps, seeds=range(400))
    right = x[:, 0] > 0
    # 400 fair draws: standard error of the share 0.023, plus the solver's own error.
    assert float(right.float().mean()) == pytest.approx(0.3, abs=0.09)
    torch.testing.assert_close(x[right].mean(0), torch.tensor([1.0, 0.5]), rtol=0, atol=0.06)
    assert float(x[right].std(0).mean()) == pytest.approx(0.1, abs=0.04)
    assert float(x[~right].std(0).mean()) == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("solver", ALONE)
def test_float64_is_kept(solver):
    process = build("vp_linear")
    data = mixture()
    data = Mixture(data.means.double(), data.stds.double(), data.weights.double())
    counting = Counting(ExactDenoiser(process, data))
    noise = SampleNoise([1, 2])
    x = initial_noise(process, (2,), noise).double()
    made = sample(
        counting, x, Condition(), solver=SOLVERS.parse(solver), grid=GRIDS.parse("lambda"),
        steps=5, noise=noise,
    )  # fmt: skip
    assert made.dtype == F64 and counting.times[0].dtype == F64


def test_final_step_is_the_denoised_sample():
    process = build("rectified_flow")
    for solver in set(ALONE) - {"rk45"}:  # whose last step is as exact as the others
        noise = SampleNoise([3])
        x = initial_noise(process, (2,), noise)
        expected = mixture().denoise(process, x, torch.ones(1))
        torch.testing.assert_close(run(process, solver, steps=1, seeds=(3,)), expected)


def test_callback_sees_every_step():
    process, seen = build("cosine"), []
    final = run(process, "heun", steps=4, callback=lambda *args: seen.append(args))
    assert [item[0] for item in seen] == [0, 1, 2, 3]
    assert [item[1] for item in seen] == GRIDS.parse("uniform").build(process, 4)[:-1].tolist()
    assert all(item[2].shape == (3, 2) and item[3].view == "x0" for item in seen)
    torch.testing.assert_close(final, seen[-1][3].value)


def test_sample_builds_no_graph_and_integrate_does():
    process = build("trig")
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    denoiser, times = ExactDenoiser(process, mixture()), GRIDS.parse("uniform").build(process, 3)
    euler = SOLVERS.parse("euler")
    made = sample(denoiser, x, Condition(), solver=euler, grid=GRIDS.parse("uniform"), steps=3)
    assert not made.requires_grad
    (grad,) = torch.autograd.grad(
        integrate(denoiser, x, Condition(), times, euler.build()).sum(), x
    )
    assert float(grad.abs().sum()) > 0


@pytest.mark.parametrize("solver", ["dpmpp_2m", "sde_dpmpp_2m", "rk45", "ddim"])
def test_state_follows_the_particles(solver):
    """Permuting particles, state and noise midway permutes the result and nothing else."""
    process = build("vp_linear")
    times = GRIDS.parse("lambda").build(process, 6)[:-1]
    made = SOLVERS.parse(solver).build()
    order = torch.tensor([2, 0, 1])

    def go(permute_at):
        query, state = Query(ExactDenoiser(process, mixture()), Condition()), SolverState()
        x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        for step in range(len(times) - 1):
            noise = SampleNoise([step * 10 + i for i in range(3)])
            if step >= permute_at:
                noise = SampleNoise([step * 10 + int(i) for i in order])
            if step == permute_at:
                x, state = x[order], state.index(order)
            x, state = made.step(query, query(x, times[step]), times[step + 1], state, noise)
        return x

    torch.testing.assert_close(go(2), go(99)[order], rtol=0, atol=1e-5)


def test_reset_makes_the_next_step_first_order():
    process = build("vp_linear")
    t, u, v = process.time_of_lam(torch.tensor([-2.0, -1.0, 0.2], dtype=F64))
    multi, single = (SOLVERS.parse(kind).build() for kind in ("dpmpp_2m", "ddim"))
    query = Query(ExactDenoiser(process, mixture()), Condition())
    x = torch.tensor([[0.3, 1.0], [-0.4, 0.2]])
    x, state = multi.step(query, query(x, t), u, SolverState(), None)
    estimate = query(x, u)
    first, _ = single.step(query, estimate, v, SolverState(), None)
    second, _ = multi.step(query, estimate, v, state, None)
    one = multi.step(query, estimate, v, state.reset(torch.tensor([True, False])), None)[0]
    both = multi.step(query, estimate, v, state.reset(), None)[0]
    torch.testing.assert_close(one[0], first[0])
    torch.testing.assert_close(one[1], second[1], rtol=0, atol=1e-7)
    torch.testing.assert_close(both, first)
    assert not torch.allclose(first, second, atol=1e-3)


def test_bad_input():
    process = build("vp_linear")
    for steps in (0, -3, 2.5, True):
        with pytest.raises(
            ConfigError, match=r"steps: .* is not allowed; allowed: an integer >= 1"
        ):
            run(process, "euler", steps=steps)
    with pytest.raises(ConfigError, match="a discrete process"):
        run(process, "euler", "respaced")
    with pytest.raises(ConfigError, match="at most 10"):
        run(build("ddpm", num_steps=10), "ddim", "respaced", steps=11)
    with pytest.raises(ConfigError, match="offset: 300 is not allowed; allowed: at most 249"):
        GRIDS.parse({"kind": "respaced", "spacing": "leading", "offset": 300}).indices(1000, 4)
    with pytest.raises(ConfigError, match="did you mean 'euler'"):
        SOLVERS.parse("eulr")
    for bad in (
        {"kind": "ancestral", "eta": 1.5},
        {"kind": "edm_churn", "s_min": 3.0, "s_max": 1.0},
        {"kind": "rk45", "rtol": 0},
    ):
        with pytest.raises(ConfigError, match="not allowed"):
            SOLVERS.parse(bad)


def test_bad_states_times_and_noise():
    process = build("vp_linear")
    denoiser, x = ExactDenoiser(process, mixture()), torch.zeros(2, 2)
    euler = SOLVERS.parse("euler").build()

    def go(times, x=x, solver=euler, noise=None, cond=None):
        times = torch.tensor(times, dtype=F64)
        integrate(denoiser, x, cond or Condition(), times, solver, noise)

    for times in ([1.0, 0.5, 0.7], [1.0], [0.5, 0.5]):
        with pytest.raises(ConfigError, match="times"):
            go(times)
    for times in ([1.2, 0.5], [1.0, -0.1], [float("nan"), 0.5]):
        with pytest.raises(ConfigError, match="times"):
            go(times)
    with pytest.raises(ConfigError, match="this solver is stochastic"):
        go([1.0, 0.5], solver=SOLVERS.parse("ancestral").build())
    with pytest.raises(ConfigError, match="2 seeds, one per sample"):
        go([1.0, 0.5], noise=SampleNoise([1]))
    with pytest.raises(ConfigError, match=r"cond\.label: 3 is not allowed"):
        go([1.0, 0.5], cond=Condition(label=torch.zeros(3, dtype=torch.long)))
    with pytest.raises(DataError, match="NaN or infinite"):
        go([1.0, 0.5], x=torch.full((2, 2), float("inf")))
    with pytest.raises(ConfigError, match="max_substeps: 1 is not allowed"):
        go([1.0, 0.1], x=x + 1, solver=SOLVERS.parse({"kind": "rk45", "max_substeps": 1}).build())


@pytest.mark.parametrize("registry", [SOLVERS, GRIDS], ids=["solvers", "grids"])
def test_configuration_round_trip(registry):
    for kind in registry.kinds():
        config = registry.parse(kind)
        assert registry.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("solver", sorted(set(ALONE) - {"rk45"}))
def test_the_times_of_a_run_are_known_beforehand(solver):
    for kind in ("rectified_flow", "ddpm"):
        process = build(kind)
        counting = Counting(ExactDenoiser(process, mixture()))
        run(process, solver, steps=4, denoiser=counting)
        known = asked_times(process, SOLVERS.parse(solver), GRIDS.parse("uniform"), 4)
        assert known.dtype == F64
        assert known.unique().shape == known.shape
        assert {float(t) for t in counting.times} == set(known.float().tolist())


def test_a_solver_that_chooses_its_times_has_none_beforehand():
    with pytest.raises(ConfigError, match="it chooses its own steps"):
        asked_times(build("ddpm"), SOLVERS.parse("rk45"), GRIDS.parse("uniform"), 4)
