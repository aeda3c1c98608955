"""Processes that end with the one that started them, however it ends.

A child reads from the pipe that its standard input is. Its parent holds the other end and never
writes; the system closes it when the parent is gone, and the child stops. On Linux the system also
sends the child a signal, so that one which hangs in foreign code ends too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

GRACE = 60.0  # s to write a checkpoint when asked to stop
POLL = 0.1  # s between looks at processes
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h

Child = subprocess.Popen[bytes]


def start(
    code: str,
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> Child:
    """A process of its own session that runs the Python ``code``, which is to call
    :func:`stop_with_parent` first. ``env``: further variables; ``output``: for all it says."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **(env or {})},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,  # a terminal's Ctrl-C is the parent's to pass on, once
    )


def stop_with_parent() -> None:
    """Exit when the parent is gone; a child calls this before anything else."""
    if sys.platform == "linux":
        # To the system the parent is the thread that started us; ours wait for their children.
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)

    def watch() -> None:
        # Not sys.stdin, whose lock an interpreter that ends for another reason would wait for.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def pass_on(number: int, children: Sequence[Child], grace: float = GRACE) -> None:
    """Send a signal to those that run, and wait until they have saved and ended, or for ``grace``
    seconds."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(POLL)


def kill(children: Sequence[Child]) -> None:
    """End those that still run, at once."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
        if child.stdin is not None:
            child.stdin.close()
