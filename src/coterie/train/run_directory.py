"""A run directory: one configuration, one log, checkpoints; one trainer at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from coterie.core.config import Config, ConfigT
from coterie.core.errors import ConfigError, TrainingError, describe
from coterie.core.files import require_utf8
from coterie.core.folder import clean, digest, open_own, refuse_link, write_text
from coterie.core.json_reader import parse_json, read_object
from coterie.core.outputs import refuse_foreign
from coterie.core.paths import beside
from coterie.train import checkpoint
from coterie.train.checkpoint import FOLDER
from coterie.train.config import TrainConfig

FREE = tuple(f"train.{name}" for name in TrainConfig.free)
"""Paths of a run's configuration that may change when it is resumed."""


OWN = ("config.json", "metrics.jsonl", "lock", FOLDER, "model")
"""What a trainer writes in a run directory."""
BROUGHT = ("shard",)
"""What is put there before a run begins: an island's own samples."""
_FILES = re.compile(r"config\.json|metrics\.jsonl|model")


class RunDir:
    """``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``samples/``, ``report/``, ``lock``.

    Nothing is created before something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / FOLDER
        self.samples = self.path / "samples"
        self.report = self.path / "report"
        self._locked = False

    def read_config(self, cls: type[ConfigT]) -> ConfigT:
        """The run's configuration, validated; ConfigError if there is none or it is damaged."""
        if not self.config_path.is_file():
            hint = "start a run there first"
            raise ConfigError(describe("run", str(self.path), "a run directory", hint))
        return cls.load(self.config_path)

    def stored_config(self) -> dict[str, Any] | None:
        """The JSON of ``config.json`` as it stands, None for a new run."""
        if not self.config_path.is_file():
            return None
        return read_object(self.config_path, error=ConfigError)

    def write_config(self, config: Mapping[str, Any], free: tuple[str, ...] = FREE) -> str:
        """Write the configuration, or check that it equals the existing one.

        ``free`` paths may differ. Returns the hash of the configuration without them, which
        checkpoints carry. ConfigError lists the paths that differ.
        """
        existing = self.stored_config()
        if existing is None:
            self.check_free()
            self.write_json("config.json", config)
            existing = dict(config)
        changes = differences(fixed(existing, free), fixed(config, free))
        if changes:
            raise ConfigError(
                f"{self.path} holds a run with another configuration: {'; '.join(changes[:8])}; "
                "use another run directory"
            )
        return config_hash(existing, free)

    def check_free(self) -> None:
        """ConfigError if the folder is no run directory and holds other files."""
        if not self.config_path.is_file():
            refuse_foreign(self.path, "a run", (*OWN, *BROUGHT))

    def stored_form(self, config: Config) -> dict[str, Any]:
        """A configuration as JSON, with paths relative to this folder."""
        with beside(self.path):
            return config.model_dump(mode="json")

    def write_json(self, name: str, data: Any) -> Path:
        """Write a small JSON file into the directory, atomically."""
        self._create()
        path = self.path / name
        with _disk(path):
            write_text(path, json.dumps(data, indent=2, sort_keys=True) + "\n")
        return path

    @contextmanager
    def opened(self, config: Config) -> Iterator[RunDir]:
        """Lock the directory and write (or check) its configuration."""
        with self.lock():
            self.write_config(self.stored_form(config))
            yield self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory against a second trainer; TrainingError names the holder.

        The system releases the lock when the process ends, however it ends. The same object may
        lock again inside (the trainer does).
        """
        import fcntl

        if self._locked:
            yield
            return
        self._create()
        for name in OWN:
            refuse_link(self.path / name, TrainingError)
        with _disk(self.path / "lock"):
            handle = open_own(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        with os.fdopen(handle, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise TrainingError(
                    f"{self.path}: already being trained by process {holder}; "
                    "wait for it, stop it, or use another run directory"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            clean(self.path, _FILES)
            clean(self.checkpoints, checkpoint.NAME)
            self._locked = True
            try:
                yield
            finally:
                self._locked = False
                file.truncate(0)

    def is_held(self) -> bool:
        """Whether a trainer holds the lock."""
        import fcntl

        path = self.path / "lock"
        if not path.is_file():
            return False
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _create(self) -> None:
        require_utf8(self.path.absolute(), "run", ConfigError)
        with _disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)


class MetricsLog:
    """JSON lines, one per step; truncated to the step from which training resumes."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        with _disk(path):
            self._cut(last_step)
            handle = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            self._file: TextIO = os.fdopen(handle, "a", encoding="utf-8")

    def write(self, record: Mapping[str, Any], *, flush: bool) -> None:
        with _disk(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            if flush:
                self._file.flush()

    def sync(self) -> None:
        with _disk(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with _disk(self.path):
            self._file.close()

    def _cut(self, last_step: int) -> None:
        """Drop later records and lines a crash tore apart."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        after = {"step": last_step + 1}
        kept = [line for line in lines if (_record(line) or after)["step"] <= last_step]
        if len(kept) < len(lines):
            write_text(self.path, "".join(f"{line}\n" for line in kept))


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path}: could not be written ({error.strerror or error}); "
            "checkpoints saved so far are intact"
        ) from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All complete records of a ``metrics.jsonl``; [] if there is none."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    found = [_record(line) for line in lines]
    return [record for record in found if record is not None]


def config_hash(config: Mapping[str, Any], free: tuple[str, ...] = FREE) -> str:
    """Short hash of a configuration without its free paths."""
    return digest(fixed(config, free))[:16]


def stored_hash(run_dir: str | Path) -> str | None:
    """Hash of the configuration in a run directory; None if there is none."""
    stored = RunDir(run_dir).stored_config()
    return None if stored is None else config_hash(stored)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``path: old -> new`` for every leaf in which two JSON trees differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in sorted({*old, *new}):
            here = f"{path}.{key}" if path else str(key)
            out += differences(old.get(key, "absent"), new.get(key, "absent"), here)
        return out
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def fixed(config: Mapping[str, Any], free: tuple[str, ...] = FREE) -> dict[str, Any]:
    """A configuration as JSON, without its free paths."""
    # Through JSON, so that tuples and lists compare equal.
    data = json.loads(json.dumps(config, sort_keys=True))
    for path in free:
        *parents, last = path.split(".")
        here = data
        for part in parents:
            here = here.get(part) if isinstance(here, dict) else None
        if isinstance(here, dict):
            here.pop(last, None)
    return data


def _record(line: str) -> dict[str, Any] | None:
    """The record of a line, None where a crash tore it apart."""
    try:
        record = parse_json(line, "metrics")
    except ConfigError:
        return None
    whole = isinstance(record, dict) and type(record.get("step")) is int
    return record if whole else None
