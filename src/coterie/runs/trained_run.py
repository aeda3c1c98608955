"""Loading a trained run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.core.batch import Source
from coterie.runs.build import based_model, build_source, check_fits
from coterie.runs.config import RunConfig
from coterie.train.resume import say_changed_data
from coterie.train.run_directory import RunDir
from coterie.train.state import load_weights


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to sample: ``model`` is in eval mode with the averaged weights."""

    path: Path
    config: RunConfig
    model: Any
    source: Source
    step: int

    @property
    def is_text(self) -> bool:
        """Whether the samples are token ids."""
        return bool(self.config.model.kind == "token_denoiser")


def load_run(path: str | Path, which: str = "ema") -> LoadedRun:
    """The run at ``path`` with its newest valid weights; ``which``: "ema", "ema-<decay>" or
    "model"."""
    run_dir = RunDir(path)
    config = run_dir.read_config(RunConfig)
    check_fits(config, training=False)
    model = based_model(config)
    found = load_weights(run_dir.path, model, which) if config.train.steps else None
    source = build_source(config)
    if found is not None:
        say_changed_data(run_dir.path, found.scalars, source)
    return LoadedRun(run_dir.path, config, model.eval(), source, found.step if found else 0)
