"""Saving and resuming a trainer in its run directory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.core.batch import Source
from coterie.core.errors import DataError
from coterie.data.sample_files import DataWarning
from coterie.data.source import changed, identity
from coterie.experts.dispatch.native import build
from coterie.train import checkpoint
from coterie.train.config import TrainConfig
from coterie.train.restart import is_bad, take_advice
from coterie.train.run_directory import RunDir
from coterie.train.state import Parts, capture, restore
from coterie.train.world import ALONE, World

OPERATOR = "experts_operator"
"""Name of what a checkpoint says of the machine's code for experts."""


class RunStore:
    """Saves and restores ``parts`` in ``run_dir``; None: nothing is saved.

    ``run_config`` is the whole run's configuration. None: the training configuration and the seed,
    compared with ``config.json`` if the caller has written one. ``source``: the data; the number,
    classes and digest of its samples are saved, and compared on resuming.
    """

    def __init__(
        self,
        run_dir: RunDir | None,
        parts: Parts,
        config: TrainConfig,
        seed: int,
        run_config: Mapping[str, Any] | None,
        world: World = ALONE,
        source: Any = None,
    ) -> None:
        self.run_dir = run_dir
        self.parts = parts
        self.keep = config.keep
        self.world = world
        self._given = run_config
        self._own = {"seed": seed, "train": config.model_dump(mode="json")}
        self._hash = ""
        self._data = {} if source is None else identity(source)
        self._last: tuple[int, Path] | None = None

    def resume(self) -> dict[str, Any] | None:
        """Check or write the configuration and restore the newest checkpoint; returns its scalars,
        or None."""
        if self.run_dir is None:
            return None
        run_dir = self.run_dir
        config = self._run_config(run_dir)
        self.world.on_first(lambda: take_advice(run_dir, config))
        self._hash = self.world.on_first(lambda: run_dir.write_config(config))
        found = self.world.newest(run_dir.path, self._hash)
        if found is None:
            return None
        why = _changed(found.scalars, self._data)
        if why:
            raise DataError(
                f"{run_dir.path}: the data are not those that training began with: {why}; put them "
                "back, or start another run"
            )
        state = self.world.part(found.state)
        restore(self.parts, state, found.scalars["ema_updates"], str(found.path))
        self._last = (found.step, found.path)
        _say_other_operator(found.path, str(found.scalars.get(OPERATOR, "")))
        return found.scalars

    def save(self, step: int, scalars: Mapping[str, Any]) -> Path | None:
        """The checkpoint of ``step``, written unless it exists; None without a run directory."""
        if self.run_dir is None:
            return None
        if self._last is None or self._last[0] != step:
            run, state = self.run_dir.path, self.world.whole(capture(self.parts))

            def write() -> str:
                updates = self.parts.ema.num_updates
                known = {**scalars, "ema_updates": updates, "data": self._data}
                known[OPERATOR] = build.in_use()
                made = checkpoint.save(
                    run,
                    state,
                    known,
                    step=step,
                    config_hash=self._hash,
                    keep=self.keep,
                    is_bad=is_bad(known),
                )
                return str(made)

            self._last = (step, Path(self.world.on_first(write)))
        return self._last[1]

    def _run_config(self, run_dir: RunDir) -> Mapping[str, Any]:
        if self._given is not None:
            return self._given
        existing = run_dir.stored_config()
        if existing is None:
            return self._own
        return {**existing, **{key: self._own[key] for key in self._own if key in existing}}


def _changed(scalars: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before = scalars.get("data")  # none in checkpoints of earlier versions
    return changed(before, now) if before and now else ""


def say_changed_data(run: Path, scalars: Mapping[str, Any], source: Source) -> None:
    """Warn if ``source`` is not the data that the run was trained on; losses are then not
    comparable."""
    why = _changed(scalars, identity(source))
    if why:
        text = f"{run}: the data are not those that it was trained on: {why}"
        warnings.warn(text, DataWarning, stacklevel=3)


def _say_other_operator(path: Path, before: str) -> None:
    """The same weights go on, but not to the same bits."""
    here = build.library().line() if before else ""
    if here != before:
        warnings.warn(
            f"{path}: experts were computed by an operator that was {before}; here it is {here}; "
            "training goes on, with other bits",
            checkpoint.CheckpointWarning,
            stacklevel=3,
        )
