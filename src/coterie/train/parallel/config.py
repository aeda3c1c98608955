"""Layout of a run over processes. It is not part of the run's configuration: a run may be resumed
with another layout."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe


class ParallelConfig(Config):
    """Numbers of processes: ``data`` copies of the model, each on ``shard`` x ``expert`` processes.

    Every process has a part of the batch.
    """

    axes: ClassVar[tuple[str, ...]] = ("data", "shard", "expert")

    data: int = Field(1, ge=1)  # copies of the model; gradients are averaged
    shard: int = Field(1, ge=1)
    """processes among which parameters, gradients and optimiser state are split (FSDP2)"""
    expert: int = Field(1, ge=1)  # processes among which experts are split; tokens are exchanged

    @property
    def processes(self) -> int:
        return self.data * self.shard * self.expert

    @classmethod
    def parse(cls, text: str) -> ParallelConfig:
        """From ``data=2,expert=4``."""
        degrees: dict[str, int] = {}
        for part in text.split(","):
            axis, _, degree = part.strip().partition("=")
            if axis not in cls.axes or axis in degrees or not degree.isdecimal() or not int(degree):
                allowed = "degrees such as data=2,shard=2,expert=2"
                raise ConfigError(describe("parallel", text, allowed, "each a whole number from 1"))
            degrees[axis] = int(degree)
        return cls(**degrees)

    def place(self, rank: int) -> dict[str, int]:
        """Where a process stands on each axis; experts are neighbours."""
        expert, rest = rank % self.expert, rank // self.expert
        return {"data": rest // self.shard, "shard": rest % self.shard, "expert": expert}

    def groups(self, *axes: str) -> list[list[int]]:
        """Processes that differ along ``axes`` alone, a list for each group."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.processes):
            place = self.place(rank)
            key = tuple(place[axis] for axis in self.axes if axis not in axes)
            found.setdefault(key, []).append(rank)
        return list(found.values())


def parts_of(count: int, parts: int) -> list[int]:
    """Sizes of consecutive parts of ``count`` things, the first ones longer by one where it does
    not divide."""
    return [count // parts + (part < count % parts) for part in range(parts)]
