"""A report of a run that keeps few pictures back says what it could not measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.runs.judges import noise
from coterie.runs.judges.noise import ImageJudge
from coterie.runs.trained_run import load_run


def test_H_fewer_than_four_held_out_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
    from small_runs import finished

    judge = ImageJudge(load_run(finished("dit-moe", tmp_path / "run")))
    whole = noise.batches

    def few(source: Any, size: int, limit: int) -> Any:
        return whole(source, 3, 3)

    monkeypatch.setattr(noise, "batches", few)
    found = judge.scores(8)
    assert found["distances"] == "not measured: 3 pictures, 4 or more are needed"
    assert "frechet" not in found
