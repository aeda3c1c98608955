"""The section on compositions: numbers of weighted particles, what is said of them, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coterie.inspect import ReportData, write_report
from coterie.inspect.page.composition_section import (
    composed_findings,
    composed_numbers,
    composed_sentences,
)
from coterie.inspect.statistics.compositions import Composed, lineages, steps_of

MADE = Composed("product", "low^1 <high>^2", [("low", 1.0, "given"), ("<high>", 2.0, "null")], True)


def record(ess: tuple[float, float], clamped: float = 0.0, ratio: float = 2.0) -> dict[str, Any]:
    """Two steps of two systems of 10 particles, the first of them with these effective sizes."""
    steps = [
        {
            "t": t,
            "ess": list(sizes),
            "max_weight": [0.5, 0.3],
            "ancestors": [8, 4],
            "clamped": [clamped, clamped],
            "resampled": [True, False],
        }
        for t, sizes in ((0.9, ess), (0.1, (9.0, 7.0)))
    ]
    ancestors = [[0] * 5 + [3] * 5, list(range(10))]
    return {
        "particles": 10, "systems": 2, "steps": steps, "ancestors": ancestors,
        "log_ratio": [ratio, ratio + 1.0],
    }  # fmt: skip


def data(*records: dict[str, Any], made: Composed = MADE) -> ReportData:
    return ReportData(title="both", composed=made, particles=records)


def test_steps_are_means_over_all_systems_of_all_batches() -> None:
    first, last = steps_of([record((4.0, 6.0)), record((2.0, 8.0))])
    assert (first["t"], first["ess"], first["ess_least"]) == (0.9, 0.5, 0.2)
    assert first["max_weight"] == pytest.approx(0.4) and first["resampled"] == 0.5
    assert last["ess"] == pytest.approx(0.8) and last["ancestors"] == pytest.approx(0.6)
    assert lineages([record((4.0, 6.0))]) == pytest.approx((0.2 + 1.0) / 2)


def test_what_is_said() -> None:
    lines = composed_sentences(data(record((4.0, 6.0))))
    assert lines[0].startswith("2 experts composed, mode product: samples of low^1 <high>^2.")
    assert "2 systems of 10 particles: effective share 65% on average and 40%" in lines[1]
    assert "60% of the first particles" in lines[1]
    assert lines[2].startswith("The log-normaliser of the composition is 2.5 ± 0.707")
    plain = Composed("average", "low^1", [("low", 1.0, "given")], False)
    assert "Without a corrector" in composed_sentences(data(made=plain))[1]


def test_findings_name_few_particles_and_clamping() -> None:
    (good,) = composed_findings(data(record((4.0, 6.0))))
    assert good.level == "good"
    few, clamped = composed_findings(data(record((0.5, 6.0), clamped=0.25)))
    assert "5% of its particles" in few.text and few.level == "note"
    assert "25.0% of the changes of weight" in clamped.text
    late = record((4.0, 6.0))
    late["steps"][-1]["ess"] = [0.6, 0.8]
    assert {finding.level for finding in composed_findings(data(late))} == {"alarm", "note"}
    assert composed_findings(data()) == []


def test_the_page_and_its_numbers(tmp_path: Path) -> None:
    page = write_report(tmp_path, data(record((4.0, 6.0)))).read_text(encoding="utf-8")
    assert "What is composed" in page and "&lt;high&gt;" in page and "<high>" not in page
    assert "This model is dense" not in page and 'id="particles"' in page
    assert (tmp_path / "particles.png").exists()
    found = json.loads((tmp_path / "report.json").read_text())["composition"]
    assert found["experts"][1] == {"name": "<high>", "power": 2, "told": "null"}
    assert found["systems"] == 2 and found["log_normaliser"] == [2, 3]
    assert len(found["steps"]) == 2


def test_a_model_that_is_no_composition_has_no_such_section(tmp_path: Path) -> None:
    assert composed_numbers(ReportData(title="dense")) is None
    page = write_report(tmp_path, ReportData(title="dense")).read_text(encoding="utf-8")
    assert "What is composed" not in page and "This model is dense" in page
