"""The compiled operator in the user's cache: damaged, it is made again and never loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.experts.dispatch.native import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    target = tmp_path_factory.mktemp("cache") / "experts-key.so"
    compiler = build.find_compiler()
    assert compiler is not None
    build.compile_to(target, compiler, ("-O0", *build.FLAGS[1:]))
    return target, target.read_bytes(), build.record_of(target).read_bytes()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "longer": lambda data: data + b"x",
}


@needs_compiler
@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_G7_a_damaged_library_is_made_again_and_not_loaded(
    made: tuple[Path, bytes, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[bytes], bytes],
) -> None:
    _, whole, record = made
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    compiler = build.find_compiler()
    assert compiler is not None
    target = tmp_path / "native" / f"experts-{build.key(compiler)}.so"
    target.parent.mkdir()
    target.write_bytes(harm(whole))
    build.record_of(target).write_bytes(record)
    again: list[Path] = []

    def compiled(path: Path, _: str) -> None:
        again.append(path)
        path.write_bytes(whole)
        build.record_of(path).write_bytes(record)

    def loaded(path: str) -> object:
        assert Path(path).read_bytes() == whole, "a damaged library is mapped"
        return object()

    monkeypatch.setattr(build, "compile_to", compiled)
    monkeypatch.setattr(ctypes, "CDLL", loaded)
    build._load(compiler)
    assert again == [target]
    build._load(compiler)
    assert again == [target], "a whole one is made again"


@needs_compiler
@pytest.mark.parametrize("record", [b"", b"{", b"{}", b"[]", b"\xff"])
def test_G7_a_library_whose_record_is_damaged_is_made_again(
    made: tuple[Path, bytes, bytes], record: bytes
) -> None:
    target, _, good = made
    assert build.is_whole(target)
    build.record_of(target).write_bytes(record)
    assert not build.is_whole(target)
    build.record_of(target).write_bytes(good)
