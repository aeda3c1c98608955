"""Denoisers of ranges of the noise level: who answers where, in memory and from disk."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from exact_mixtures import DATA, F64, NAMES, NOTHING, process, states, whole
from torch import Tensor, nn

from coterie.core.batch import Batch
from coterie.core.context import NULL_LABEL
from coterie.core.errors import CheckpointError, ConfigError, DataError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.ensembles import (
    LoadedMembers,
    Loader,
    MemberFacts,
    MixtureConfig,
    NoiseRangesConfig,
    losses_per_bin,
    search_boundaries,
)
from coterie.process import ExactDenoiser, Mixture
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


# Members on disk


class Net(nn.Module):
    """A denoiser with weights: 8 kB each, all different."""

    view = "flow"

    def __init__(self, number: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(2048, generator=rng))
        self.process = process()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(torch.tanh(x * self.weight[:2] + self.weight[2:4] * t[:, None]), "flow")


SIZE = 2048 * 4


class Disk:
    """Loaders of four networks; counts what is alive."""

    def __init__(self, fail: int | None = None) -> None:
        self.log: list[tuple[int, str]] = []
        self.fail = fail

    def loaders(self) -> list[Loader]:
        facts = [MemberFacts(f"expert {i}", process(), "flow") for i in range(4)]
        return [
            Loader(one, lambda i=index: self.load(i), SIZE)  # type: ignore[misc]
            for index, one in enumerate(facts)
        ]

    def load(self, index: int) -> Net:
        self.log.append((index, threading.current_thread().name.split("_")[0]))
        if index == self.fail:
            raise CheckpointError(f"expert {index}: damaged")
        return Net(index)


EDGES = (0.75, 0.5, 0.25)
SETTINGS: dict[str, Any] = {
    "solver": SOLVERS.parse("heun"),
    "grid": GRIDS.parse("uniform"),
    "steps": 12,
}


def start() -> Tensor:
    return initial_noise(process(), (2,), SampleNoise(range(6)))


def draw(members: Any) -> Tensor:
    return sample(NoiseRangesConfig(boundaries=EDGES).build(members), start(), NOTHING, **SETTINGS)


@pytest.mark.parametrize(("prefetch", "most"), [(False, 1), (True, 2)])
def test_one_member_is_resident_and_samples_are_those_of_all(prefetch: bool, most: int) -> None:
    disk = Disk()
    members = LoadedMembers(disk.loaders(), resident=1, prefetch=prefetch)
    made = NoiseRangesConfig(boundaries=EDGES).build(members)
    assert members.num_bytes == 0 and not disk.log  # nothing is read before it is needed
    seen: list[tuple[int, ...]] = []
    found = sample(
        made, start(), NOTHING, callback=lambda *_: seen.append(members.held), **SETTINGS
    )
    assert torch.equal(found, draw([Net(i) for i in range(4)]))
    assert members.peak_bytes == most * SIZE
    assert all(len(held) == 1 for held in seen)
    assert [held for held, after in pairwise([*seen, ()]) if held != after] == [
        (0,), (1,), (2,), (3,),
    ]  # fmt: skip
    assert [index for index, _ in disk.log] == [0, 1, 2, 3] and members.loads == 4
    thread = "prefetch" if prefetch else "MainThread"
    assert [name for _, name in disk.log] == ["MainThread", *[thread] * 3]
    assert list(made.parameters()) == []
    members.release()
    assert members.num_bytes == 0


def test_a_second_run_reads_again_and_more_may_stay() -> None:
    disk = Disk()
    members = LoadedMembers(disk.loaders(), resident=4)
    first, second = draw(members), draw(members)
    assert torch.equal(first, second) and members.loads == 4
    assert members.peak_bytes == 4 * SIZE and members.held == (0, 1, 2, 3)
    small = LoadedMembers(disk.loaders(), resident=2, prefetch=False)
    assert torch.equal(draw(small), first) and torch.equal(draw(small), first)
    assert small.peak_bytes == 2 * SIZE and small.loads == 8


def test_a_wrong_guess_of_what_is_next_changes_nothing() -> None:
    disk = Disk()
    members = LoadedMembers(disk.loaders())
    members.get(0)
    members.expect(3)
    member = members.get(1)
    assert isinstance(member, Net) and torch.equal(member.weight, Net(1).weight)
    assert members.held == (1,) and [index for index, _ in disk.log] == [0, 3, 1]


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_damaged_member_is_an_error_when_it_is_needed(prefetch: bool) -> None:
    members = LoadedMembers(Disk(fail=2).loaders(), prefetch=prefetch)
    with pytest.raises(CheckpointError, match="expert 2: damaged"):
        draw(members)
    with pytest.raises(ConfigError, match="resident"):
        LoadedMembers([], resident=0)


# Where to cut


def test_the_best_cut_is_that_of_all_cuts() -> None:
    rng = np.random.default_rng(0)
    edges = np.linspace(0.0, 1.0, 8)
    for keep in (False, True):
        table = rng.random((3, 7))
        found = search_boundaries(table, edges, keep_order=keep)
        best = float("inf")
        orders = [(0, 1, 2)] if keep else [(a, b, c) for a in range(3) for b in range(3)
                                           for c in range(3) if len({a, b, c}) == 3]  # fmt: skip
        for order in orders:
            for first in range(8):
                for second in range(first, 8):  # noisy bins are the last ones
                    owner = [order[2]] * first + [order[1]] * (second - first)
                    owner += [order[0]] * (7 - second)
                    best = min(best, float(np.mean([table[m, n] for n, m in enumerate(owner)])))
        assert found.loss == pytest.approx(best)
        assert found.best_alone == pytest.approx(float(table.mean(1).min()))
        assert list(found.boundaries) == sorted(found.boundaries, reverse=True)
        assert len(found.members) == len(found.boundaries) + 1


def test_experts_of_known_ranges_are_cut_where_they_were_made() -> None:
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    table = [[3.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 3.0], [3.0, 1.0, 1.0, 3.0]]
    found = search_boundaries(table, edges)
    assert found.members == (0, 2, 1) and found.boundaries == (0.75, 0.25)
    assert found.loss == 1.0 and found.best_alone == 2.0
    alone = search_boundaries([[1.0] * 4, [2.0] * 4], edges)  # nobody needs the second
    assert alone.members == (0,) and alone.boundaries == ()


def test_tables_with_gaps_are_refused() -> None:
    with pytest.raises(DataError, match=r"losses\[1\]\[0\]"):
        search_boundaries([[1.0, 2.0], [float("nan"), 1.0]], [0.0, 0.5, 1.0])
    with pytest.raises(DataError, match="edges"):
        search_boundaries([[1.0, 2.0]], [0.0, 1.0])
    with pytest.raises(ConfigError, match="keep_order"):
        search_boundaries(np.ones((20, 2)), [0.0, 0.5, 1.0])
    assert search_boundaries(np.ones((20, 2)), [0.0, 0.5, 1.0], keep_order=True).loss == 1.0


def test_losses_per_bin_find_who_is_good_where() -> None:
    narrow = Mixture(DATA.means, DATA.stds, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5], dtype=F64))
    poor = ExactDenoiser(process(), narrow)

    class Upper(ExactDenoiser):
        """Exact above 0.5, and below as poor as the other is above."""

        def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
            right, wrong = super().__call__(x, t, cond), poor(x, t, cond)
            return right.replace(value=torch.where(t[:, None] > 0.5, right.value, wrong.value))

    class Lower(Upper):
        def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
            right, wrong = whole()(x, t, cond), poor(x, t, cond)
            return right.replace(value=torch.where(t[:, None] > 0.5, wrong.value, right.value))

    x0, _ = DATA.sample(200, torch.Generator().manual_seed(0))
    batches = [Batch(part, NOTHING, torch.arange(100)) for part in x0.split(100)]
    edges = np.linspace(0.05, 0.95, 10)
    members = {"low": Lower(process(), DATA), "high": Upper(process(), DATA)}
    made = NoiseRangesConfig(boundaries=(0.9,)).build(members)
    table = losses_per_bin(made, batches, edges.tolist())
    assert np.array_equal(table, losses_per_bin(made, batches, edges.tolist()))
    found = search_boundaries(table, edges)
    assert found.members == (1, 0)
    assert found.boundaries[0] == pytest.approx(0.45) or found.boundaries[0] == pytest.approx(0.55)
    assert found.loss < found.best_alone


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
    assert torch.equal(same, two_steps(plain, [0, 0]))
    assert torch.equal(switched[0], same[0]) and not torch.equal(switched[1], same[1])
    torch.testing.assert_close(switched[1], two_steps(first_order, [0, 0])[1])
