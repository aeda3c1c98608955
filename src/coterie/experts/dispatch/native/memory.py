"""Large pieces of memory, kept mapped from one step to the next.

An allocator maps every large tensor by itself and unmaps it when it dies (glibc from 32 MB on), so
gradients of expert stacks, made anew in each step, cost a fault of every page: up to a fifth of a
step. Here a piece comes back when the storage over it is dead, whoever held it last, and waits for
the next tensor of its size: gradients while a forward pass runs, what that leaves while an
optimiser does. The system may take the pages of a waiting piece when it runs short, and all pieces
together are never more than twice what was in use at once.

``COTERIE_KEEP_MEMORY=0`` switches this off.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 32 * 2**20  # bytes from which glibc keeps nothing
_SPARE = 8  # a piece serves what is smaller by at most one part in this many
_IDLE = 1000  # requests that a waiting piece sees before it goes


class KeptMemory:
    """``empty(shape)`` as ``torch.empty`` in float32 on a CPU, not resizable where it is large."""

    def __init__(self, on: bool = True) -> None:
        self.on = on and hasattr(mmap, "MAP_ANONYMOUS")
        self.lent = self.most = 0  # bytes in use, and the most that ever were
        self._requests = 0
        self._waiting: dict[mmap.mmap, int] = {}  # since which request, oldest first
        self._returned: deque[mmap.mmap] = deque()
        self._renew_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)

    @property
    def waiting(self) -> int:
        """Bytes that nobody uses."""
        with self._lock:
            self._collect()
            return sum(map(len, self._waiting))

    def empty(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        if 4 * count < LARGE or not self.on:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        piece = self._take(4 * count)
        view = memoryview(piece)  # held by the storage, so it dies with that, in any thread
        weakref.finalize(view, self._give_back, piece).atexit = False
        return torch.frombuffer(view, dtype=torch.float32, count=count).resize_(shape)

    def release(self) -> int:
        """Give everything that nobody uses back to the system; bytes."""
        with self._lock:
            self._collect()
            size = sum(map(len, self._waiting))
            self._waiting.clear()
        return size

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()  # another thread may have held it when this process forked

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            self._collect()
            self._requests += 1
            fits = [p for p in self._waiting if size <= len(p) <= size + size // _SPARE]
            piece = min(reversed(fits), key=len, default=None)  # the last to come back, if equal
            if piece is not None:
                del self._waiting[piece]
            self._trim(size)
            if piece is None:
                piece = _mapped(size)
            self.lent += len(piece)
            self.most = max(self.most, self.lent)
            return piece

    def _give_back(self, piece: mmap.mmap) -> None:
        """Called wherever a storage dies, also in the midst of ``_take``: nothing is locked."""
        if hasattr(mmap, "MADV_FREE"):
            piece.madvise(mmap.MADV_FREE)
        self._returned.append(piece)

    def _collect(self) -> None:
        while self._returned:
            piece = self._returned.popleft()
            self.lent -= len(piece)
            self._waiting[piece] = self._requests

    def _trim(self, more: int) -> None:
        held = self.lent + more + sum(map(len, self._waiting))
        bound = 2 * max(self.most, self.lent + more)
        for piece, since in list(self._waiting.items()):
            if held <= bound and self._requests - since <= _IDLE:
                break
            held -= len(piece)
            del self._waiting[piece]


def _mapped(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"experts: no memory for {size} bytes") from error


kept = KeptMemory(os.environ.get("COTERIE_KEEP_MEMORY") != "0")
