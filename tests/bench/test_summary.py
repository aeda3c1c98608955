"""Goals from files of results: runs side by side, misses in bold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coterie.bench.goals import goal, timed
from coterie.bench.summary import goals_table, headlines, read_goals, sections, short_table
from coterie.core.errors import DataError

MACHINE = {"cpu": "x", "cores": 2, "torch": "y"}


def _file(threads: int, goals: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "threads": threads,
        "goals": goals,
        "commit": f"c{threads}",
        "hardware": MACHINE,
        **more,
    }


def _results() -> list[dict[str, Any]]:
    times = {"ours": [1.0, 2.0], "floor": [2.0, 2.0], "other": [9.0, 9.0]}
    first = timed("P1", "S2: over the floor", times, "ours", ["floor", "other"], 0.7)
    exact, law = goal("exact", "bits", 0.0, 0.0, True), goal("tokens", "e", 2.0, 1.05, True)
    second = goal("P1", "S2: over the floor", 0.5, 0.7, True)
    return [_file(1, [exact, first], laws=[law]), _file(2, [second])]


def test_runs_on_one_and_two_threads_stand_in_one_row() -> None:
    lines = goals_table(_results()).splitlines()
    assert (
        lines[2]
        == "| P1 | S2: over the floor | <= 0.7 | **0.75** ± 0.25 | 1500 / 2000 floor | 0.5 |  |"
    )
    assert lines[3].startswith("| exact | bits | <= 0.0 | 0 |") and "**2**" in lines[4]
    assert lines[-1].startswith("2 of 4 met") and lines[-1].endswith("commit c1, c2.")


def test_the_short_table_counts_and_names_misses() -> None:
    row = next(line for line in short_table(_results()).splitlines() if line.startswith("| P1 |"))
    assert "| 1 of 2 | S2: over the floor, 1 thread: 0.75 (<= 0.7) |" in row


def test_headlines_give_the_range_of_all_sizes_and_say_what_is_missed() -> None:
    figures = {"S2": 0.5, "B2": 1.25}
    rows = [goal("P3", f"{n}: over the fastest peer", v, 1.05, True) for n, v in figures.items()]
    first, last = headlines([_file(1, rows)]).splitlines()
    assert " 0.50 to 1.25 times as long " in first
    assert first.endswith("(missed: the goal is <= 1.05).")
    assert last == "- 1 of 2 goals, all set beforehand, are met."


def test_files_without_goals_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"rows": []}), encoding="utf-8")
    with pytest.raises(DataError, match="a folder with files of coterie bench"):
        sections(tmp_path)
    (tmp_path / "b.json").write_text(json.dumps(_results()[1]), encoding="utf-8")
    assert [found["threads"] for found in read_goals(tmp_path)] == [2]
