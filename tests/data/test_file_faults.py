"""Every file that is read, damaged in every way: read as it was, refused in one line, or valid.

Never another exception, never a wait without end; a format that carries hashes is never read as
something else.
"""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from file_damage import DAMAGES, OF_PLACE, Damage, pipe
from file_kinds import KINDS, content
from hypothesis import strategies as st

from fuzz_budget import Outcomes

LIMIT = 20.0  # seconds for one file
STUCK = 3.0  # seconds for a pipe, which is opened from the other side a little later
MEMORY = 6 * 2**30  # bytes that one read may add
TOTAL = Outcomes("files")
BY_KIND: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def record() -> Iterator[None]:
    yield
    TOTAL.write(kinds=BY_KIND)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@contextmanager
def limited_memory() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def released(path: Path) -> Iterator[None]:
    """Whoever waits at a pipe is let go after a while, even inside a library's own code."""
    script = f'sleep {STUCK + 0.5}; while [ -p "$1" ]; do : > "$1"; done'
    helper = subprocess.Popen(["sh", "-c", script, "sh", str(path)])
    try:
        yield
    finally:
        helper.kill()
        helper.wait()


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_read(name: str, place: Path) -> None:
    kind, whole, here = KINDS[name], place / f"{name}-whole", place / name / "here"
    whole.mkdir()
    kind.write(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    expected = content(kind.read(whole))
    assert content(kind.read(whole)) == expected and files
    counts = Outcomes(name)

    deeds = [deed for deed in DAMAGES if not (kind.packaged and deed in OF_PLACE)]

    def read() -> Any:
        with limited_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind.read(here)

    def is_right(answer: Any) -> bool:
        return not kind.hashed or content(answer) == expected

    def test(choice: int, deed: Damage, drawn: int) -> None:
        # Hypothesis draws small numbers again and again; every example is to be another.
        seed = random.Random(f"{drawn} {counts.tried}").randrange(2**32)
        shutil.rmtree(here.parent, ignore_errors=True)
        shutil.copytree(whole, here)
        path = here / files[choice % len(files)]
        deed(path, random.Random(seed))
        case = f"{name}: {files[choice % len(files)]} {deed.__name__} {seed}"
        if deed is not pipe:
            counts.attempt(case, read, is_right, LIMIT)
            return
        with released(path):
            counts.attempt(case, read, is_right, STUCK)

    inputs = st.integers(0, 1000), st.sampled_from(deeds), st.integers(0, 2**32)
    counts.repeat(test, *inputs, examples=kind.examples, share=1 / len(KINDS))
    BY_KIND[name] = TOTAL.absorb(counts)
    counts.assert_none_wrong()
