"""Gradients that several processes add up while they go back, whoever has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from together import Threads, in_threads
from torch import Tensor, nn

from coterie.train.parallel.gradients import LEAST, GradientSum, buckets
from coterie.train.parallel.layout import Cut
from coterie.train.parallel.processes import Beat, read_beats

USES = {
    "both": ((0, 1), (0, 1)),
    "one process": ((0, 1), (0,)),
    "nobody": ((0,), (0,)),
    "the other way round": ((1, 0), (0, 1)),
}
"""Which parameters the loss of each process is made of, in its order."""


class Whole:
    """Every parameter is whole in every process."""

    def of(self, name: str) -> Cut:
        return Cut()


def parameters() -> dict[str, nn.Parameter]:
    return {f"model.{i}": nn.Parameter(torch.full((i + 2,), 1.0 + i)) for i in range(2)}


def loss(own: dict[str, nn.Parameter], rank: int, used: tuple[int, ...]) -> Tensor:
    values = list(own.values())
    return torch.stack([(values[i] ** (2 + rank)).sum() for i in used]).sum()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("uses", USES)
def test_the_sum_of_what_processes_have(uses, micro_batches):
    def part(thread: Threads) -> list[Tensor | None]:
        own = parameters()
        total = GradientSum(own, Whole(), thread)  # type: ignore[arg-type]
        for _ in range(2):  # nothing is left over from the step before
            for parameter in own.values():
                parameter.grad = None
            for micro in range(micro_batches):
                if micro == micro_batches - 1:
                    total.start(torch.tensor([thread.rank, 0.5]))
                loss(own, thread.rank, USES[uses][thread.rank]).backward()
            assert total.finish().tolist() == [[0.0, 0.5], [1.0, 0.5]]
        return [None if p.grad is None else p.grad.clone() for p in own.values()]

    expected: list[Any] = [None, None]
    for rank, used in enumerate(USES[uses]):
        own = list(parameters().values())
        for i in used:
            (grad,) = torch.autograd.grad(loss({"": own[i]}, rank, (0,)), own[i])
            grad = grad * micro_batches
            expected[i] = grad if expected[i] is None else expected[i] + grad
    for found in in_threads(2, part):
        for one, wanted in zip(found, expected, strict=True):
            assert (one is None) == (wanted is None)
            if one is not None:
                torch.testing.assert_close(one, wanted)


def test_a_gradient_of_an_earlier_micro_batch_counts():
    def part(thread: Threads) -> Tensor | None:
        own = parameters()
        total = GradientSum(own, Whole(), thread)  # type: ignore[arg-type]
        loss(own, 0, (0, 1)).backward()
        total.start(torch.tensor([thread.rank, 0.5]))
        loss(own, 0, (0,)).backward()
        total.finish()
        return own["model.1"].grad

    for found in in_threads(2, part):
        assert found is not None and found.tolist() == [8.0] * 3


def test_messages_leave_before_the_backward_pass_ends(monkeypatch):
    monkeypatch.setattr("coterie.train.parallel.gradients.LEAST", 1)

    def part(thread: Threads) -> tuple[int, int]:
        own = parameters()
        total = GradientSum(own, Whole(), thread)  # type: ignore[arg-type]
        sent: list[int] = []
        reducing = thread.reducing

        def seen(values: Tensor, axes: tuple[str, ...]) -> Any:
            sent.append(len(values))
            return reducing(values, axes)

        thread.reducing = seen  # type: ignore[method-assign]
        total.start(torch.tensor([thread.rank, 0.5]))
        loss(own, 0, (0, 1)).backward()
        before = len(sent)
        total.finish()
        return before, len(sent)

    assert in_threads(2, part) == [(2, 2), (2, 2)]


def test_messages_hold_one_type_each_and_are_no_longer_than_an_eighth_of_all():
    sizes = [LEAST // 2] * 6 + [3 * LEAST, 5]
    members = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    members.append(nn.Parameter(torch.empty(7, dtype=torch.float64, device="meta")))
    found = [[p.numel() for p in bucket] for bucket in buckets(members)]
    assert found == [[LEAST // 2] * 2] * 3 + [[3 * LEAST], [5], [7]]


def test_two_layouts_of_one_process_beat_in_one_file(tmp_path: Path):
    first = Beat(str(tmp_path), 0)
    for _ in range(5):
        first()
    second = Beat(str(tmp_path), 0)  # what is mapped already is not cut short, not for a moment
    assert read_beats(tmp_path, 1)[0][0] == 5
    second()
    assert read_beats(tmp_path, 1)[0][0] == 1


def test_what_is_said_goes_alone_where_no_gradients_can_carry_it():
    def part(thread: Threads) -> Tensor | None:
        own = {"model.0": nn.Parameter(torch.ones(2, dtype=torch.float64))}
        total = GradientSum(own, Whole(), thread)  # type: ignore[arg-type]
        for said in ([0.5], [2.5, 7.0]):
            own["model.0"].grad = None
            total.start(torch.tensor([thread.rank, *said]))
            own["model.0"].sum().backward()
            assert total.finish().tolist() == [[0.0, *said], [1.0, *said]]
        return own["model.0"].grad

    for found in in_threads(2, part):
        assert found is not None and found.tolist() == [2.0, 2.0]


def test_more_may_be_said_from_step_to_step():
    def part(thread: Threads) -> list[Tensor | None]:
        own = parameters()
        total = GradientSum(own, Whole(), thread)  # type: ignore[arg-type]
        for said in ([0.5], [2.5, 7.0]):
            for parameter in own.values():
                parameter.grad = None
            total.start(torch.tensor([thread.rank, *said]))
            loss(own, 0, (0, 1)).backward()
            assert total.finish().tolist() == [[0.0, *said], [1.0, *said]]
        return [p.grad for p in own.values()]

    for first, second in in_threads(2, part):
        assert first is not None and second is not None
        assert first.tolist() == [4.0] * 2 and second.tolist() == [8.0] * 3
