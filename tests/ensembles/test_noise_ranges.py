"""Denoisers of ranges of the noise level: who answers where, in memory and from disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_mixtures import DATA, F64, NAMES, NOTHING, process, states, whole
from torch import Tensor

from coterie.core.context import NULL_LABEL
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.ensembles import (
    LoadedMembers,
    Loader,
    MemberFacts,
    MixtureConfig,
    NoiseRangesConfig,
)
from coterie.process import ExactDenoiser
from coterie.solvers import (
    GRIDS,
    SOLVERS,
    GuidanceConfig,
    Query,
    SolverState,
    guide,
    initial_noise,
    sample,
)


class Shifted(ExactDenoiser):
    """The exact denoiser, moved by a number that says who answered, and by the label."""

    def __init__(self, name: str, number: float, view: Any = "x0") -> None:
        super().__init__(process(name), DATA, view)
        self.number = number

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        answer = super().__call__(x, t, NOTHING)
        lean = torch.zeros(len(x), 1) if cond.label is None else cond.label[:, None].to(x)
        return answer.replace(value=answer.value + self.number + lean)


def ranges(*boundaries: float, name: str = "rectified_flow", **fields: Any) -> Any:
    members = [Shifted(name, 10.0 * index) for index in range(len(boundaries) + 1)]
    return NoiseRangesConfig(boundaries=boundaries, **fields).build(members)


def answered(made: Any, x: Tensor, t: Tensor, name: str = "rectified_flow") -> list[int]:
    """Who answered each row, read off the values."""
    gap = made(x, t, NOTHING).value - whole("x0", name)(x, t, NOTHING).value
    return [round(value / 10.0) for value in gap[:, 0].tolist()]


def test_each_range_is_answered_by_its_member_and_the_edge_by_the_noisier() -> None:
    t = torch.tensor([1.0, 0.9, 0.75, 0.7499, 0.5, 0.3, 0.25, 0.2, 0.001], dtype=F64)
    x = torch.randn(9, 2, dtype=F64)
    made = ranges(0.75, 0.5, 0.25)
    expected = [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert answered(made, x, t) == expected
    (routing,) = made(x, t, NOTHING).routings
    assert routing.ids[:, 0].tolist() == expected and routing.slot == "ensemble"


def test_a_boundary_is_met_by_times_in_float32() -> None:
    for edge in (0.9, 0.1, 0.35, 0.875):
        t = torch.tensor([edge])  # 0.9 becomes 0.899999976
        assert ranges(edge).member_at(t).tolist() == [0]
        assert ranges(edge).member_at(t - 1e-4).tolist() == [1]


@pytest.mark.parametrize("name", NAMES)
def test_boundaries_mean_the_same_in_every_unit_and_process(name: str) -> None:
    lam = torch.linspace(-3.0, 3.0, 61, dtype=F64)
    t = process(name).time_of_lam(lam)
    x = torch.randn(61, 2, dtype=F64)
    edges = torch.tensor([-1.55, 0.05, 1.25], dtype=F64)  # half log-SNR, between the points
    times = process(name).time_of_lam(edges).tolist()
    found = {
        "t": answered(ranges(*times, name=name), x, t, name),
        "sigma": answered(
            ranges(*(-edges).exp().tolist(), name=name, boundaries_in="sigma"), x, t, name
        ),
        "log_snr": answered(
            ranges(*(2 * edges).tolist(), name=name, boundaries_in="log_snr"), x, t, name
        ),
    }
    expected = (lam[:, None] > edges).sum(1).tolist()
    assert found == {"t": expected, "sigma": expected, "log_snr": expected}


def test_exact_members_of_three_processes_are_the_denoiser_of_all_data() -> None:
    t = process().time_of_lam(torch.linspace(-3.5, 3.5, 40, dtype=F64))
    x = process().diffuse(
        DATA.sample(40, torch.Generator().manual_seed(0))[0], torch.randn(40, 2), t
    )
    members = [whole(view, name) for view, name in zip(("eps", "x0", "v"), NAMES, strict=True)]
    config = NoiseRangesConfig(boundaries=(0.7, 0.3), process="rectified_flow")
    answer = config.build(members)(x, t, NOTHING)
    assert answer.view == "x0"
    assert float((answer.value - whole()(x, t, NOTHING).value).abs().max()) < 1e-10


def test_one_member_is_that_member() -> None:
    x, t = states()
    answer = NoiseRangesConfig().build([whole("v")])(x, t, NOTHING)
    assert torch.equal(answer.value, whole("v")(x, t, NOTHING).value)


def test_members_guide_themselves_with_weights_of_their_own() -> None:
    t = torch.tensor([0.9, 0.6, 0.2], dtype=F64)
    x, label = torch.randn(3, 2, dtype=F64), torch.tensor([2, 1, 3])
    made = ranges(0.8, 0.5, guidance=(4.0, None, 1.0))
    answer = made(x, t, Condition(label=label))
    plain = whole()(x, t, NOTHING).value
    null = float(NULL_LABEL)
    guided = [null + 4.0 * (2 - null), 10.0 + 1, 20.0 + 3]
    torch.testing.assert_close(answer.value, plain + torch.tensor(guided, dtype=F64)[:, None])
    with pytest.raises(ConfigError, match="weights of their own"):
        guide(made, GuidanceConfig(weight=2.0))(x, t, Condition(label=label))
    with pytest.raises(ConfigError, match="cond"):
        made(x, t, NOTHING)


def test_a_missing_range_is_answered_by_its_neighbour() -> None:
    t = torch.tensor([0.9, 0.6, 0.4, 0.2], dtype=F64)
    x = torch.randn(4, 2, dtype=F64)
    there = Shifted("rectified_flow", 10.0), Shifted("rectified_flow", 30.0)
    with pytest.warns(UserWarning, match="without (upper|gone): not given"):
        made = NoiseRangesConfig(boundaries=(0.75, 0.5, 0.25)).build(
            {"upper": None, "a": there[0], "gone": None, "b": there[1]}
        )
    assert answered(made, x, t) == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"boundaries": (0.2, 0.5)}, "boundaries.*t falls"),
        ({"boundaries": (0.5, 0.5)}, "boundaries"),
        ({"boundaries": (2.0, -1.0), "boundaries_in": "log_snr"}, "log_snr rises"),
        ({"boundaries": (0.5,), "guidance": (1.0,)}, "guidance.*2 weights"),
    ],
)
def test_ranges_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NoiseRangesConfig.from_dict(fields)


def test_members_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"boundaries.*2 ranges.*3 members have 2"):
        NoiseRangesConfig(boundaries=(0.5,)).build([whole()] * 3)
    with pytest.raises(ConfigError, match="router"):
        NoiseRangesConfig().build([whole()], lambda x, t, cond: x)
    with pytest.raises(ConfigError, match="names that all differ"):
        NoiseRangesConfig(boundaries=(0.5,)).build(Twins())


class Twins(LoadedMembers):
    def __init__(self) -> None:
        facts = MemberFacts("one", process())
        super().__init__([Loader(facts, whole, 1)] * 2)


# Multistep solvers at a switch


class Told:
    """The exact denoiser of one component; what it thinks jumps where another takes over."""

    def __init__(self, component: int) -> None:
        self.inner = ExactDenoiser(process(), DATA.component(component))
        self.process, self.view = self.inner.process, "x0"

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self.inner(x, t, cond)


def run(denoiser: Any, steps: int, solver: str, **fields: Any) -> Tensor:
    x = initial_noise(process(), (2,), SampleNoise(range(24))).double()
    grid, part = GRIDS.parse("lambda"), SOLVERS.parse({"kind": solver, **fields})
    return sample(denoiser, x, NOTHING, solver=part, grid=grid, steps=steps)


def errors(members: list[Any]) -> dict[str, float]:
    """Distance of 16 steps to the solution of the ensemble's own equation."""
    made = NoiseRangesConfig(boundaries=(0.6, 0.3)).build(members)
    exact = run(made, 400, "ddim")
    found = {how: run(made, 16, "dpmpp_2m", at_switch=how) for how in ("keep", "reset")}
    return {how: float((x - exact).abs().mean()) for how, x in found.items()}


def test_history_is_kept_or_forgotten_where_another_member_takes_over() -> None:
    # Members that agree: history is worth keeping. Members that do not: it is misleading.
    alike = errors([whole()] * 3)
    assert alike["keep"] < 0.8 * alike["reset"]
    apart = errors([Told(0), Told(3), Told(2)])
    assert apart["reset"] < 0.8 * apart["keep"]
    made = NoiseRangesConfig(boundaries=(0.6, 0.3)).build([whole()] * 3)
    kept, plain = run(made, 16, "dpmpp_2m"), run(whole(), 16, "dpmpp_2m")
    torch.testing.assert_close(kept, plain, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="at_switch"):
        SOLVERS.parse({"kind": "dpmpp_2m", "at_switch": "forget"})


def test_a_solver_forgets_row_by_row() -> None:
    """Two samples of one batch, of which only the second changes its member."""
    solver = SOLVERS.parse({"kind": "dpmpp_2m", "at_switch": "reset"}).build()
    plain = SOLVERS.parse("dpmpp_2m").build()
    first_order = SOLVERS.parse("ddim").build()
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    made = MixtureConfig(choice={"kind": "oracle"}).build(
        [whole(), whole("x0")], lambda x, t, cond: torch.zeros(len(x), 2)
    )

    def two_steps(rule: Any, change: list[int]) -> Tensor:
        at, state = x, SolverState()
        for t, u, task in ((0.8, 0.6, [0, 0]), (0.6, 0.4, change)):
            query = Query(made, Condition(task=torch.tensor(task)))
            estimate = query(at, torch.tensor(t, dtype=F64))
            at, state = rule.step(query, estimate, torch.tensor(u, dtype=F64), state, None)
        return at

    same, switched = two_steps(solver, [0, 0]), two_steps(solver, [0, 1])
    torch.testing.assert_close(same, two_steps(plain, [0, 0]), rtol=0, atol=1e-14)
    assert torch.equal(switched[0], same[0]) and not torch.equal(switched[1], same[1])
    torch.testing.assert_close(switched[1], two_steps(first_order, [0, 0])[1])
