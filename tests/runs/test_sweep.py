"""Trained models under other routing settings: costs, equality with the trained one, refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.core.config import override
from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayer, Router, RouterConfig
from coterie.inspect.plots.sweep import plot_sweep
from coterie.runs.build import build_source
from coterie.runs.measure import active_parameters, evaluation, sweep
from coterie.runs.trained_run import LoadedRun
from small_models import small, woken

SELECT = "model.backbone.trunk.slots.0.expert.router.select"
SIZES = {
    "data.kind": "mixed-difficulty",
    "data.count": 256,
    "data.context": 32,
    "model.backbone.context": 32,
    "model.backbone.trunk.depth": 2,
}


def as_run(name: str = "text:top-2-of-8", **paths: Any) -> LoadedRun:
    config = small(name)
    if name.startswith("text"):
        config = override(override(config, {"data.kind": "mixed-difficulty"}), SIZES)
    config = override(config, {path.replace("__", "."): value for path, value in paths.items()})
    return LoadedRun(Path("unused"), config, woken(config, std=0.2), build_source(config), 7)


@pytest.fixture(scope="module")
def run() -> LoadedRun:
    return as_run()


def test_more_experts_cost_more_and_the_trained_number_is_marked(run: LoadedRun) -> None:
    done: list[int] = []
    rows = sweep.sweep(run, {"select.k": [1, 2, 8]}, limit=32, progress=done.append)
    assert [row.settings["select.k"] for row in rows] == [1, 2, 8] and done == [1, 1, 1]
    assert [row.trained for row in rows] == [False, True, False]
    assert [row.experts_per_row for row in rows] == [1.0, 2.0, 8.0]
    assert [row.experts_per_row_max for row in rows] == [1, 2, 8]
    layer = next(m for m in run.model.modules() if isinstance(m, ExpertLayer))
    one = sum(p[0].numel() for p in layer.pool.parameters())
    router = sum(p.numel() for p in layer.routers.parameters())
    steps = [row.active_parameters - rows[1].active_parameters for row in rows]
    assert steps == [-2 * one, 0, 2 * 6 * one]
    cost = [k * one + router for k in (1, 2, 8)]
    expected = [value / cost[1] for value in cost]
    assert [row.relative_multiply_adds for row in rows] == pytest.approx(expected)
    assert rows[1].held_out_loss == evaluation.held_out(run, limit=32).loss
    assert len({row.held_out_loss for row in rows}) == 3
    assert set(rows[0].by_class) == {"easy", "hard", "text"}


def test_the_trained_setting_is_added_where_it_is_not_among_the_values(run: LoadedRun) -> None:
    rows = sweep.sweep(run, {"select": ["top_p"], "select.p": [0.05, 1.0]}, limit=16)
    assert [row.settings for row in rows] == [
        {"select": "top_k", "select.p": None},
        {"select": "top_p", "select.p": 0.05},
        {"select": "top_p", "select.p": 1.0},
    ]
    assert [row.trained for row in rows] == [True, False, False]
    assert [row.experts_per_row for row in rows] == [2.0, 1.0, 8.0]
    whole = sum(p.numel() for p in run.model.parameters())
    assert rows[2].active_parameters == whole


def test_every_combination_is_evaluated_and_the_model_is_left_as_it_was(run: LoadedRun) -> None:
    configs = [m.config for m in run.model.modules() if isinstance(m, Router)]
    rows = sweep.sweep(run, {"select.k": [1, 2], "weight": ["raw", "renorm"]}, limit=8)
    assert [tuple(row.settings.values()) for row in rows] == [
        (1, "raw"), (1, "renorm"), (2, "raw"), (2, "renorm"),
    ]  # fmt: skip
    assert [row.trained for row in rows] == [False, False, True, False]
    assert [m.config for m in run.model.modules() if isinstance(m, Router)] == configs


def test_a_setting_that_trains_badly_is_swept_without_a_warning(run: LoadedRun) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep.check(run, {"select.k": [1], "weight": ["renorm"]})


def test_images_are_swept_at_all_noise_levels_and_noise_level_routers_stay() -> None:
    rows = sweep.sweep(as_run("dit-moe"), {"select.k": [1, 2]}, limit=8)
    assert rows[0].held_out_loss != rows[1].held_out_loss and rows[0].by_class == {}
    with pytest.raises(ConfigError, match="no router chooses experts for tokens"):
        sweep.check(as_run("switch-dit"), {"select.k": [1]})
    with pytest.raises(ConfigError, match="no router chooses experts for tokens"):
        sweep.check(as_run("dit"), {"select.k": [1]})


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"select.k": [2, 9]}, r"select\.k: 9 is not allowed; allowed: k <= E, that is 1\.\.8"),
        ({"select.k": [0]}, r"select\.k: 0 is not allowed"),
        ({"select.p": [0.4]}, r"select\.p: 'p' is not allowed; allowed: k, kind"),
        ({"select": ["top_p"], "select.p": [0.4, 0]}, r"select\.p: 0 is not allowed"),
        ({"select": ["top_q"]}, "top_q"),
        ({"score.kind": ["linear"]}, "score.*allowed: probability, renorm_eps, scale, select"),
        ({"selection_bias": [True]}, "did you mean 'select'"),
        ({"select": ["expert_choice"]}, "see the future"),
        ({}, "at least one path"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    run: LoadedRun, paths: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "held_out", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ConfigError, match=message):
        sweep.sweep(run, paths, limit=8)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1, 0.2", [0.1, 0.2]),
        ("4", [4]),
        ("raw,renorm", ["raw", "renorm"]),
        ("[0, 2]", [[0, 2]]),
        ('{"kind": "rank", "ranks": [1]}', [{"kind": "rank", "ranks": [1]}]),
    ],
)
def test_values_are_split_at_commas(text: str, values: list[Any]) -> None:
    assert sweep.values_of(text) == values


def test_an_empty_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="values: '1,,2' is not allowed"):
        sweep.values_of("1,,2")


def test_parts_are_replaced_before_their_fields_are_set() -> None:
    config = sweep.changed(RouterConfig(), {"select.max_k": 3, "select": "top_p", "scale": 2.0})
    assert (config.select.kind, config.select.max_k, config.scale) == ("top_p", 3, 2.0)


def test_top_p_on_a_top_k_model_equals_a_model_with_top_p(run: LoadedRun) -> None:
    rows = sweep.sweep(run, {"select": ["top_p"], "select.p": [0.3]}, limit=16)
    other = as_run(**{SELECT: {"kind": "top_p", "p": 0.3}})
    other.model.load_state_dict(run.model.state_dict())
    found = evaluation.held_out(other, limit=16)
    assert rows[1].held_out_loss == found.loss
    choices = active_parameters.choices_per_row(found.trace)
    assert rows[1].experts_per_row == pytest.approx(sum(choices.values()) / 2)


def test_files_hold_all_rows_and_the_picture_marks_the_trained_one(
    run: LoadedRun, tmp_path: Path
) -> None:
    rows = sweep.sweep(run, {"select.k": [1, 2, 4]}, limit=8)
    picture = sweep.write_sweep(run, rows, 8, tmp_path / "sweep")
    assert picture == tmp_path / "sweep" / "select.k.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))
    assert data["rows"] == [vars(row) for row in rows]
    assert (data["samples"], data["step"], data["loss_unit"]) == (8, 7, "bits per token")
    left, right = plot_sweep(data["rows"], "bits").draw().axes
    assert [text.get_text() for text in left.texts] == ["1", "2", "4"]
    circles = [line for line in left.lines if line.get_markersize() > 10]
    assert [float(line.get_xdata()[0]) for line in circles] == [2.0]
    changes = [line.get_ydata()[1] for line in right.lines[:3]]
    assert torch.tensor(changes).abs().max() == 0
