"""One reader of JSON: what it refuses, and that nobody goes past it."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

import coterie
from coterie.core.config import Config, override
from coterie.core.errors import CheckpointError, ConfigError, CoterieError
from coterie.core.json_reader import MAX_BYTES, literal, parse_json, read_json, read_object
from coterie.train.run_directory import RunDir, read_metrics


class Inner(Config):
    sizes: tuple[int, ...] = (1, 2)
    name: str = ""


class Outer(Config):
    inner: Inner = Inner()


BAD: dict[str, tuple[bytes, str]] = {
    "a byte that is no UTF-8": (b'{"name": "caf\xe9"}', "can't decode byte 0xe9"),
    "UTF-16": ('{"name": "x"}'.encode("utf-16"), "can't decode byte 0xff"),
    "UTF-16 without a mark": ('{"name": "x"}'.encode("utf-16-le"), "not valid JSON"),
    "5,000 digits": (b'{"name": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "nesting": (b"[" * 100_000 + b"]" * 100_000, "nested"),
    "nesting the parser takes": (b"[" * 300 + b"]" * 300, "nested deeper than 64"),
    "half a surrogate pair": (b'{"name": "\\ud800"}', "surrogates not allowed"),
    "a half in a key": (b'{"\\ud800": 1}', "surrogates not allowed"),
    "torn": (b'{"name": "x', "Unterminated string"),
    "empty": (b"", "Expecting value"),
}


@pytest.mark.parametrize(("data", "said"), BAD.values(), ids=BAD)
def test_G3_what_is_not_read_is_one_line_of_the_asked_kind(
    tmp_path: Path, data: bytes, said: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    readers: list[tuple[Any, type[CoterieError]]] = [
        (lambda: read_json(path), CheckpointError),
        (lambda: read_object(path, error=ConfigError), ConfigError),
        (lambda: Outer.load(path), ConfigError),
        (lambda: RunDir(tmp_path).stored_config(), ConfigError),
    ]
    for read, kind in readers:
        with pytest.raises(kind, match=said) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500, "the file itself is in the message"


def test_G3_files_too_large_are_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(150 * 2**20)  # takes no disk
    with pytest.raises(CheckpointError, match=f"larger than {MAX_BYTES} bytes"):
        read_object(path)


def test_G3_what_is_no_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    for name in ("pipe", "absent", ".", "x" * 300):
        with pytest.raises(CheckpointError, match=r"missing|cannot be read"):
            read_object(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("inner.name", "9" * 5000, "inner.name: '9999"),
        ("inner.name", "[" * 100_000, "nested"),
        ("inner.name", "[" * 300 + "]" * 300, "nested deeper than 64"),
        ("inner.sizes.²", "3", "inner.sizes.²: '²' is not allowed; allowed: an index 0..1"),
    ],
)
def test_G3_flags_are_read_as_files_are(path: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")) as caught:
        override(Outer(), {path: value})
    assert len(str(caught.value)) < 500


def test_G3_words_and_values_of_flags() -> None:
    values = {"3": 3, "1e3": 1000.0, "null": None, "[1, 2]": [1, 2], "word": "word", "{": "{"}
    assert {text: literal(text) for text in values} == values
    assert parse_json(b'"\xc3\xa9"') == "é" and parse_json("1" * 31) == int("1" * 31)


def test_G3_torn_and_hostile_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"step": 1, "loss": 0.5})
    bad = ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": true}', "3", '{"st']
    path.write_text("\n".join([good, *bad]))
    assert read_metrics(path) == [json.loads(good)]


def test_G3_nobody_else_parses_what_others_wrote() -> None:
    root = Path(coterie.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_json = ast.unparse(node.func) in ("json.load", "json.loads")
                # What this process, or one of its group, has just written is not others'.
                own = any(part in ast.unparse(node) for part in ("json.dumps(", "bytes(one)"))
                if of_json and not own:
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    allowed = {"core/json_reader.py", "interop/upcycled/folder.py"}
    assert {line.partition(":")[0] for line in found} - allowed == set(), found
