"""Members that are read when they are needed: what is in memory, and when."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact_mixtures import NOTHING, process
from torch import Tensor, nn

from coterie.adapters import LoraConfig, adapters_of, attach, fold, merge, unmerge, weigh
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


# What is done to a member while it is in memory


class Mapped(Net):
    """A denoiser with a map that an adapter can be put on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.map = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(self.weight[:4].view(2, 2))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(self.map(torch.tanh(x)), "flow")


class MapDisk(Disk):
    def load(self, index: int) -> Mapped:
        super().load(index)
        return Mapped(index)


def adapted(members: LoadedMembers, index: int) -> dict[str, nn.Module]:
    member = members.get(index)
    assert isinstance(member, nn.Module)
    parts = attach(member, "a", LoraConfig(targets=("map",), rank=1))
    with torch.no_grad():
        for parameter in parts["map"].parameters():
            parameter.add_(1.0)
    return dict(parts)


def answer(members: LoadedMembers, index: int) -> Tensor:
    x = torch.tensor([[0.3, -0.2], [0.5, 0.1]])
    value: Tensor = members.get(index)(x, torch.full((2,), 0.5), NOTHING).value
    return value


@pytest.mark.parametrize("merged", [False, True])
def test_B2_adapters_stay_with_a_member_that_is_released(merged: bool) -> None:
    members = LoadedMembers(MapDisk().loaders(), resident=1)
    plain = answer(members, 0)
    parts = adapted(members, 0)
    there = answer(members, 0)
    assert not torch.allclose(there, plain, atol=1e-3)
    if merged:
        merge(members.get(0))  # type: ignore[arg-type]
    for other in (1, 2):
        assert torch.equal(answer(members, other), Mapped(other)(*asked_of()).value)
    again = members.get(0)
    assert isinstance(again, nn.Module) and torch.allclose(answer(members, 0), there, atol=1e-6)
    assert adapters_of(again)["a"]["map"] is parts["map"]  # what an optimiser holds goes on
    if merged:
        unmerge(again)
    weigh(again, {"a": 0.0})
    assert torch.equal(answer(members, 0), plain)
    members.release()
    assert torch.equal(answer(members, 0), plain)  # so do weights
    assert members.held == (0,)


def asked_of() -> tuple[Tensor, Tensor, Condition]:
    return torch.tensor([[0.3, -0.2], [0.5, 0.1]]), torch.full((2,), 0.5), NOTHING


def test_B2_other_changes_of_a_member_are_refused_when_it_would_be_released() -> None:
    def listen(member: nn.Module) -> None:
        member.register_forward_hook(lambda *_: None)

    def write(member: nn.Module) -> None:
        with torch.no_grad():
            member.map.weight.mul_(2.0)  # type: ignore[union-attr, operator]

    def replace(member: nn.Module) -> None:
        member.map = nn.Linear(2, 2)

    def folded(member: nn.Module) -> None:
        attach(member, "a", LoraConfig(targets=("map",), rank=1))
        fold(member)

    for change in (listen, write, replace, folded):
        members = LoadedMembers(MapDisk().loaders(), resident=1)
        member = members.get(0)
        assert isinstance(member, nn.Module)
        change(member)
        with pytest.raises(ConfigError, match=r"resident: 1 .*allowed: 4.*expert 0 was changed"):
            members.get(1)
        assert members.get(0) is member
        roomy = LoadedMembers(MapDisk().loaders(), resident=4)
        change(roomy.get(0))  # type: ignore[arg-type]
        roomy.get(1)
