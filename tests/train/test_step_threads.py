"""Threads are chosen by timing the work itself, and a run keeps what it was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.core import threads as core
from coterie.core.errors import ConfigError, TrainingError
from coterie.core.threads import Choice, Watch, candidates, check_threads, choose
from coterie.runs.training import make_trainer, start
from coterie.train import Trainer, checkpoint, read_metrics
from coterie.train import threads as step_threads
from coterie.train.run_directory import RunDir
from coterie.train.threads import StepThreads, read_threads, run_threads
from small_runs import short
from toy_training import (
    POISON_STEPS,
    ToyModel,
    ToyObjective,
    ToySource,
    toy_config,
    without_machine,
)


class Machine:
    """A clock that moves when work is done: slow with the numbers of threads that it says."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.calls = 0.0, 0
        self.seconds = {int(name[1:]): value for name, value in seconds.items()}

    def work(self) -> None:
        self.calls += 1
        self.now += self.seconds[torch.get_num_threads()]

    def clock(self) -> float:
        return self.now


def chosen(machine: Machine, present: int | None = None, most: int = 2) -> Choice:
    return choose(machine.work, most, present, machine.clock)


def test_the_fastest_number_is_chosen_and_left_as_it_was():
    before = torch.get_num_threads()
    assert candidates(6) == [1, 2, 4, 6] and candidates(1) == [1]
    assert chosen(Machine(t1=0.9, t2=0.67)).threads == 2  # alone
    assert chosen(Machine(t1=0.9, t2=3.2)).threads == 1  # beside a busy core
    assert chosen(Machine(t1=0.9, t2=0.88), present=1).threads == 1  # not clearly faster
    assert chosen(Machine(t1=0.9, t2=0.67), present=1).threads == 2
    assert torch.get_num_threads() == before
    line = chosen(Machine(t1=0.9, t2=0.67)).line("a step", "--train.threads")
    assert (
        line == "2 threads (a step with 1: 900 ms, 2: 670 ms); --train.threads N fixes the number"
    )


def test_one_possible_number_is_not_timed_and_long_work_not_often():
    machine = Machine(t1=1.0)
    assert chosen(machine, most=1).threads == 1 and not machine.calls
    machine = Machine(t1=60.0, t2=60.0)
    chosen(machine)
    assert machine.calls == 3  # for the caches, and to know


def test_threads_that_are_far_slower_are_out_after_one_timing():
    machine = Machine(t1=0.1, t2=1.5)  # beside a busy core
    assert chosen(machine).threads == 1
    assert machine.calls == 3 and machine.now == pytest.approx(1.7)
    close = Machine(t1=0.1, t2=0.12)
    assert chosen(close).threads == 1
    assert close.calls == 1 + 2 * core.ROUNDS


@pytest.mark.parametrize(("ahead", "calls"), [(11, 0), (12, 3), (400, 7), (10**6, 11)])
def test_threads_are_chosen_within_a_share_of_the_calls_to_come(ahead, calls):
    machine = Machine(t1=0.1, t2=0.1)
    choice = choose(machine.work, 2, None, machine.clock, ahead)
    assert machine.calls == calls
    assert calls <= max(core.SHARE * ahead, 3)
    told = choice.line("a step", "--train.threads")
    assert ("too short a run" in told) == (not calls)


def test_slow_work_is_timed_again_and_what_may_be_faster_now_and_then():
    watch = Watch(Choice(2, {}, cost=0.1), most=2)
    assert not any(watch.again(0.1) for _ in range(24))
    assert any(watch.again(0.5) for _ in range(8))
    few = Watch(Choice(1, {}, cost=0.1), most=2)
    asked = [few.again(0.1) for _ in range(200)]
    assert asked.index(True) * 0.1 >= 9.0  # a hundred times what choosing took


def test_F3_more_threads_than_a_multiple_of_the_cores_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "cores", lambda: 2)
    check_threads(8)
    nine = short("dit", train__threads=9, train__steps=1)
    with pytest.raises(ConfigError, match=r"^train\.threads: 9 is not allowed; allowed: 1\.\.8; "):
        start(nine, tmp_path / "run", progress=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    check_threads(12)
    with pytest.raises(ConfigError, match=r"train\.threads: 100000"):
        short("dit", train__threads=100_000)


class Scripted:
    """In the place of :func:`choose`: numbers of threads by the order of asking."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def __call__(self, call: Any, most: int, present: int | None = None, **_: Any) -> Choice:
        with core.threads(2):
            call()  # what is timed must leave no trace
        return Choice(self.numbers.pop(0), {1: 1.0, 2: 1.0}, 1e9)


@pytest.fixture
def two(monkeypatch):
    """Two threads to choose from; a choice at the first step and wherever a test asks for one."""
    monkeypatch.setattr(step_threads, "most_threads", lambda: 2)
    monkeypatch.setattr(core, "cores", lambda: 2)


def toy(out: Path | None, **changes: Any) -> tuple[Trainer, list[int]]:
    """A trainer, and the number of threads of each step that it makes (not of what it times)."""
    used: list[int] = []
    timed = [False]

    class Objective(ToyObjective):
        def forward(self, *args):
            if not timed[0]:
                used.append(torch.get_num_threads())
            return super().forward(*args)

    trainer = Trainer(
        toy_config(**{"threads": None, **changes}), ToyModel(), Objective(), ToySource(),
        seed=3, run_dir=out,
    )  # fmt: skip
    real = trainer._gradients.trial

    def trial(*args):
        timed[0] = True
        real(*args)
        timed[0] = False

    trainer._gradients.trial = trial
    return trainer, used


def run(trainer: Trainer, stop: int = 0) -> list[dict]:
    records: list[dict] = []

    def seen(_: Trainer, record: dict) -> None:
        records.append(record)
        if record["step"] == stop:
            raise TrainingError("killed")

    try:
        trainer.fit(False, (seen,))
    except TrainingError:
        assert stop
    return records


def test_what_is_timed_leaves_no_trace(two, monkeypatch):
    monkeypatch.setattr(step_threads, "choose", Scripted(1))
    chosen, used = toy(None)
    fixed, _ = toy(None, threads=1)
    assert without_machine(run(chosen)) == without_machine(run(fixed))
    assert used == [1] * POISON_STEPS
    for name, value in fixed.model.state_dict().items():
        assert torch.equal(value, chosen.model.state_dict()[name])


def test_a_resumed_run_changes_threads_where_it_did(two, monkeypatch, tmp_path):
    """Chosen 2, changed to 1 at step 10, killed after step 11, whose newest checkpoint is of 8."""
    monkeypatch.setattr(step_threads, "choose", Scripted(2, 1))
    calls: list[int] = []

    def again(self: Watch, seconds: float) -> bool:
        calls.append(1)
        return len(calls) == 10

    monkeypatch.setattr(Watch, "again", again)
    trainer, used = toy(tmp_path / "run")
    run(trainer, stop=11)
    assert used == [2] * 10 + [1]
    assert read_threads(RunDir(tmp_path / "run")) == [(0, 2), (10, 1)]
    assert checkpoint.steps(tmp_path / "run")[-1][0] == 8
    again_, used = toy(tmp_path / "run")
    run(again_)
    assert used == [2, 2] + [1] * 10  # steps 9 and 10 as they were made
    with run_threads(tmp_path / "run", None):
        assert torch.get_num_threads() == 1
    monkeypatch.setattr(step_threads, "choose", Scripted(2, 1))
    calls.clear()
    whole, _ = toy(tmp_path / "whole")
    run(whole)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    assert without_machine(records[0]) == without_machine(records[1])


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        *(f'{{"threads": {t}}}' for t in ("[[0]]", "[[3, 1], [0, 2]]", "[[0, 99999]]", "7")),
    ],
)
def test_a_damaged_list_of_threads_is_refused_by_name(two, tmp_path, text):
    (tmp_path / "threads.json").write_text(text)
    with pytest.raises(ConfigError, match=r"threads\.json"):
        StepThreads(None, RunDir(tmp_path), lambda step: None)


def test_real_timing_is_repeated_to_the_bit_by_its_list(two, tmp_path):
    """Real timing of a real model, whatever it chooses: again with that list it is the same run."""
    config = short("deepseekmoe", train__threads=None, train__steps=12)
    start(config, tmp_path / "one", progress=False)
    known = json.loads((tmp_path / "one" / "threads.json").read_text())["threads"]
    assert known and known[0][0] == 0
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    (tmp_path / "two" / "threads.json").write_text(json.dumps({"threads": known}))
    start(config, tmp_path / "two", progress=False)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert without_machine(records[0]) == without_machine(records[1])


def test_the_trial_of_a_whole_model_changes_nothing():
    trainer = make_trainer(short("promoe"))
    trainer._begin_step()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._gradients.trial(0, 0)
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.grad is None for value in trainer.parameters.values())
