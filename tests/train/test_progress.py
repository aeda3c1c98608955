"""Progress for people: where it cannot be shown, training goes on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest

from coterie.core.streams import error_stream
from coterie.train import Trainer, checkpoint
from coterie.train.progress import stages
from toy_training import ToyModel, ToyObjective, ToySource, toy_config


def broken_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")


def closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], TextIO | None]] = {
    "a pipe whose reader has left": broken_pipe,
    "a full disk": full,
    "closed": closed,
    "none": lambda: None,
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_F4_training_goes_on_without_a_place_for_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], TextIO | None]
) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stderr", stream)
    trainer = Trainer(toy_config(steps=4), ToyModel(), ToyObjective(), ToySource(), 3, tmp_path)
    state = trainer.fit(progress=True)
    with stages(2, "report") as done:
        done("half")
    print("note", file=error_stream())
    monkeypatch.undo()
    assert state.step == 4
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step-00000004"
    if stream is not None:
        with suppress(OSError):  # of what it still held
            stream.close()


def test_F4_a_stream_that_works_shows_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    Trainer(toy_config(steps=4), ToyModel(), ToyObjective(), ToySource(), 3, tmp_path).fit(True)
    assert "4/4" in shown.getvalue() and "loss=" in shown.getvalue()
