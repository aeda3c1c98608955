"""From C to a loaded library: compiled once per machine, kept in the user's cache.

The file's name holds a hash of the sources, the compiler, its flags and the processor's
instructions, so a cache shared by machines, or an update of any of them, never meets a library made
for another. ``COTERIE_NATIVE=0`` switches the operator off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from coterie.core.errors import CheckpointError, DataError
from coterie.core.folder import canonical, file_digest, sync
from coterie.core.json_reader import read_object
from coterie.core.user_cache import cache_root
from coterie.data.download.cache import locked

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-w")
_SECONDS = 120  # a compiler that takes longer hangs


@dataclass(frozen=True)
class Library:
    """The operator, or why there is none."""

    handle: ctypes.CDLL | None
    reason: str
    openmp: int | None = None
    """Address of ``GOMP_parallel`` in the OpenMP library that torch has loaded: one pool of
    threads for both."""

    @property
    def ready(self) -> bool:
        return self.handle is not None

    @property
    def parallel(self) -> bool:
        return self.openmp is not None

    def line(self) -> str:
        """What ``coterie env`` says."""
        if not self.ready:
            return self.reason
        threads = "threads of torch" if self.parallel else "one thread"
        return f"{self.reason}, {self.vector} numbers per register, {threads}"

    @property
    def vector(self) -> int:
        """float32 values in one register of the processor it was compiled for."""
        assert self.handle is not None
        return int(self.handle.coterie_experts_vector())


@cache
def library() -> Library:
    """Compile if needed (some seconds, once) and load."""
    if os.environ.get("COTERIE_NATIVE") == "0":
        return Library(None, "off: COTERIE_NATIVE=0")
    compiler = find_compiler()
    if compiler is None:
        return Library(None, "off: no C compiler found (cc, gcc or clang; CC names another)")
    try:
        handle = _load(compiler)
    except (OSError, DataError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return Library(None, f"off: {compiler} failed ({lines[0] if lines else 'no message'})")
    handle.coterie_experts_forward.argtypes = [ctypes.c_void_p]
    handle.coterie_experts_backward.argtypes = [ctypes.c_void_p]
    return Library(handle, f"compiled by {compiler}", _openmp())


def in_use() -> str:
    """What feed-forward experts compute with in this process: the line of ``coterie env`` if the
    operator was ever asked for, else "" (on a GPU, or without experts)."""
    return library().line() if library.cache_info().currsize else ""


def find_compiler() -> str | None:
    """``$CC``, else the first of cc, gcc, clang."""
    chosen = os.environ.get("CC")
    names = (chosen,) if chosen else ("cc", "gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)


def sources() -> list[Path]:
    return sorted(path for path in HERE.iterdir() if path.suffix in (".c", ".h"))


def key(compiler: str) -> str:
    """What a compiled file depends on, as a hash."""
    found = hashlib.sha256()
    for path in sources():
        found.update(path.read_bytes())
    stat = Path(compiler).resolve().stat()
    told = (compiler, stat.st_size, stat.st_mtime_ns, FLAGS, platform.machine(), instructions())
    found.update(repr(told).encode())
    return found.hexdigest()[:24]


def instructions() -> str:
    """What the processor can do, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line.split(":", 1)[1]
    except OSError:
        pass
    return platform.processor()


def _load(compiler: str) -> ctypes.CDLL:
    target = cache_root() / "native" / f"experts-{key(compiler)}.so"
    if not is_whole(target):
        with locked(record_of(target)):
            if not is_whole(target):  # another process may have made it meanwhile
                compile_to(target, compiler)
    return ctypes.CDLL(str(target))


def is_whole(target: Path) -> bool:
    """Whether a compiled file is as it was written. Loading another would end the process: the
    system maps it, and what is not there is a bus error when it is called."""
    try:
        told = read_object(record_of(target))
        return not target.is_symlink() and told == _record(target)
    except (OSError, CheckpointError):
        return False


def record_of(target: Path) -> Path:
    """The file beside a compiled one that is locked while that is made, and says what it is."""
    return target.with_suffix(".lock")


def _record(target: Path) -> dict[str, Any]:
    return {"bytes": target.stat().st_size, "sha256": file_digest(target)}


def compile_to(target: Path, compiler: str, flags: tuple[str, ...] = FLAGS) -> None:
    """Appears whole or not at all, and on the disk before it is said to be there."""
    files = [str(path) for path in sources() if path.suffix == ".c"]
    handle, work = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *flags, *files, "-o", work]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        sync(Path(work))
        os.replace(work, target)
        record_of(target).write_text(canonical(_record(target)))  # in place: others wait for it
        sync(record_of(target))
        sync(target.parent)
    finally:
        Path(work).unlink(missing_ok=True)


def _openmp() -> int | None:
    import torch

    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
