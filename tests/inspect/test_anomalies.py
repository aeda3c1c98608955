"""The three meters on cases whose readings can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_routings import known_truth, routing

from coterie.inspect import (
    Anomalies,
    Answers,
    Place,
    ReportData,
    Trace,
    Verdict,
    analyse,
    analyse_anomalies,
    verdicts,
    write_report,
)
from coterie.inspect.page.anomaly_verdicts import summary

HERE = Place("ffn", 0, 0)
TASKS = ("like", "follow", "share")


def answers(scale: list[float], zeros: list[float] | None = None) -> dict[Place, Answers]:
    count = len(scale)
    return {
        HERE: Answers(
            np.zeros(count),
            np.array(scale),
            np.zeros(count) if zeros is None else np.array(zeros),
            np.full(count, 100.0),
        )
    }


def weighed(gates: list[list[float]], rows: int = 100, **facts: Any) -> Trace:
    """Every task t has ``rows`` rows with the gates ``gates[t]`` over all experts; -1: closed."""
    table = torch.tensor(gates).repeat_interleave(rows, 0)
    ids = torch.arange(table.shape[1]).expand(table.shape).clone()
    ids[table < 0] = table.shape[1]
    probs = table.clamp(min=0)
    made = routing(ids, table.shape[1], (len(table), 1), unit="sample", probs=probs)
    task = torch.arange(len(gates)).repeat_interleave(rows)
    trace = Trace()
    trace.add([made.replace(gates=probs, task=task, **facts)])
    return trace


def read(trace: Trace, **known: Any) -> tuple[Anomalies, dict[str, Verdict]]:
    found = analyse_anomalies(
        trace,
        analyse(trace),
        known.get("answers", {}),
        {"task": TASKS, "class": known.get("classes", ())},
        known.get("losses", {}),
    )
    return found, {verdict.meter: verdict for verdict in verdicts(found)}


EVEN = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("scale", "ratio", "level"),
    [
        ([1.0, 1.0], 1.0, "good"),
        ([2.0, 0.5], 4.0, "good"),
        ([3.0, 0.25], 12.0, "note"),
        ([100.0, 1.0], 100.0, "alarm"),
        ([1.0, 0.0], math.inf, "alarm"),
        ([0.0, 0.0], 1.0, "good"),
    ],
)
def test_collapse_is_strongest_over_weakest(scale: list[float], ratio: float, level: str) -> None:
    found, said = read(weighed(EVEN), answers=answers(scale))
    assert found.collapse[0].ratio == pytest.approx(ratio)
    assert said["Collapse"].level == level
    assert said["Collapse"].number == pytest.approx(ratio)
    assert said["Collapse"].ideal == 1.0


def test_an_expert_of_zeros_has_collapsed_however_strong_it_is() -> None:
    found, said = read(weighed(EVEN), answers=answers([1.0, 1.0], [0.2, 0.93]))
    assert (found.collapse[0].zeros, found.collapse[0].emptiest) == (0.93, 1)
    assert said["Collapse"].level == "alarm"
    assert said["Collapse"].text.startswith("93% of the activations of expert 1 in layer 0")


def test_scale_counts_the_mean_too() -> None:
    both = Answers(np.array([3.0]), np.array([4.0]), np.zeros(1), np.ones(1))
    assert both.scale.tolist() == [5.0]


def test_answers_nobody_looked_at_are_no_verdict() -> None:
    _, said = read(weighed(EVEN))
    assert said["Collapse"].level == "note"
    assert math.isnan(said["Collapse"].number)
    assert "not measured" in said["Collapse"].text


def test_a_shared_expert_that_one_task_uses_has_degraded() -> None:
    """Expert 0 has gates 0.95, 0.02, 0.03: 95 % of its weight is that of the first task."""
    found, said = read(weighed([[0.95, 0.05], [0.02, 0.98], [0.03, 0.97]]))
    item = found.degradation[0]
    assert item.facet == "task"
    assert item.columns == TASKS
    np.testing.assert_allclose(item.table[:, 0], [0.95, 0.02, 0.03], rtol=1e-5)
    np.testing.assert_allclose(item.table[:, 1], [0.025, 0.49, 0.485], rtol=1e-5)
    np.testing.assert_allclose(item.ideal, 1 / 3)
    assert (item.worst, item.column) == (0, "like")
    assert item.number == pytest.approx(0.95)
    assert said["Degradation"].ideal == pytest.approx(1 / 3)
    assert "takes 95% of its gate weight from task like (33% if" in said["Degradation"].text


def test_an_expert_that_serves_all_alike_is_in_order() -> None:
    found, said = read(weighed(EVEN))
    assert found.degradation[0].number == pytest.approx(1 / 3)
    assert said["Degradation"].level == "good"


def test_frequent_tasks_do_not_make_an_expert_one_sided() -> None:
    """Nine rows of ten belong to task 0, but each row of either weighs expert 0 alike."""
    trace = weighed([[0.5, 0.5]], rows=900)
    ids = torch.arange(2).expand(100, 2)
    rare = routing(ids, 2, (100, 1), unit="sample").replace(task=torch.ones(100, dtype=torch.long))
    trace.add([rare])
    found, _ = read(trace)
    assert found.degradation[0].number == pytest.approx(0.5)


def test_private_experts_are_not_one_sided_but_private() -> None:
    """Expert 2 is closed to tasks 0 and 1: its only candidate is its own; expert 0 is shared."""
    found, said = read(weighed([[0.6, 0.4, -1], [0.5, 0.5, -1], [0.7, -1, 0.3]]))
    item = found.degradation[0]
    np.testing.assert_allclose(item.ideal, [1 / 3, 1 / 2, 1.0])
    assert item.top[2] == pytest.approx(1.0)
    assert item.worst != 2
    under = found.underfitting
    assert under is not None
    (own,) = under.private
    assert (own.task, own.share, own.ideal) == ("share", pytest.approx(0.3), 0.5)
    assert own.frequency == pytest.approx(1 / 3)
    assert said["Underfitting"].number == pytest.approx(0.6)
    assert said["Underfitting"].level == "good"


def test_idle_own_experts_are_underfitting() -> None:
    _, said = read(weighed([[0.5, 0.5, -1], [0.95, -1, 0.05], [0.5, 0.5, -1]]))
    assert said["Underfitting"].level == "alarm"
    assert said["Underfitting"].number == pytest.approx(0.1)
    assert "task follow gives 5% of its gate weight" in said["Underfitting"].text


def by_class(counts: list[int], gates: list[float]) -> Trace:
    label = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = len(label)
    made = routing(torch.arange(rows) % 2, 2, (rows, 1), label=label)
    weight = torch.tensor(gates)[label][:, None]
    trace = Trace()
    trace.add([made.replace(gates=weight)])
    return trace


def test_rare_classes_with_a_higher_loss_are_underfitting() -> None:
    losses = {"class": {"cat": 1.0, "dog": 3.0, "emu": 4.0}}
    trace = by_class([400, 400, 40], [1.0, 1.0, 1.0])
    found, said = read(trace, classes=("cat", "dog", "emu"), losses=losses)
    under = found.underfitting
    assert under is not None
    assert under.rare.tolist() == [False, False, True]
    assert said["Underfitting"].number == pytest.approx(2.0)
    assert said["Underfitting"].level == "note"
    assert "rare classes (emu) is 2 times" in said["Underfitting"].text


def test_rare_classes_that_are_learnt_as_well_are_not() -> None:
    losses = {"class": {"0": 1.0, "1": 3.0, "2": 2.0}}
    _, said = read(by_class([400, 400, 40], [1.0, 1.0, 1.0]), losses=losses)
    assert said["Underfitting"].number == pytest.approx(1.0)
    assert said["Underfitting"].level == "good"


def test_a_class_without_gate_weight_is_left_out() -> None:
    """Gates 1, 1, 0.25 in equal parts: the mean is 0.75, so the third has a third of it."""
    found, said = read(by_class([100, 100, 100], [1.0, 1.0, 0.25]))
    under = found.underfitting
    assert under is not None
    np.testing.assert_allclose(under.weight, [4 / 3, 4 / 3, 1 / 3])
    assert said["Underfitting"].number == pytest.approx(1 / 3)
    assert said["Underfitting"].level == "note"


def test_without_tasks_what_experts_tell_most_of_is_looked_at() -> None:
    """Layer 0 chooses by noise, layer 2 by class; positions are not asked."""
    trace = Trace(grid=(4, 4))
    trace.add(known_truth(torch.Generator().manual_seed(0), samples=300))
    found, said = read(trace)
    assert {item.facet for item in found.degradation} <= {"noise", "class"}
    assert found.underfitting is not None
    assert found.underfitting.facet == "class"
    assert set(said) == {"Collapse", "Degradation", "Underfitting"}


def test_texts_are_looked_at_by_position() -> None:
    """20 positions become ten stretches; an expert of the first half has a fifth of each."""
    rows = torch.arange(200 * 20)
    trace = Trace()
    trace.add([routing((rows % 20 >= 10).long(), 2, (200, 20))])
    found, _ = read(trace)
    item = found.degradation[0]
    assert item.facet == "position"
    assert item.columns[:2] == ("from 0", "from 2")
    np.testing.assert_allclose(item.top, 0.2)


def test_few_rows_and_idle_experts_are_not_judged() -> None:
    found, said = read(weighed(EVEN, rows=5))
    assert found.degradation == ()
    assert found.underfitting is None
    assert {verdict.level for verdict in said.values()} == {"note"}
    assert all("not meas" in verdict.text for verdict in said.values())
    found, _ = read(weighed([[1.0, 0.0], [1.0, 0.0]]))
    assert math.isnan(found.degradation[0].top[1])


def test_a_dense_model_has_no_meters() -> None:
    found, said = read(Trace())
    assert vars(found) == vars(Anomalies())
    assert said == {}
    assert summary([]) == []


def test_what_is_in_order_is_one_line_of_the_summary() -> None:
    _, said = read(weighed(EVEN), answers=answers([1.0, 1.0]))
    (line,) = summary(list(said.values()))
    assert line.text == "No collapse, degradation or underfitting of experts."
    _, said = read(weighed(EVEN), answers=answers([100.0, 1.0]))
    assert [line.level for line in summary(list(said.values()))] == ["alarm", "good"]


@pytest.mark.parametrize("private", [True, False])
def test_the_page_and_the_data_have_all_three(tmp_path: Path, private: bool) -> None:
    gates = [[0.5, 0.5, -1], [0.95, -1, 0.05]] if private else EVEN
    data = ReportData(
        title="Tasks",
        trace=weighed(gates),
        task_names=TASKS,
        answers=answers([3.0, 0.25, 1.0][: len(gates[0])], [0.0, 0.95, 0.0][: len(gates[0])]),
    )
    page = write_report(tmp_path, data)
    text = page.read_text(encoding="utf-8")
    assert 'id="anomalies"' in text
    for word in ("Collapse", "Degradation", "Underfitting", "95% of the activations of expert 1"):
        assert word in text
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert {"expert_scales", "gates_by_task", "left_out"} <= pictures
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["anomalies"]
    assert [verdict["meter"] for verdict in numbers["verdicts"]] == [
        *("Collapse", "Degradation", "Underfitting"),
    ]
    assert numbers["collapse"][0]["ratio"] == 12
    assert numbers["degradation"][0]["columns"] == list(TASKS[: len(gates)])
    assert bool(numbers["underfitting"]["private"]) == private
