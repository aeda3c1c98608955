"""Demonstrations of one's own: an .npz file of episodes, for a policy without a simulator.

It holds ``observations`` float [S, C] or [S, M, C] (M tokens, say cameras), ``actions`` float
[S, A] in about [-1, 1], ``lengths`` int [E] of the episodes that follow each other, and
``goals`` int [E]; without ``goals`` there are none.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.data.actions import ActionSource, Array, Demonstrations
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, split_rows

NEEDED = ("observations", "actions", "lengths")


@SOURCES.register
class DemonstrationsConfig(SourceConfig):
    """``num_goals`` None: one more than the largest goal in the file. ``rest``: the action past an
    episode's end, zeros by default."""

    kind: Literal["demonstrations"] = "demonstrations"
    path: str
    horizon: int = Field(default=8, ge=1, le=1024)
    num_goals: int | None = Field(default=None, ge=0)
    rest: tuple[float, ...] | None = None
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Episodes of one's own: observations, actions and goals in an .npz file",
        modality="action",
        shape="horizon x action",
        count="as in the file",
        licence="that of the file",
    )

    def build(self, split: Split = "train") -> ActionSource:
        """DataError for a file that is missing or damaged, or holds what does not fit together."""
        found = read_episodes(Path(self.path))
        goals = self.num_goals
        if goals is None:
            goals = max(0, int(found.goals.max()) + 1)
        name = f"{self.kind} {Path(self.path).name}"
        found.check(name, goals)
        size = found.actions.shape[1]
        if self.rest is not None and len(self.rest) != size:
            raise DataError(describe("rest", self.rest, f"{size} numbers, one per action value"))
        return ActionSource(
            self.kind,
            found.take(split_rows(self.kind, len(found.lengths), split)),
            self.horizon,
            goal_names=[f"goal {index}" for index in range(goals)],
            rest=np.asarray(self.rest or np.zeros(size), np.float32),
            licence=self.info.licence,
        )


def read_episodes(path: Path) -> Demonstrations:
    """The arrays of a file, in the form of ours; they are checked by who uses them."""
    if not path.is_file():
        raise DataError(describe("path", str(path), "an .npz file of episodes"))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: not a readable .npz file ({error})") from None
    for name in NEEDED:
        if name not in arrays:
            raise DataError(describe(f"{path}: arrays", sorted(arrays), ", ".join(NEEDED)))
    seen, actions = arrays["observations"], arrays["actions"]
    _shaped(path, "actions", actions, (2,), "fiu")
    _shaped(path, "observations", seen, (2, 3), "fiu")
    lengths = _shaped(path, "lengths", arrays["lengths"], (1,), "iu").astype(np.int64)
    goals = arrays.get("goals", np.full(len(lengths), -1))
    goals = _shaped(path, "goals", goals, (1,), "iu").astype(np.int64)
    seen = seen[:, None] if seen.ndim == 2 else seen
    return Demonstrations(seen.astype(np.float32), actions.astype(np.float32), lengths, goals)


def _shaped(path: Path, name: str, array: Array, dims: tuple[int, ...], kinds: str) -> Array:
    if array.ndim not in dims or array.dtype.kind not in kinds or not array.size:
        found = f"{array.dtype} of shape {array.shape}"
        allowed = f"numbers with {' or '.join(map(str, dims))} dimensions, at least one of them"
        raise DataError(describe(f"{path}: {name}", found, allowed))
    return array
