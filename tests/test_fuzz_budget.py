"""The counting of the suites over hostile input can itself fail: every outcome is told apart."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

import fuzz_budget
from coterie.core.errors import DataError
from fuzz_budget import Outcomes


def fail(error: Exception) -> None:
    raise error


def test_every_outcome_is_told_apart() -> None:
    found = Outcomes("self")
    assert found.attempt("a", lambda: 1, lambda answer: answer == 1) == "worked"
    assert found.attempt("b", lambda: 1, lambda answer: answer == 2) == "wrong"
    assert found.attempt("c", lambda: fail(DataError("one line"))) == "refused"
    assert found.attempt("d", lambda: fail(DataError("two\nlines"))) == "traceback"
    assert found.attempt("e", lambda: fail(KeyError("x"))) == "traceback"
    assert found.attempt("f", lambda: time.sleep(5), limit=0.05) == "hung"
    assert found.tried == 6 and len(found.faults) == 4
    with pytest.raises(AssertionError, match="KeyError at test_fuzz_budget"):
        found.assert_none_wrong()
    with pytest.raises(AssertionError):
        Outcomes("nothing tried").assert_none_wrong()
    with pytest.raises(ValueError, match="outcome 'odd'"):
        found.add("odd")


def test_a_long_run_takes_new_seeds_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def test(number: int) -> None:
        seen.append(number)
        found.add("worked")

    found = Outcomes("short")
    found.repeat(test, st.integers(), examples=5)
    assert len(seen) == 5 and found.seeds == [0] and found.write() is None
    monkeypatch.setenv("COTERIE_FUZZ_SECONDS", "0.2")
    monkeypatch.setenv("COTERIE_FUZZ_SEED", "7")
    monkeypatch.setattr(fuzz_budget, "ROOT", tmp_path)
    found = Outcomes("long")
    found.repeat(test, st.integers(), examples=5)
    path = found.write()
    assert path is not None and path.is_relative_to(tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["tried"] == record["worked"] == found.tried >= 5
    assert record["seeds"][0] == 7 and record["hardware"] and record["seconds"] >= 0.2
