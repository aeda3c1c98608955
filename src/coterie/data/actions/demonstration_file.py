"""Your own demonstrations for a policy: an .npz file of episodes.

It holds ``observations`` float [S, C] or [S, M, C] (M tokens, such as cameras), ``actions`` float
[S, A] in about [-1, 1], ``lengths`` int [E] of consecutive episodes, and optionally ``goals`` int
[E].
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from coterie.core.errors import DataError, describe
from coterie.core.paths import Place, expanded
from coterie.data.actions.chunks import ActionSource, Array, Demonstrations
from coterie.data.arrays import check_numbers, read_npz, rows_digest
from coterie.data.source import SOURCES, SourceConfig, SourceInfo, Split, split_rows

NEEDED = ("observations", "actions", "lengths")
MAX_GOALS = 1_000_000


@SOURCES.register
class DemonstrationsConfig(SourceConfig):
    """Chunks of actions from an .npz file of episodes."""

    kind: Literal["demonstrations"] = "demonstrations"
    path: Place  # the .npz file
    horizon: int = Field(default=8, ge=1, le=1024)  # actions per chunk
    num_goals: int | None = Field(default=None, ge=0)
    """null: one more than the largest goal in the file"""
    rest: tuple[float, ...] | None = None  # action after the end of an episode; null: zeros
    info: ClassVar[SourceInfo] = SourceInfo(
        summary="Episodes of one's own: observations, actions and goals in an .npz file",
        modality="action",
        shape="horizon x action",
        count="as in the file",
        licence="that of the file",
    )

    def build(self, split: Split = "train") -> ActionSource:
        """DataError for a file that is missing or damaged, or holds what does not fit together."""
        found = read_episodes(expanded(self.path, "data.path"))
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
            fingerprint=rows_digest(found.actions, found.lengths),
        )


def read_episodes(path: Path) -> Demonstrations:
    """The arrays of a file, in the form of ours; they are checked by who uses them."""
    if not path.exists():
        raise DataError(describe("path", str(path), "an .npz file of episodes"))
    arrays = read_npz(path)
    for name in NEEDED:
        if name not in arrays:
            raise DataError(describe(f"{path}: arrays", sorted(arrays), ", ".join(NEEDED)))
    seen, actions = arrays["observations"], arrays["actions"]
    actions = check_numbers(actions, f"{path}: actions", "fiu", (2,))
    seen = check_numbers(seen, f"{path}: observations", "fiu", (2, 3))
    lengths = _whole(arrays["lengths"], f"{path}: lengths", len(actions))
    goals = np.full(len(lengths), -1)
    if "goals" in arrays:
        goals = _whole(arrays["goals"], f"{path}: goals", MAX_GOALS - 1)
    seen = seen[:, None] if seen.ndim == 2 else seen
    return Demonstrations(seen.astype(np.float32), actions.astype(np.float32), lengths, goals)


def _whole(values: Array, name: str, largest: int) -> Array:
    """i64 [E]; DataError for a number above ``largest``, before anything is made of its size."""
    values = check_numbers(values, name, "iu", (1,))
    if values.max() > largest:
        raise DataError(describe(name, int(values.max()), f"{largest} or less"))
    return values.astype(np.int64)
