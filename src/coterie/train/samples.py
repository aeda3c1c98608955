"""Samples of a run as files: pictures on a sheet, texts, clouds; always with their seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coterie.train.judges import Judge, judge_of
from coterie.train.run import LoadedRun
from coterie.train.sampling import Samples

PARTICLES = "particles.json"
"""What happened to weighted particles, batch by batch: effective sizes, ancestry, normaliser."""


def sample_run(
    run: LoadedRun,
    num: int = 64,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write samples to ``out`` (default: the run's ``samples/``), in place of those of an earlier
    draw, and return what people open: a sheet of pictures, a file of texts."""
    judge = judge_of(run)
    made = judge.draw(
        num, labels=labels, seed=seed, steps=steps, guidance=guidance, progress=progress
    )
    return write_samples(judge, made, Path(out) if out is not None else run.path / "samples")


def write_samples(judge: Judge, made: Samples, folder: Path) -> Path:
    """The files of samples that a judge has drawn; what people open."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9][0-9].png"):  # of an earlier, larger draw
        old.unlink()
    entries: list[dict[str, Any]] = [
        {"index": index, "label": int(label), "seed": made.seeds[index]}
        for index, label in enumerate(made.labels)
    ]
    shown = judge.write(made, entries, folder)
    (folder / "samples.json").write_text(json.dumps(entries, indent=2), encoding="utf-8")
    (folder / PARTICLES).unlink(missing_ok=True)
    if made.particles:
        records = [record.as_json() for record in made.particles]
        (folder / PARTICLES).write_text(json.dumps(records, indent=1), encoding="utf-8")
    return shown
