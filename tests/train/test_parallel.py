"""Several processes train what one process trains; killed, hung or told to stop, they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from together import in_processes

from coterie.core.errors import CheckpointError, ConfigError, CoterieError, TrainingError
from coterie.runs.config import RunConfig
from coterie.runs.launch import Hung, launch, supervisor
from coterie.runs.trained_run import load_run
from coterie.runs.training import make_trainer, start
from coterie.train import Interrupted, Trainer, checkpoint, read_metrics
from coterie.train.parallel import ParallelConfig, Processes, Spread, sharding
from coterie.train.run_directory import RunDir
from coterie.train.world import ALONE, World
from small_runs import short

STEPS = 50
SHARED = {"rexmoe": "expert", "rmoe": "shard", "promoe:token-choice": "shard"}
"""Systems whose layers share experts or memory, or whose loss reads parameters after the forward,
and the layout that this is hardest for."""
KILLED_WITHIN = 60.0  # s


def config(system: str = "", **changes: Any) -> RunConfig:
    """Eight experts, a balance loss and a bias that counts, two micro-batches; or 5 steps of a
    system."""
    if system:
        return short(system, train__steps=5)
    small = {
        "model__backbone__trunk__width": 24,
        "model__backbone__trunk__heads": 2,
        "model__backbone__trunk__slots__0__expert__router__selection_bias": True,
        "train__steps": STEPS,
        "train__accumulate": 2,
        "train__checkpoint_every": 1000,
        "train__log_every": 10,
    }
    return short("dit-moe", **{**small, **changes})


def train(out: Path, world: World = ALONE, stop: int = 0, **changes: Any) -> Trainer:
    """Train in ``out``, or stop as after a signal when ``stop`` steps are done."""
    trainer = make_trainer(config(**changes), RunDir(out), world=world)

    def at(_: Trainer, record: dict[str, Any]) -> None:
        told = not isinstance(world, Spread) or world.processes.rank == 1  # all agree
        if told and record["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        trainer.fit(False, (at,))
    except Interrupted as error:
        assert stop and error.exit_code == 143
    return trainer


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def assert_close_runs(run: Path, reference: Path, steps: int = STEPS) -> None:
    """Losses and gradient norms of every step, and the balance statistics that were logged."""
    found, expected = (read_metrics(path / "metrics.jsonl") for path in (run, reference))
    assert [record["step"] for record in found] == [*range(1, steps + 1)]
    for ours, theirs in zip(found, expected[:steps], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-4)
        assert ours.get("experts") == theirs.get("experts")
        for group in ("losses", "aux"):
            assert ours.get(group) == pytest.approx(theirs.get(group), abs=1e-5)
        for one, other in zip(ours.get("noise_bins", ()), theirs.get("noise_bins", ())):
            assert one == pytest.approx(other, abs=1e-5)


def assert_same_weights(run: Path, reference: Path, tolerance: float) -> None:
    found, expected = (checkpoint.load(checkpoint.latest(path)) for path in (run, reference))
    assert found.step == expected.step == STEPS
    assert found.config_hash == expected.config_hash
    assert found.state.keys() == expected.state.keys()
    for group, tensors in expected.state.items():
        assert found.state[group].keys() == tensors.keys()
        for name, value in tensors.items():
            own = found.state[group][name]
            assert own.shape == value.shape and own.dtype == value.dtype, name
            # Adam divides by its gradient: where that is noise, so is the sign of the step.
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(own, value, rtol=0, atol=tolerance, msg=name)


FEW = {"train__steps": 4, "train__checkpoint_every": 1}


def full_at(step: int) -> Callable[..., Path]:
    """Saves checkpoints on a disk that is full from ``step`` on."""
    real = checkpoint.save

    def save(*given: Any, **named: Any) -> Path:
        if named["step"] >= step:
            raise CheckpointError("no space left")
        return real(*given, **named)

    return save


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone")
    train(run)
    return run


def test_two_processes_train_what_one_does(tmp_path, alone, monkeypatch):
    """Copies, shards, experts apart; stopped and resumed; begun and ended by one process."""
    monkeypatch.setattr(sharding, "LEAST", 1)  # every block a message of its own
    train(tmp_path / "both", stop=15)

    def work(laid_out: Callable[..., Processes]) -> None:
        for axis in ("data", "shard", "expert"):
            train(tmp_path / axis, Spread(laid_out(**{axis: 2})))
        train(tmp_path / "again", Spread(laid_out(expert=2)), stop=20)
        assert (
            checkpoint.latest(tmp_path / "again").name == "step-00000021"
        )  # the step in which all have heard
        train(tmp_path / "again", Spread(laid_out(expert=2)))
        train(tmp_path / "both", Spread(laid_out(shard=2)), stop=35)
        for system, axis in SHARED.items():
            train(tmp_path / f"two-{system}", Spread(laid_out(**{axis: 2})), system=system)
        said = r"^(the first process stopped: )?no space left"
        full = mock.patch.object(checkpoint, "save", full_at(3))
        with full, pytest.raises(CoterieError, match=said):
            train(tmp_path / "full", Spread(laid_out(expert=2)), **FEW)
        train(tmp_path / "full", Spread(laid_out(shard=2)), **FEW)
        for changes, said in (
            ({"train__batch": 6}, r"train\.batch: 3 .*a multiple of 2"),
            ({"train__compile": True}, r"train\.compile: True .*false in several processes"),
        ):
            with pytest.raises(ConfigError, match=said):
                train(tmp_path / "refused", Spread(laid_out(data=2)), **changes)

    in_processes(tmp_path / "two", 2, work)
    train(tmp_path / "few", **FEW)
    assert_close_runs(tmp_path / "full", tmp_path / "few", steps=4)
    for axis in ("data", "shard", "expert"):
        assert_close_runs(tmp_path / axis, alone)
        assert_same_weights(tmp_path / axis, alone, 2e-4)
    assert losses(tmp_path / "again") == losses(tmp_path / "expert")  # to the bit
    assert_same_weights(tmp_path / "again", tmp_path / "expert", 0.0)
    assert checkpoint.latest(tmp_path / "both").name == "step-00000036"
    train(tmp_path / "both")
    assert_close_runs(tmp_path / "both", alone)
    for system in SHARED:
        train(tmp_path / system, system=system)
        found, expected = losses(tmp_path / f"two-{system}"), losses(tmp_path / system)
        assert found == pytest.approx(expected, abs=1e-5) and len(found) == 5


def test_four_processes_and_mixtures_of_degrees(tmp_path, alone):
    mixed = ({"expert": 2, "shard": 2}, {"data": 2, "expert": 2}, {"data": 2, "shard": 2})
    uneven = {"model__backbone__trunk__slots__0__expert__num_experts": 7, "train__steps": 6}
    train(tmp_path / "seven", **uneven)
    train(tmp_path / "apart", stop=2, **uneven)

    def work(laid_out: Callable[..., Processes]) -> None:
        train(tmp_path / "expert", Spread(laid_out(expert=4)))
        for number, degrees in enumerate(mixed):
            train(tmp_path / str(number), Spread(laid_out(**degrees)), stop=8)
        train(tmp_path / "apart", Spread(laid_out(expert=2, shard=2)), stop=3, **uneven)
        bad = {"objective__weighting": {"kind": "snr"}, "train__lr": 1e30}
        with pytest.raises(TrainingError, match=r"not finite|is nan|is inf"):
            train(tmp_path / "bad", Spread(laid_out(expert=4)), **bad)

    in_processes(tmp_path / "four", 4, work)
    assert_close_runs(tmp_path / "expert", alone)
    assert_same_weights(tmp_path / "expert", alone, 2e-4)
    for number in range(len(mixed)):
        assert_close_runs(tmp_path / str(number), alone, steps=9)
    train(tmp_path / "apart", **uneven)  # begun and ended by one process
    assert_close_runs(tmp_path / "apart", tmp_path / "seven", steps=6)
    assert any("skipped" in record for record in read_metrics(tmp_path / "bad" / "metrics.jsonl"))


def test_a_killed_process_costs_less_than_a_minute(tmp_path, alone, monkeypatch):
    """Real processes: one is killed, all go on from the last checkpoint, and none is left."""
    run = tmp_path / "run"
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen
    monkeypatch.setattr(
        supervisor.child_processes.subprocess,
        "Popen",
        lambda *a, **k: started.append(real(*a, **k)) or started[-1],
    )
    when: dict[str, float] = {}

    def kill() -> None:
        while not checkpoint.steps(run):
            time.sleep(0.05)
        started[1].kill()
        when["killed"] = time.monotonic()
        before = checkpoint.steps(run)[-1][0]
        while checkpoint.steps(run)[-1][0] <= before and len(started) < 5:
            time.sleep(0.05)
        when["resumed"] = time.monotonic()

    threading.Thread(target=kill, daemon=True).start()
    said: list[str] = []
    settings = config(train__checkpoint_every=10, train__keep=9)
    launch(settings, run, ParallelConfig(data=2), progress=False, say=said.append)
    assert said == [
        "process 1 of 2 was killed by SIGKILL; attempt 2 goes on from the last checkpoint"
    ]
    assert len(started) == 4 and all(process.poll() is not None for process in started)
    assert when["resumed"] - when["killed"] < KILLED_WITHIN
    assert_close_runs(run, alone)
    assert load_run(run).step == STEPS
    assert (run / "model" / "manifest.json").is_file()
    assert start(settings, run, progress=False) == run  # one process finds nothing left to do


WORKER = """
import json, os, signal, struct, sys, time
from pathlib import Path
path, rank = Path(sys.argv[1]), int(os.environ["RANK"])
work = json.loads(path.read_text())

def beat(count, pulse=1):
    path = Path(os.environ["COTERIE_BEATS"], f"rank-{rank}")
    path.write_bytes(struct.pack("<QQ", count, pulse))

def stop(number, frame):
    path.with_name(f"error-{rank}").write_text(f"stopped by SIGTERM; after step 7; saved it")
    os._exit(143)

signal.signal(signal.SIGTERM, stop)
beat(1)
Path(work["out"]).mkdir(exist_ok=True)
Path(work["out"], f"pid-{rank}").write_text(str(os.getpid()))
"""


def fake(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Workers that only do ``body``, without importing torch."""
    monkeypatch.setattr(supervisor, "WORKER", WORKER + textwrap.dedent(body))


def assert_nobody_is_left(out: Path) -> None:
    pids = [int(path.read_text()) for path in out.glob("pid-*")]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


HANGS = {
    "says less than the others": """
        for pulse in range(600):
            beat(5 if rank == 1 else 9, pulse)
            time.sleep(0.1)
        """,
    "is stopped while it waits": """
        beat(9)
        for pulse in range(1 if rank == 1 else 600):
            beat(9, pulse)
            time.sleep(0.1)
        time.sleep(600)
        """,
}


@pytest.mark.parametrize("how", HANGS)
def test_a_process_that_hangs_is_named(tmp_path, monkeypatch, how):
    fake(monkeypatch, HANGS[how])
    begin = time.monotonic()
    with pytest.raises(Hung, match=r"process 1 of 3 did not answer for 1 s") as error:
        launch(config(train__batch=12), tmp_path / "run", ParallelConfig(data=3), timeout=1.0)
    assert error.value.exit_code == 124
    assert time.monotonic() - begin < 11
    assert_nobody_is_left(tmp_path / "run")


def test_an_error_that_would_come_again_is_not_tried_again(tmp_path, monkeypatch):
    fake(
        monkeypatch,
        """
        if rank == 0:
            path.with_name("error-0").write_text("train.batch: 7 is not allowed")
            sys.exit(2)
        time.sleep(600)
        """,
    )
    said: list[str] = []
    with pytest.raises(TrainingError, match=r"^train\.batch: 7 is not allowed$"):
        launch(config(), tmp_path / "run", ParallelConfig(data=2), say=said.append)
    assert not said
    assert_nobody_is_left(tmp_path / "run")


def test_restarts_come_to_an_end(tmp_path, monkeypatch):
    fake(monkeypatch, "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(600)")
    said: list[str] = []
    expected = r"process 1 of 2 was killed by SIGKILL; gave up after 2 attempts"
    with pytest.raises(TrainingError, match=expected):
        launch(config(), tmp_path / "run", ParallelConfig(data=2), restarts=1, say=said.append)
    assert len(said) == 1
    assert_nobody_is_left(tmp_path / "run")


def test_a_signal_reaches_everybody_and_they_save(tmp_path, monkeypatch):
    fake(monkeypatch, "time.sleep(600)")
    out = tmp_path / "run"

    def terminate() -> None:
        while len(list(out.glob("pid-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(Interrupted, match="SIGTERM; after step 7; saved it") as error:
        launch(config(), out, ParallelConfig(data=2))
    assert error.value.exit_code == 143
    assert_nobody_is_left(out)


def test_nobody_outlives_a_supervisor_that_is_killed():
    """And whoever ends for another reason says so by its own code."""
    code = """
        import os, sys, time
        from coterie.runs.launch.worker import stop_with_parent
        stop_with_parent()
        print(os.getpid(), flush=True)
        time.sleep(float(sys.argv[1]))
        sys.exit(3)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    children = [
        subprocess.Popen([*command, seconds], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for seconds in ("600", "0.1")
    ]
    for child in children:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline()
    assert children[1].wait(20) == 3
    assert children[0].poll() is None
    children[0].stdin.close()  # type: ignore[union-attr]  # as the system does when it dies
    assert children[0].wait(20) == 1
    for child in children:
        child.stdin.close()  # type: ignore[union-attr]
        child.stdout.close()  # type: ignore[union-attr]
