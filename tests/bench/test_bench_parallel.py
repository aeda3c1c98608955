"""What the benchmark of layouts answers; its times are checked by nobody."""

from __future__ import annotations

import pytest

from coterie.bench import parallel
from coterie.core.errors import TrainingError
from coterie.recipes import get_recipe


def test_rows_come_from_medians_of_rounds():
    measured = {
        parallel.ONE: {"seconds": [1.0, 2.0, 4.0], "cpu": [1.0] * 3, "bytes": [7, 7, 7]},
        "data=2": {"seconds": [0.5, 1.0, 8.0], "cpu": [0.2, 0.3, 0.9], "bytes": [100, 120, 9000]},
        parallel.PEER: {"seconds": [0.5, 0.5, 2.0], "cpu": [1.0] * 3, "bytes": []},
    }
    row = parallel._row("data=2", measured, 2)
    assert row == {
        "layout": "data=2",
        "processes": 2,
        "step_ms": 1000.0,
        "steps_per_second": 1.0,
        "vs_one": 0.5,
        "vs_peer": 2.0,
        "cpu_ms": 300.0,
        "wire_bytes": 120,
    }
    assert parallel._row(parallel.ONE, measured, 2)["processes"] == 1
    assert parallel._row(parallel.PEER, measured, 2)["wire_bytes"] is None


def test_a_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(parallel, "WORKER", "import os; os._exit(3)")
    with pytest.raises(TrainingError, match=r"bench parallel: process . of 2 ended with 3"):
        parallel.run_benchmark(get_recipe("dit-moe").config())
