"""Draws choose their threads by timing their first call, and samples are recorded with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from coterie.cli.main import cli, run
from coterie.core import threads as core
from coterie.core.errors import ConfigError
from coterie.core.threads import Choice, Watch
from coterie.runs.sample import threads as here
from coterie.runs.sample.sample_files import sample_run
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from small_runs import short


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "run"
    config = short("dit", train__threads=None, train__steps=1)
    sample = config.sample.replace(batch=4, steps=5)
    return start(config.replace(sample=sample), out, progress=False)


@pytest.fixture
def two(monkeypatch):
    """Two threads to choose from, and a draw that is never too short."""
    monkeypatch.setattr(core, "cores", lambda: 2)
    monkeypatch.setattr(here, "most_threads", lambda: 2)
    monkeypatch.setattr(core, "LEAST_CALLS", 0)


def scripted(monkeypatch, *numbers: int) -> list[int]:
    """In the place of timing: these numbers in turn; the calls that each choice made."""
    left, made = list(numbers), []

    def choose(call, most, present, ahead) -> Choice:
        call()
        made.append(ahead)
        return Choice(left.pop(0), {1: 1.0, 2: 1.0}, 1e-9)

    monkeypatch.setattr(here, "choose", choose)
    return made


def recorded(folder: Path) -> list[int]:
    entries = json.loads((folder / "samples.json").read_text())
    return [entry["draw"]["threads"] for entry in entries]


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_threads_of_samples_are_chosen_by_timing_and_change_no_sample(trained, two, tmp_path):
    """Real timing: what is thrown away leaves no trace, and the same number gives the same bits."""
    sample_run(load_run(trained), 6, out=tmp_path / "chosen")
    (count,) = set(recorded(tmp_path / "chosen"))
    assert count in (1, 2) and torch.get_num_threads() == 1
    with core.asking(count, print):
        sample_run(load_run(trained), 6, out=tmp_path / "fixed")
    assert recorded(tmp_path / "fixed") == [count] * 6
    assert pictures(tmp_path / "fixed") == pictures(tmp_path / "chosen")


def test_threads_change_between_batches_only_and_every_sample_knows_its_own(
    trained, two, tmp_path, monkeypatch
):
    made = scripted(monkeypatch, 2, 1)
    slow = iter([False, True, False])
    monkeypatch.setattr(Watch, "again", lambda self, seconds: next(slow))
    lines: list[str] = []
    with core.asking(None, lines.append):
        sample_run(load_run(trained), 12, out=tmp_path, index=[11, 0, 5])
    assert recorded(tmp_path) == [1, 2, 2]
    assert made == [30, 10]  # two calls in each of five steps of a batch
    assert [line[:9] for line in lines] == ["2 threads", "1 thread "]
    assert torch.get_num_threads() == 1


def test_threads_that_are_asked_for_or_too_few_calls_are_not_timed(
    trained, two, tmp_path, monkeypatch
):
    made = scripted(monkeypatch)
    with core.asking(2, print):
        sample_run(load_run(trained), 5, out=tmp_path)
    assert recorded(tmp_path) == [2] * 5
    monkeypatch.setattr(core, "LEAST_CALLS", 4)
    sample_run(load_run(trained), 4, out=tmp_path)
    assert recorded(tmp_path) == [1] * 4 and not made
    with pytest.raises(ConfigError, match=r"^--threads: 99 .*1\.\.8"), core.asking(99, print):
        pass


@pytest.mark.parametrize(
    "verb", ["demo", "place", "report", "restore", "rollout", "sample", "sweep"]
)
def test_threads_too_many_are_refused_by_every_verb_that_takes_them(two, verb, capsys):
    code = run([verb, "--threads", "99", "x", "--out", "y"])
    told = capsys.readouterr().err
    assert code == 2 and told.startswith("error: --threads: 99 is not allowed; allowed: 1..8")


def test_threads_are_an_option_of_verbs_and_hold_for_all_they_do(trained, two, monkeypatch):
    made = scripted(monkeypatch, 2, 2)
    folder = str(trained)
    done = CliRunner().invoke(cli, ["sample", folder, "--num", "4"])
    assert done.exit_code == 0, done.output
    assert "threads  2 threads (a call with 1: 1e+03 ms" in done.output
    assert recorded(trained / "samples") == [2] * 4
    quiet = CliRunner().invoke(cli, ["sample", folder, "--num", "4", "-q"])
    assert "threads" not in quiet.output and len(made) == 2
    fixed = CliRunner().invoke(cli, ["sample", folder, "--num", "4", "--threads", "2", "-q"])
    assert fixed.exit_code == 0 and len(made) == 2
    assert recorded(trained / "samples") == [2] * 4 and torch.get_num_threads() == 1
