"""Training that is killed, interrupted or runs out of disk goes on as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from coterie.core.errors import CheckpointError, TrainingError
from coterie.train import (
    CheckpointWarning,
    Interrupted,
    Trainer,
    checkpoint,
    load_weights,
    read_metrics,
)
from toy_training import (
    POISON_STEPS,
    ToyModel,
    ToyObjective,
    ToySource,
    toy_config,
    without_machine,
)

FORK = multiprocessing.get_context("fork")

CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_resume import run_child
run_child(Path(sys.argv[1]), kill_at=10)
"""


def run_child(
    run: Path, kill_at: int = 0, stop_at: int = 0, signals: int = 1, started: object = None
) -> None:
    """Train in ``run`` in a process of its own and exit as the command line would.

    The process kills itself after step ``kill_at``, or asks itself to stop after ``stop_at``; with
    ``started`` it says when the first step is done, and waits to be killed.
    """

    def act(done: int, total: int, record: dict) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if done == stop_at:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
        if started is not None:
            started.set()
            time.sleep(600)

    try:
        trainer_in(run).fit(act)
    except Interrupted as error:
        sys.exit(error.exit_code)


def exit_code_of(run: Path, **options: int) -> int | None:
    """Exit code of a forked :func:`run_child` (forked, as importing torch takes seconds)."""
    process = FORK.Process(target=run_child, args=(run,), kwargs=options)
    process.start()
    process.join(60)
    return process.exitcode


def trainer_in(run: Path | None, **changes: object) -> Trainer:
    return Trainer(toy_config(**changes), ToyModel(), ToyObjective(), ToySource(), 3, run)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference")
    trainer_in(run).fit(False)
    return run


def assert_same_run(run: Path, reference: Path) -> None:
    """Every record, every tensor of the last checkpoint, and the scalars but the clock."""
    records = read_metrics(run / "metrics.jsonl")
    assert without_machine(records) == without_machine(read_metrics(reference / "metrics.jsonl"))
    found, expected = (checkpoint.load(checkpoint.latest(path)) for path in (run, reference))
    assert found.step == expected.step == POISON_STEPS
    assert found.state.keys() == expected.state.keys()
    for group, tensors in expected.state.items():
        assert found.state[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found.state[group][name], value), (group, name)
    clock = {"seconds": None}
    assert {**found.scalars, **clock} == {**expected.scalars, **clock}


def test_killed_processes_resume_to_the_bit(tmp_path, uninterrupted):
    # Before the first checkpoint (4), right after one, between two, and again on the way.
    for kill_at in (3, 8, 10, 11, 19):
        assert exit_code_of(tmp_path, kill_at=kill_at) == -signal.SIGKILL
    trainer_in(tmp_path).fit(False)
    assert_same_run(tmp_path, uninterrupted)


def test_a_fresh_process_goes_on_from_one_that_was_killed(tmp_path, uninterrupted):
    own, shared = Path(__file__).parents[:2]
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(own), str(shared)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    trainer_in(tmp_path).fit(False)
    assert_same_run(tmp_path, uninterrupted)


class Crash(BaseException):
    """Stands for the process dying at this very point."""


@pytest.mark.parametrize("point", ["write_tensors", "seal", "sync", "rename", "remove"])
def test_dying_inside_a_save_resumes_to_the_bit(tmp_path, uninterrupted, monkeypatch, point):
    """Nothing that runs on the way out of a crash may be needed: leftovers stay on the disk."""
    import coterie.core.folder as folder
    import coterie.core.tensors as tensors_io

    owner, name = {
        "write_tensors": (tensors_io, "write_tensors"),
        "seal": (checkpoint, "seal"),
        "sync": (folder, "sync"),
        "rename": (Path, "rename"),
        "remove": (checkpoint, "remove"),
    }[point]
    real, calls = getattr(owner, name), []

    def crash(*args: object) -> object:
        calls.append(args)
        if len(calls) == {"write_tensors": 8, "sync": 9, "remove": 1}.get(point, 2):
            raise Crash
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        patch.setattr(folder.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Crash):
            trainer_in(tmp_path).fit(False)
    trainer_in(tmp_path).fit(False)
    assert_same_run(tmp_path, uninterrupted)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_interrupting_in_this_process_at_every_kind_of_step(tmp_path, uninterrupted):
    for stop_at in (2, 8, 13):  # before any checkpoint, on one, between two

        def stop(done, total, record, stop_at=stop_at):
            if done == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted, match=rf"SIGINT; after step {stop_at}; saved") as error:
            trainer_in(tmp_path).fit(stop)
        assert error.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is before
        assert checkpoint.latest(tmp_path).name == f"step-{stop_at:08d}"
    trainer_in(tmp_path).fit(False)
    assert_same_run(tmp_path, uninterrupted)


def test_a_terminated_process_saves_and_a_second_signal_exits_at_once(tmp_path):
    assert exit_code_of(tmp_path, stop_at=6) == 143
    assert checkpoint.latest(tmp_path).name == "step-00000006"
    assert exit_code_of(tmp_path, stop_at=9, signals=2) == 143
    assert checkpoint.latest(tmp_path).name == "step-00000008"


def test_a_second_trainer_in_another_process_is_refused(tmp_path):
    started = FORK.Event()
    process = FORK.Process(target=run_child, args=(tmp_path,), kwargs={"started": started})
    process.start()
    try:
        assert started.wait(60)  # one step is done, so it holds the directory
        with pytest.raises(TrainingError, match=f"trained by process {process.pid}"):
            trainer_in(tmp_path).fit(False)
    finally:
        process.kill()
        process.join(60)
    # Killed while holding it: the lock is free again.
    assert trainer_in(tmp_path).fit(False).step == POISON_STEPS


def test_resuming_survives_a_damaged_newest_checkpoint(tmp_path, uninterrupted):
    trainer_in(tmp_path).fit(False)
    newest = checkpoint.latest(tmp_path)
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-3] ^= 16
    (newest / "optimizer.safetensors").write_bytes(data)
    with pytest.warns(CheckpointWarning, match=r"step-00000020/optimizer\.safetensors"):
        trainer_in(tmp_path).fit(False)
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_does_nothing_again(tmp_path, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert trainer_in(uninterrupted).fit(False).step == POISON_STEPS
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_logging_and_saving_more_often_changes_nothing(tmp_path, uninterrupted):
    trainer_in(tmp_path, log_every=1, checkpoint_every=1, keep=1).fit(False)
    losses = [
        [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
        for run in (tmp_path, uninterrupted)
    ]
    assert losses[0] == losses[1]
    assert len(checkpoint.steps(tmp_path)) == 1


@pytest.mark.parametrize("log_every", [3, 100])  # the log fails first, or the checkpoint does
def test_a_full_disk_stops_training_with_everything_saved(tmp_path, uninterrupted, log_every):
    def fill(done, total, record):
        if done == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: could not be written"):
            trainer_in(tmp_path, log_every=log_every).fit(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [4, 8]
    trainer_in(tmp_path).fit(False)
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    expected = [record["loss"] for record in read_metrics(uninterrupted / "metrics.jsonl")]
    assert losses == expected


def test_a_checkpoint_that_cannot_be_written_stops_training(tmp_path, uninterrupted, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    def fill(done, total, record):
        if done == 10:
            monkeypatch.setattr("coterie.core.tensors.write_tensors", full)

    with pytest.raises(CheckpointError, match=r"step-00000012: could not be written \(No space"):
        trainer_in(tmp_path).fit(fill)
    monkeypatch.undo()
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [4, 8]
    trainer_in(tmp_path).fit(False)
    assert_same_run(tmp_path, uninterrupted)


def test_weights_of_a_run_load_for_use(tmp_path, uninterrupted):
    trainer = trainer_in(None)
    trainer.fit(False)
    plain = trainer.model.state_dict()
    for weights, expected in {
        "model": plain,
        "ema": {**plain, **trainer.ema.tensors(0.9)},
        "ema-0.5": {**plain, **trainer.ema.tensors(0.5)},
    }.items():
        model = ToyModel()
        assert load_weights(uninterrupted, model, weights).step == POISON_STEPS
        for name in ("first.weight", "first.bias", "second.weight", "second.bias", "bias"):
            assert torch.equal(model.state_dict()[name], expected[name]), (weights, name)
    with pytest.raises(CheckpointError, match=r"weights: 'ema-0\.1'"):
        load_weights(uninterrupted, ToyModel(), "ema-0.1")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_weights(tmp_path, ToyModel())


def test_a_model_of_another_shape_is_refused_by_tensor(tmp_path):
    trainer_in(tmp_path).fit(False)
    model = ToyModel()
    model.second = torch.nn.Linear(4, 2)
    trainer = Trainer(toy_config(), model, ToyObjective(), ToySource(), 3, tmp_path)
    with pytest.raises(CheckpointError, match=r"second\.bias is .*\[1\], expected .*\[2\]"):
        trainer.fit(False)


def test_time_spent_adds_up_over_interruptions(tmp_path):
    def stop(done, total, record):
        if done == 5:
            raise Crash

    with pytest.raises(Crash):
        trainer_in(tmp_path).fit(stop)
    saved = checkpoint.load(checkpoint.latest(tmp_path)).scalars["seconds"]
    assert trainer_in(tmp_path).fit(False).seconds > saved > 0
