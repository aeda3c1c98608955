"""Processes that end with their parent: real ones, killed and told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.cli.main import run
from coterie.core.errors import ConfigError
from coterie.runs.islands.partition import PartitionConfig
from coterie.runs.islands.plan import make_plan
from coterie.runs.islands.workers import job_files
from coterie.runs.launch import launch, planned, supervisor, worker
from coterie.runs.launch.supervisor import PER_CORE, meeting_place
from coterie.train.parallel import ParallelConfig
from small_runs import short

WITHIN = 60.0  # s
CORES = os.cpu_count() or 1


def until(found: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + WITHIN
    while not found():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, "it ended before its time"
        time.sleep(0.05)


def alive(word: str) -> list[int]:
    """Processes whose command line has the word, and that are no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if word.encode() in line and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_G2_islands_end_with_the_process_that_started_them(
    tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / f"plan-{number.name}"
    base = short("dit-moe", train__steps=100_000, train__checkpoint_every=100_000)
    make_plan(base, PartitionConfig.from_dict({"islands": 2, "by": "labels"}), folder)
    argv = ["island", "run", str(folder), "--jobs", "2", "-q"]
    code = f"from coterie.cli.main import main; main({argv!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        logs = [folder / f"island-{index}" / "metrics.jsonl" for index in range(2)]
        until(lambda: all(log.is_file() and log.stat().st_size for log in logs), parent)
        assert len(alive(str(folder))) == 3
        parent.send_signal(number)
        code_, told = parent.wait(WITHIN), parent.stderr.read().decode()  # type: ignore[union-attr]
        until(lambda: not alive(str(folder)))
    finally:
        parent.kill()
        parent.wait()
    saved = [list((folder / f"island-{i}" / "checkpoints").glob("step-*")) for i in range(2)]
    if number == signal.SIGTERM:
        assert code_ == 143 and "stopped by SIGTERM; islands that were training have saved" in told
        assert all(saved), "they were not given the time to save"
    else:
        assert code_ == -9 and not any(saved)


def test_G2_a_child_in_foreign_code_ends_too() -> None:
    """It holds the interpreter, so no thread of its own can watch the pipe."""
    code = """
import ctypes, os, sys
from coterie.runs.launch.child_processes import stop_with_parent
stop_with_parent()
os.write(1, b"ready %d\\n" % os.getpid())
ctypes.PyDLL(None).sleep(600)
"""
    parent = f"""
import sys, time
from coterie.runs.launch import child_processes
child = child_processes.start({code!r}, [])
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait()
    until(lambda: not _runs(child))
    process.stdout.close()


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        (
            {"data": 5000},
            r"parallel: 'data=5000,.*at most \d+ processes on \d+ cores",
        ),
        ({"data": 3}, r"train\.batch: 16 .*a multiple of 3"),
        ({"expert": 16, "data": 1}, r"parallel: .* has \d+ experts, fewer than 16 processes"),
    ],
)
def test_G2_processes_that_have_nothing_to_do_are_not_started(
    degrees: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(supervisor, "run_processes", started)
    monkeypatch.setattr(supervisor.os, "cpu_count", lambda: 8)
    with pytest.raises(ConfigError, match=said):
        launch(short("dit-moe", train__batch=16), tmp_path / "run", ParallelConfig(**degrees))
    assert not (tmp_path / "run").exists()


def test_G2_many_processes_are_started_by_whoever_insists() -> None:
    count = PER_CORE * CORES + 1
    config = short("dit-moe", train__batch=count * 2)
    with pytest.raises(ConfigError, match="--oversubscribe starts them all the same"):
        planned(config, ParallelConfig(data=count))
    assert planned(config, ParallelConfig(data=count), oversubscribe=True) == {
        "processes": count,
        "samples_per_process": 2,
        "threads_per_process": 1,
    }


def test_G2_a_dry_run_says_what_will_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--data=digits", "--model.backbone.image_size=8", "--model.backbone.patch=2"]
    dry = ["train", "dit-moe", *size, "--train.batch=8", "-n", "--json"]
    assert run([*dry, "--parallel", "data=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["processes"] == 2 and found["samples_per_process"] == 4
    assert run([*dry, "--parallel", "data=3"]) == 2
    assert "a multiple of 3" in capsys.readouterr().err


def test_H_a_process_that_lost_another_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work.json").write_text("{}")
    monkeypatch.setattr(worker, "stop_with_parent", lambda: None)
    monkeypatch.setenv("RANK", "1")

    def losing(_: object) -> None:
        place = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534]"
        raise RuntimeError(f"{place} Connection closed by peer [127.0.0.1]:123\n" + "frame\n" * 40)

    assert worker.main(tmp_path / "work.json", losing) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("process 1: lost another process (") and "closed by peer" in line

    def bug(_: object) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        worker.main(tmp_path / "work.json", bug)


def test_H_what_a_killed_supervisor_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "coterie-processes-theirs").mkdir()  # without our mark
    (tmp_path / "coterie-processes-theirs" / "thesis").write_text("theirs")
    code = """
import os, signal
from coterie.runs.launch.supervisor import meeting_place
with meeting_place():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -9
    names = {path.name for path in tmp_path.iterdir()}
    (dead,) = names - {"coterie-processes-theirs"}
    with meeting_place() as first:
        assert (tmp_path / dead).is_dir(), "it may just have begun"
        for path in (tmp_path / dead, first):
            os.utime(path, (1, 1))
        with meeting_place() as second:
            there = {path.name for path in tmp_path.iterdir()}
            assert there == {"coterie-processes-theirs", first.name, second.name}
    assert {path.name for path in tmp_path.iterdir()} == {"coterie-processes-theirs"}


def test_H_job_files_quote_what_a_shell_would_run(tmp_path: Path) -> None:
    folder = tmp_path / "a b $(touch ran) `id` #x: %a & é"
    make_plan(short("dit-moe"), PartitionConfig.from_dict({"islands": 2, "by": "labels"}), folder)
    slurm, sky, _ = job_files(folder, ("slurm", "skypilot"))
    script = slurm.read_text(encoding="utf-8")
    fake = 'srun() { printf "%s\\n" "$@"; }\nSLURM_ARRAY_TASK_ID=1\n'
    done = subprocess.run(["sh", "-c", fake + script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        *("coterie", "island", "run", str(folder), "--index", "1", "--quiet"),
    ]
    assert f'#SBATCH --output="{str(folder).replace("%", "%%")}/island-%a.log"' in script
    (line,) = [text for text in sky.read_text(encoding="utf-8").splitlines() if "run: " in text]
    command = json.loads(line.removeprefix("run: "))
    shown = subprocess.run(
        ["sh", "-c", f"coterie() {{ printf '%s\\n' \"$@\"; }}; {command}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.stdout.splitlines() == ["island", "run", str(folder), "--index", "0", "--quiet"]
    assert not (tmp_path / "ran").exists()
    for letter in '"\\':
        with pytest.raises(ConfigError, match=r"plan: .* a path without quotes"):
            job_files_in(tmp_path / f"x{letter}y")


def job_files_in(folder: Path) -> None:
    make_plan(short("dit-moe"), PartitionConfig.from_dict({"islands": 2, "by": "labels"}), folder)
    job_files(folder, ("slurm",))
