"""Training beside busy processes is measured, and none of these outlives the bench."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from coterie.bench import train_beside


def busy_of(pid: int) -> list[int]:
    """Processes whose command says that they are kept busy for ``pid``."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if train_beside.BUSY.encode() in words and str(pid).encode() in words:
            found.append(int(name))
    return found


def within_a_minute(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(holds())


def test_rows_hold_the_chosen_and_every_fixed_number(monkeypatch):
    monkeypatch.setattr(train_beside, "most_threads", lambda: 1)
    made = train_beside.run_beside(1, rounds=1, seconds=0.3)
    assert [row["threads"] for row in made["rows"]] == ["chosen", "1"]
    assert all(row["alone"] > 0 and row["beside"] > 0 for row in made["rows"])
    assert [goal["bound"] for goal in made["goals"]] == [">= 0.7", ">= 0.95", ">= 0.95"]
    assert not busy_of(os.getpid())


def test_busy_processes_end_with_the_block_and_with_their_parent():
    with pytest.raises(KeyError), train_beside.busy_processes(2):
        assert within_a_minute(lambda: len(busy_of(os.getpid())) == 2)
        raise KeyError
    assert not busy_of(os.getpid())
    code = "from coterie.bench.train_beside import *\nwith busy_processes(1):\n time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    assert within_a_minute(lambda: busy_of(parent.pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert within_a_minute(lambda: not busy_of(parent.pid))
