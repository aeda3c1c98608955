"""The command line in odd places: full and closed outputs, no git, no home, no permission."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.cli import main as module
from coterie.cli.main import run
from coterie.core import machine
from coterie.core.errors import DataError
from coterie.core.user_cache import cache_root

OUTS = [
    ["train", "dit-moe"],
    ["demo"],
    ["verify", "dit-moe"],
    ["island", "plan", "ddm"],
    ["restore", "runs/x", "."],
    ["sample", "runs/x"],
    ["report", "runs/x"],
    ["sweep", "runs/x", "--select.k=1"],
    ["compose", "runs/x", "runs/y"],
    ["place", "runs/x"],
    ["rollout", "runs/x"],
    ["upcycle", "runs/x"],
]


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("argv", OUTS, ids=lambda argv: argv[0])
def test_G5_an_out_that_cannot_be_is_refused_before_anything_else(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("theirs")
    assert run([*argv, "--out", str(tmp_path / "file" / "x")]) == 2
    assert f"error: {tmp_path / 'file'}: Not a directory" in line_of(capsys)
    assert run([*argv, "--out", str(tmp_path / ("n" * 300))]) == 2
    assert "a name of more than 255 bytes" in line_of(capsys)


@pytest.mark.parametrize("argv", OUTS, ids=lambda argv: argv[0])
def test_H_an_empty_out_is_not_the_present_folder(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*argv, "--out", ""]) == 2
    assert "empty; name a folder, or . for this one" in capsys.readouterr().err


def test_H_an_empty_run_is_not_the_present_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", ""]) == 2
    assert "missing RECIPE or RUN" in capsys.readouterr().err


def test_G5_results_of_a_benchmark_go_into_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "train", "--out", str(tmp_path)]) == 2
    assert f"error: {tmp_path}: a folder; --out is a file here" in line_of(capsys)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", b"/a"), "/a: Read-only file system"),
        (OSError(errno.EXDEV, "Cross-device", "/a", None, "/b"), "/a, /b: Cross-device"),
        (OSError("4096 requested and 12 written"), "4096 requested and 12 written"),
        (FileNotFoundError(), "FileNotFoundError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_G5_what_the_system_refuses_is_one_line(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(**_: object) -> None:
        raise error

    monkeypatch.setattr(module.cli, "main", failing)
    assert run([]) == 2
    assert line_of(capsys) == f"error: {said}"


def test_G5_a_name_too_long_to_look_for_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("sample", "report", "train"):
        assert run([verb, "n" * 300]) == 2
        assert line_of(capsys).startswith(("error: ", "Error: "))


def test_F4_G5_outputs_that_take_nothing(tmp_path: Path) -> None:
    """A real process: its notes are dropped, and an answer that could not be given is an error."""
    command = [sys.executable, "-m", "coterie.cli", "list"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: No space left on device"]
    reader, writer = os.pipe()
    os.close(reader)
    broken = subprocess.run([*command, "--bad"], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert broken.returncode == 2 and broken.stdout == b""


def test_G4_without_git_the_commit_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine.commit.cache_clear()
    try:
        assert machine.commit() == ""
        (tmp_path / "git").write_text("#!/bin/sh\nprintf 'caf\\351'\n")
        (tmp_path / "git").chmod(0o755)
        machine.commit.cache_clear()
        assert isinstance(machine.commit(), str)  # whatever it says, in whatever letters
    finally:
        machine.commit.cache_clear()


def test_H_caches_go_where_the_system_wants_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COTERIE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_root() == tmp_path / "caches" / "coterie"
    for other in ("", "relative"):  # as the standard says
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache_root() == tmp_path / ".cache" / "coterie"
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"


def test_G5_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("COTERIE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(
        DataError, match=r"COTERIE_CACHE: '~/\.cache/coterie' is not allowed; allowed: a"
    ):
        cache_root()
