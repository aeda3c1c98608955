"""Files of a verb in a folder of others: nothing of theirs is touched, nothing is begun in vain."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coterie.core import outputs
from coterie.core.errors import CheckpointError, ConfigError
from coterie.core.folder import FolderWarning, atomic_folder, clean, seal, verify_folder, write_text
from coterie.core.outputs import Outputs, writable

NAMES = re.compile(r"\d+\.png|index\.json")


def listed(data: Any) -> list[str] | None:
    files = data.get("files") if isinstance(data, dict) else None
    return files if isinstance(files, list) else None


def at(folder: Path) -> Outputs:
    return Outputs.at(folder, "index.json", listed).check(NAMES)


def write(folder: Path, count: int) -> None:
    with at(folder).writing() as work:
        for number in range(count):
            (work / f"{number}.png").write_text(f"made {number}")
        files = [f"{number}.png" for number in range(count)]
        (work / "index.json").write_text(json.dumps({"files": files}))


def test_F1_only_what_was_written_here_is_replaced_or_removed(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_text("theirs")
    (tmp_path / "77.jpg").write_text("theirs")
    write(tmp_path, 3)
    (tmp_path / "7.png").write_text("theirs, later")
    with pytest.raises(ConfigError, match=r"out: .*without 7\.png"):
        write(tmp_path, 2)
    (tmp_path / "7.png").rename(tmp_path / "seven.png")
    write(tmp_path, 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"holiday.png", "77.jpg", "seven.png", "0.png", "1.png", "index.json"}


def test_F1_an_index_of_others_lists_nothing_of_ours(tmp_path: Path) -> None:
    outside = tmp_path / "keep.png"
    outside.write_text("theirs")
    folder = tmp_path / "out"
    folder.mkdir()
    for text in ("{", "[]", '{"files": 3}'):
        (folder / "index.json").write_text(text)
        with pytest.raises(ConfigError, match=r"index\.json"):
            at(folder)
    (folder / "index.json").write_text(json.dumps({"files": ["../keep.png", "..", "", "0.png"]}))
    write(folder, 1)
    assert outside.read_text() == "theirs"


def test_F1_stopped_between_any_two_files_it_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    replace, left = Path.replace, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    for count in range(5):
        left = count
        monkeypatch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 5)
        monkeypatch.undo()
        at(tmp_path)
    write(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "index.json"}


def test_F1_leftovers_are_those_of_our_own_names(tmp_path: Path) -> None:
    kept = (".tmp-notes", ".tmp-model", ".tmp-thesis-12", ".tmp-model-x", ".tmp-model-12x")
    for name in (*kept, ".tmp-model-12", ".tmp-old-model-12"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-model-13").symlink_to(tmp_path / ".tmp-notes")
    clean(tmp_path, re.compile("model"))
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".tmp-model-13"}


def test_G1_links_are_refused_or_replaced_never_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("theirs")
    folder = tmp_path / "out"
    write(folder, 1)
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to(precious)
    with pytest.raises(ConfigError, match=r"0\.png: a link to .*precious"):
        at(folder)
    (folder / "note.json").symlink_to(precious)
    write_text(folder / "note.json", "{}")
    assert not (folder / "note.json").is_symlink()
    (folder / f".tmp-note.json-{os.getpid()}").symlink_to(precious)
    write_text(folder / "note.json", "[]")
    with pytest.raises(CheckpointError, match="a link to"):
        (tmp_path / "model").symlink_to(folder)
        with atomic_folder(tmp_path / "model", overwrite=True):
            pass
    assert precious.read_text() == "theirs" and (folder / "note.json").read_text() == "[]"


def test_G1_a_folder_inside_a_run_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "samples").symlink_to(tmp_path / "elsewhere")
    at(tmp_path / "samples")  # one's own, given by name
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="samples: a link to"):
        at(tmp_path / "samples")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "Not a directory"),
        ("file/deep/er", "Not a directory"),
        ("dangling/x", "a link that leads nowhere"),
        ("new/" + "n" * 256, "a name of more than 255 bytes"),
        ("new/" + "é" * 128, "a name of more than 255 bytes"),
    ],
)
def test_G5_where_nothing_can_be_written_is_said_at_once(
    tmp_path: Path, place: str, said: str
) -> None:
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=said):
        writable(tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB: a real one where that is allowed, else writes that fail."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(size, capture_output=True).returncode == 0
    if mounted:
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    written, real = 0, os.fsync

    def full(handle: int) -> None:
        nonlocal written
        written += os.fstat(handle).st_size
        if written > 2**16:
            raise OSError(28, "No space left on device")
        real(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield folder


def test_G5_a_full_disk_is_one_line_and_leaves_what_was_there(small_disk: Path) -> None:
    write(small_disk, 2)
    with pytest.raises(ConfigError, match="No space left"), at(small_disk).writing() as work:
        for number in range(40):
            (work / f"{number}.png").write_bytes(b"x" * 4096)
        (work / "index.json").write_text("{}")
    assert {path.name for path in small_disk.iterdir()} == {"0.png", "1.png", "index.json"}
    assert (small_disk / "0.png").read_text() == "made 0"


def test_G5_a_disk_that_is_full_already_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", failing)
    with pytest.raises(ConfigError, match=r"written to \(No space left on device\); choose"):
        writable(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_H_what_the_system_puts_into_folders_damages_none(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "sealed") as folder:
        (folder / "a.bin").write_bytes(b"a")
        manifest = seal(folder, {})
    for name in (".DS_Store", ".nfs000000000a1b2c3d00000001", "._a.bin"):
        (tmp_path / "sealed" / name).write_bytes(b"x")
        with pytest.warns(FolderWarning, match=re.escape(name)):
            verify_folder(tmp_path / "sealed", manifest)
        (tmp_path / "sealed" / name).unlink()
    (tmp_path / "sealed" / "b.bin").write_bytes(b"b")
    with pytest.raises(CheckpointError, match=r"b\.bin: not listed"):
        verify_folder(tmp_path / "sealed", manifest)
