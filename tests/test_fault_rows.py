"""Every fault that was found once has a test named after its row, so that it stays mended.

The rows: files of others read as something else (A), changes without effect (B), wrong numbers (C),
tracebacks (D), blockers under attack (F), major faults under attack (G).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROWS = [
    f"{section}{number}"
    for section, count in {"A": 11, "B": 8, "C": 12, "D": 14, "F": 5, "G": 13}.items()
    for number in range(1, count + 1)
]


@pytest.fixture(scope="module")
def names() -> list[str]:
    source = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    return re.findall(r"^\s*def test_(\w+)\(", source, flags=re.MULTILINE)


@pytest.mark.parametrize("row", ROWS)
def test_a_test_is_named_after_the_row(row, names):
    named = re.compile(rf"([A-H]\d*_)*{row}_")
    assert any(named.match(name) for name in names), f"no test_{row}_... in tests/"
