"""Members that are read when they are needed: what is in memory, and when."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact_mixtures import NOTHING, process
from torch import Tensor, nn

from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.ensembles import LoadedMembers, Loader, MemberFacts, NoiseRangesConfig
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample


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
