"""The benchmark of guides: every way to ask one is timed against the network as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli.main import run as coterie


def test_times_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "guides.json"
    assert (
        coterie(["bench", "guides", "--quick", "--rounds", "1", "--json", "--out", str(out)]) == 0
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    rows = {row["candidate"]: row for row in found["rows"]}
    assert rows["network as it is"]["over_plain"] == 1.0 and found["followed"] == []
    assert set(rows) == {
        "denoiser alone",
        "network as it is",
        "experts, one for all rows",
        "experts, merged",
        "experts, rows of all ranges",
    }
    assert all(row["ms"] > 0 for row in rows.values())
