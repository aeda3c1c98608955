"""The command itself: help, the table of verbs, exit codes."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import coterie as package
from coterie.cli import main as entry
from coterie.cli.bench import BENCHES
from coterie.cli.list import REGISTRIES
from coterie.cli.output import facts, human, table

Run = Callable[..., tuple[int, str, str]]


def test_help_lists_every_verb(coterie: Run) -> None:
    code, out, _ = coterie("--help")
    assert code == 0
    for verb in entry.VERBS:
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", entry.VERBS)
def test_every_verb_has_help_and_its_name(coterie: Run, verb: str) -> None:
    command = importlib.import_module(f"coterie.cli.{verb}").command
    assert isinstance(command, click.Command)
    assert command.name == verb
    code, out, _ = coterie(verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: coterie {verb}")


def test_every_verb_file_is_in_the_table() -> None:
    helpers = {
        "__init__",
        "__main__",
        "candidates",
        "main",
        "lazy",
        "model_folder",
        "output",
        "overrides",
        "size",
        "bench_options",
    }
    folder = Path(inspect.getfile(entry)).parent
    benches = {f"bench_{name}" for name in BENCHES}
    assert {path.stem for path in folder.glob("*.py")} - helpers == set(entry.VERBS) | benches


@pytest.mark.parametrize("name", sorted({*BENCHES} - {"goals"}))
def test_every_bench_has_help_its_name_and_a_module(coterie: Run, name: str) -> None:
    command = importlib.import_module(f"coterie.cli.bench_{name}").command
    assert command.name == name
    code, out, _ = coterie("bench", name, "--help")
    assert code == 0 and "--rounds" in out and "--out" in out
    assert hasattr(importlib.import_module(f"coterie.bench.{name}"), "run_benchmark")


def test_no_argument_shows_the_help(coterie: Run) -> None:
    _, out, err = coterie()
    assert "Commands:" in out + err


def test_the_version_is_printed(coterie: Run) -> None:
    assert package.__version__ in coterie("--version")[1]


def test_main_exits_with_the_code_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(["no-such-verb"])
    assert stop.value.code == 2
    assert "no-such-verb" in capsys.readouterr().err


def test_the_short_help_and_the_long_help_agree() -> None:
    for verb, line in entry.VERBS.items():
        assert line.endswith("."), verb
        assert len(line) <= 80, verb


def test_every_registry_of_the_library_can_be_listed() -> None:
    """A new ``X = Registry(...)`` anywhere must be named in ``coterie list``."""
    source = Path(inspect.getfile(package)).parent
    found = set()
    for path in source.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            value = getattr(node, "value", None)
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "Registry":
                assert isinstance(node, ast.Assign)
                found.add(getattr(node.targets[0], "id", ""))
    assert found <= {place.partition(":")[2] for place in REGISTRIES.values()}


def test_a_table_aligns_numbers_to_the_right() -> None:
    rows = [{"name": "a", "size": 1_000}, {"name": "bcd", "size": None}]
    assert table(rows).splitlines() == ["name   size", "----  -----", "a     1,000", "bcd       -"]
    assert table([]) == "(none)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (12_345, "12,345"),
        (0.123456, "0.1235"),
        (123_456.7, "123,457"),
        (None, "-"),
        (["a", 1], "a, 1"),
    ],
)
def test_values_are_written_for_people(value: object, text: str) -> None:
    assert human(value) == text


def test_facts_indent_what_is_nested() -> None:
    assert facts({"a": 1, "bc": {"d": "x"}}) == "a   1\nbc\n  d  x"


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_in_few_turns_from_before_torch_unless_a_user_says_how(given, count) -> None:
    code = (
        "import os, sys\n"
        "from coterie.cli import main as entry\n"
        "def run(argv):\n"
        "    print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
        "    return 0\n"
        "entry.run = run\n"
        "entry.main([])\n"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    there = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**there, **given}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(count), "False"], done.stderr
