"""Files of a verb in a folder that may hold others': looked for before the work, placed at its end.

One of the files, the index, tells which files were written with it. Nothing else in the folder is
ever replaced or removed; a name that is taken is refused before the work begins. Files are written
aside and renamed, so a crash leaves the old ones or the new ones, and no link is followed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.core.errors import CheckpointError, ConfigError, describe
from coterie.core.folder import (
    TEMPORARY,
    clean,
    is_litter,
    open_own,
    refuse_link,
    sync,
    temporary_of,
    write_bytes,
    write_text,
)
from coterie.core.json_reader import read_json

HINT = "choose another --out"
LONGEST = 255  # bytes of a name, in every file system in use
_PROBE = b"\0" * 4096


@dataclass(frozen=True)
class Outputs:
    """``index``: name of the file that lists the others; ``earlier``: what was written before."""

    folder: Path
    index: str
    earlier: frozenset[str] = frozenset()

    @classmethod
    def at(
        cls, folder: str | Path, index: str, listed: Callable[[Any], Collection[str] | None]
    ) -> Outputs:
        """``listed``: from what an index file holds, the files it was written with; None if it is
        not one of ours."""
        folder, names = Path(folder), None
        path = folder / index
        if path.is_file() and not path.is_symlink():
            with suppress(CheckpointError):  # somebody else's: refused where it is in the way
                names = listed(read_json(path))
        if names is None:
            return cls(folder, index)
        plain = {name for name in names if name == Path(name).name and name not in ("", "..")}
        return cls(folder, index, frozenset({*plain, index}))

    def check(self, names: re.Pattern[str]) -> Outputs:
        """Refuse, before any work, what would stop files of such ``names`` from being written:
        files of others, links, a place that cannot be written to. ConfigError names it."""
        if (self.folder.parent / "config.json").is_file():  # inside a run, which may be another's
            refuse_link(self.folder, ConfigError)
        writable(self.folder)
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if names.fullmatch(path.name):
                    self._refuse_taken(path)
        return self

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A folder to fill; its files are then placed, in place of all that were there before."""
        with self._filling(self.index):
            work = temporary_of(self.folder / self.index)
            work.mkdir()
            try:
                yield work
                self._place(work)
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def put(self, name: str, data: bytes, index: str) -> Outputs:
        """One file, for a verb that goes on where it stopped. ``index``: the text of the index that
        lists it. What had the name is gone before the index tells of the new one."""
        with self._filling(self.index, name):
            path = self.folder / name
            for one in (path, self.folder / self.index):
                self._refuse_taken(one)
            path.unlink(missing_ok=True)
            write_text(self.folder / self.index, index)
            write_bytes(path, data)
        return replace(self, earlier=self.earlier | {self.index, name})

    @contextmanager
    def _filling(self, *names: str) -> Iterator[None]:
        """The folder is there, without what interrupted writes of ``names`` left in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder, re.compile("|".join(map(re.escape, names))))
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: could not be written ({error.strerror or error}); {HINT}"
            ) from error

    def _place(self, work: Path) -> None:
        """The index first: at any moment it lists all that is there of ours."""
        made = sorted(work.iterdir(), key=lambda path: path.name != self.index)
        for path in made:
            self._refuse_taken(self.folder / path.name)
            sync(path)
        for name in self.earlier - {path.name for path in made}:
            path = self.folder / name
            if path.is_file() and not path.is_symlink():
                path.unlink()
        for path in made:
            path.replace(self.folder / path.name)
        sync(self.folder)

    def _refuse_taken(self, path: Path) -> None:
        refuse_link(path, ConfigError)
        if path.exists() and (path.name not in self.earlier or not path.is_file()):
            allowed = f"a folder without {path.name}, or with an earlier {self.index}"
            hint = f"that file was not written by this command; {HINT}"
            raise ConfigError(describe("out", str(self.folder), allowed, hint))


def refuse_foreign(folder: Path, what: str, own: Collection[str] = ()) -> None:
    """ConfigError where a folder that is no ``what`` of ours holds more than systems leave behind
    and ``own`` names, which an interrupted beginning leaves."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not (path.name in own or path.name.startswith(TEMPORARY) or is_litter(path)):
            hint = f"{path.name} was not written by this command; {HINT}"
            raise ConfigError(describe("out", str(folder), f"an empty folder, or {what}", hint))


def pair_at(folder: str | Path, name: str, field: str) -> Outputs:
    """A picture ``name.png`` and its numbers ``name.json``, an object that has ``field``."""

    def listed(data: Any) -> list[str] | None:
        return [f"{name}.png"] if isinstance(data, dict) and field in data else None

    names = re.compile(re.escape(name) + r"\.(json|png)")
    return Outputs.at(folder, f"{name}.json", listed).check(names)


def writable(folder: Path) -> Path:
    """``folder``, there or not, if files can be made in it; ConfigError says why they cannot.

    Nothing is left behind: what is not there yet is judged by the folder that it would be in.
    """
    for part in folder.absolute().parts[1:]:
        if len(os.fsencode(part)) > LONGEST:
            raise ConfigError(f"{part[:40]}...: a name of more than {LONGEST} bytes; {HINT}")
    try:
        there = folder.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            what = "Not a directory" if there.exists() else "a link that leads nowhere"
            raise ConfigError(f"{there}: {what}; {HINT}")
        probe = temporary_of(there / "probe")
        try:
            with os.fdopen(open_own(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(_PROBE)  # a full disk takes the name, and no bytes
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to ({error.strerror or error}); {HINT}"
        ) from None
    return folder
