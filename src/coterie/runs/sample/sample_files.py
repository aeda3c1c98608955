"""Samples of a run as files: a sheet of pictures, texts or clouds, with their seeds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, describe
from coterie.core.outputs import Outputs
from coterie.runs.judges import Judge, judge_of
from coterie.runs.sample.sampling import Samples
from coterie.runs.sample.threads import counted, draw_threads
from coterie.runs.trained_run import LoadedRun

PARTICLES = "particles.json"
"""What happened to weighted particles, batch by batch: effective sizes, ancestry, normaliser."""
INDEX = "samples.json"
SHEETS = (
    *("answers.csv", "grid.png", "rollouts.gif", "rollouts.json", "samples.npy", "samples.txt"),
    *("tasks.png", PARTICLES, INDEX),
)
"""Files of a whole draw that some judge writes."""
_NAMES = re.compile("|".join([r"\d{5,}\.png", *map(re.escape, SHEETS)]))


def sample_run(
    run: LoadedRun,
    num: int = 64,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    out: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    index: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Path:
    """Write samples to ``out`` (default: the run's ``samples/``), in place of those of an earlier
    draw, and return what people open: a sheet of pictures, a file of texts."""
    outputs = outputs_at(out if out is not None else run.path / "samples")
    judge = judge_of(run)
    chosen = {"index": index, "seeds": seeds}
    if type(judge).draw is not Judge.draw:
        for name, given in chosen.items():
            if given is not None:
                hint = "this run draws no samples one by one"
                raise ConfigError(describe(name, list(given)[:8], "none", hint))
        chosen = {}
    options = {"labels": labels, "seed": seed, "steps": steps, "guidance": guidance, **chosen}
    with draw_threads(judge, num, **options) as threads:
        made = judge.draw(num, progress=counted(threads, progress), **options)
        places = made.places or range(len(made.seeds))
        made = dataclasses.replace(made, threads=tuple(map(threads.of, places)))
    return write_samples(judge, made, outputs)


def outputs_at(folder: str | Path) -> Outputs:
    """``folder``, looked at before anything is drawn: ConfigError if samples cannot be written
    there, or would take the place of files that are no samples of ours."""
    return Outputs.at(folder, INDEX, _listed).check(_NAMES)


def write_samples(
    judge: Judge, made: Samples, outputs: Outputs, more: Mapping[str, Any] | None = None
) -> Path:
    """The files of samples that a judge has drawn; what people open. ``more``: JSON files with
    them."""
    entries: list[dict[str, Any]] = [
        {"index": place, "label": int(label), "seed": seed, "draw": dict(made.drawn)}
        for place, label, seed in zip(
            made.places or range(len(made.seeds)), made.labels, made.seeds
        )
    ]
    for entry, count in zip(entries, made.threads):
        entry["draw"]["threads"] = count
    files: dict[str, Any] = dict(more or {})
    if made.particles:
        files[PARTICLES] = [record.as_json() for record in made.particles]
    with outputs.writing() as work:
        shown = judge.write(made, entries, work)
        for name, data in files.items():
            (work / name).write_text(json.dumps(data, indent=2), encoding="utf-8")
        single = {entry.get("file") for entry in entries}
        sheets = sorted(path.name for path in work.iterdir() if path.name not in single)
        for entry in entries:
            entry["sheets"] = sheets
        (work / INDEX).write_text(json.dumps(entries, indent=2), encoding="utf-8")
    return outputs.folder / shown.name


def _listed(data: Any) -> set[str] | None:
    """The files that came with a ``samples.json``, of single samples and of the whole draw."""
    if not isinstance(data, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sheets"), list) for entry in data
    ):
        return None
    single = {str(entry["file"]) for entry in data if "file" in entry}
    return single | {str(name) for entry in data for name in entry["sheets"]}
