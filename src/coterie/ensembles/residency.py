"""Members that are read from disk when needed and released afterwards.

At most ``resident`` members are in memory (the least recently used is released first), plus the
next one while a thread reads it (``prefetch``). A released member is read from its files again.
Adapters on it are put on again; a member that was changed in another way is not released.
"""

from __future__ import annotations

import ctypes
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from coterie.adapters.attach import Taken, put_back, take_off
from coterie.adapters.layers import additions_of
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import DenoiserLike
from coterie.ensembles.changes import Marks, changed, marks
from coterie.ensembles.members import MemberFacts, Members


def give_back() -> None:
    """Return freed memory to the system, which glibc's allocator does not do by itself for other
    threads."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Loader:
    """One member on disk: ``load()`` reads it; ``num_bytes``: size of its weights."""

    facts: MemberFacts
    load: Callable[[], DenoiserLike]
    num_bytes: int


class LoadedMembers(Members):
    """Members on disk; ``get`` returns one that is valid until ``resident`` others were requested.

    ``num_bytes``: weights in memory or being read; ``peak_bytes``: the most so far; ``loads``:
    number of reads. Not thread safe.
    """

    def __init__(
        self,
        loaders: Sequence[Loader],
        resident: int = 1,
        prefetch: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if resident < 1:
            raise ConfigError(describe("resident", resident, "1 or more"))
        self.facts = tuple(loader.facts for loader in loaders)
        self.resident, self.prefetch, self.device = resident, prefetch, torch.device(device)
        self.loads = self.peak_bytes = 0
        self._loaders = tuple(loaders)
        self._held: OrderedDict[int, DenoiserLike] = OrderedDict()
        self._marks: dict[int, Marks] = {}  # of members in memory, as they were read
        self._taken: dict[int, Taken] = {}  # adapters of those that are not
        self._pending: tuple[int, Future[DenoiserLike]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")

    @property
    def modules(self) -> list[nn.Module]:
        return []

    @property
    def num_bytes(self) -> int:
        indices = [*self._held, *([self._pending[0]] if self._pending else [])]
        return sum(self._loaders[index].num_bytes for index in indices)

    @property
    def held(self) -> tuple[int, ...]:
        """Members in memory, the most recently used last."""
        return tuple(self._held)

    def get(self, index: int) -> DenoiserLike:
        """The member, read if necessary; CheckpointError if its files are damaged."""
        if index in self._held:
            self._held.move_to_end(index)
            return self._held[index]
        if len(self._held) >= self.resident:
            while len(self._held) >= self.resident:
                self._let_go(next(iter(self._held)))
            give_back()
        member = self._take(index)
        self._marks[index] = marks(member)
        if index in self._taken:
            assert isinstance(member, nn.Module)
            put_back(member, self._taken.pop(index))
        self._held[index] = member
        return member

    def _let_go(self, index: int) -> None:
        """Release one member; its adapters are kept for when it is read again. ConfigError where
        something else was done to it, which its files do not know."""
        member = self._held[index]
        what = changed(self._marks[index], member)
        if what:
            hint = f"{self.names[index]} was changed since it was read ({what}); save it first"
            allowed = f"{len(self)}, so that no member is read again"
            raise ConfigError(describe("resident", self.resident, allowed, hint))
        if isinstance(member, nn.Module) and additions_of(member):
            self._taken[index] = take_off(member)
        del self._held[index], self._marks[index]

    def expect(self, index: int) -> None:
        """Start to read ``index`` in a thread, unless it is in memory or being read."""
        if not self.prefetch or index in self._held or self.facts[index].missing:
            return
        if self._pending is None:
            self._pending = index, self._thread.submit(self._read, index)
            self._count()

    def release(self) -> None:
        """Release every member; the next call reads again."""
        if self._pending is not None:
            self._pending[1].cancel()
            self._pending = None
        for index in list(self._held):
            self._let_go(index)
        give_back()

    def _take(self, index: int) -> DenoiserLike:
        if self._pending is not None:
            pending, future = self._pending
            self._pending = None
            # Another one was expected: wait for it all the same, and let it go.
            made = future.result()
            if pending == index:
                return made
            del made, future
        self.peak_bytes = max(self.peak_bytes, self.num_bytes + self._loaders[index].num_bytes)
        return self._read(index)

    def _read(self, index: int) -> DenoiserLike:
        made = self._loaders[index].load()
        self.loads += 1
        return made.to(self.device) if isinstance(made, nn.Module) else made

    def _count(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
