"""How numbers, names and findings of a report are written."""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.cli.output import printable
from coterie.core.prediction import Condition
from coterie.core.routing import ENSEMBLE, Routing
from coterie.ensembles import ENSEMBLES
from coterie.inspect import ReportData, Trace, analyse, findings, write_report
from coterie.inspect.page.metric_names import NAMES
from coterie.inspect.phrases import bits, fixed
from coterie.inspect.plots.anomalies import _name_dots, plot_one_sided
from coterie.inspect.plots.balance import plot_load
from coterie.inspect.plots.routing import plot_classes, plot_noise
from coterie.inspect.plots.style import Plot, figure, in_lines, render
from coterie.inspect.statistics.anomalies import analyse_anomalies
from coterie.process import PROCESSES, ExactDenoiser, Mixture
from coterie.runs import judges


def test_D12_numbers_that_are_only_rounding_are_zero() -> None:
    assert [bits(value) for value in (3.2e-16, -1e-9, 0.0)] == ["0.00", "0.00", "0.00"]
    assert bits(0.0042) == "0.0042" and bits(0.5) == "0.50" and bits(-0.3) == "-0.30"
    assert fixed(-1e-9) == "0.000" and fixed(-0.25) == "-0.250"


def test_D12_names_beside_dots_do_not_overlap() -> None:
    fig = figure(9.6, 2.9)
    ax = fig.subplots()
    x, y = np.full(8, 10.0), 0.5 + 1e-3 * np.arange(8)
    ax.scatter(x, y)
    ax.set_ylim(-0.2, 0.6)
    ax.set_xlim(0, 11.5)
    _name_dots(ax, x, y, [f"class {index}" for index in range(8)])
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in ax.texts]
    assert len(boxes) == 8
    middles = sorted((box.y0 + box.y1) / 2 for box in boxes)
    assert min(np.diff(middles)) > 0.85 * boxes[0].height


def test_D12_members_that_nobody_asks_are_an_alarm() -> None:
    ids = torch.tensor([[0], [1]]).repeat(400, 1)
    gates = torch.ones(800, 1)
    probs = torch.zeros(800, 4).scatter_(1, ids, 1.0)
    trace = Trace()
    trace.add(
        [
            Routing(
                unit="sample", num_experts=4, ids=ids, gates=gates, probs=probs, logits=probs,
                batch=(800, 1), slot=ENSEMBLE, name=ENSEMBLE,
            )
        ]
    )  # fmt: skip
    found = findings(analyse(trace))
    assert any(one.level == "alarm" and "dead" in one.text for one in found)


def ensemble_of(names: tuple[str, ...], asked: Sequence[int]) -> Trace:
    """Members that were asked equally often; the others never."""
    ids = torch.tensor(asked).repeat(800 // len(asked))[:, None]
    probs = torch.zeros(len(ids), len(names)).scatter_(1, ids, 1.0)
    trace = Trace()
    trace.add(
        [
            Routing(
                unit="sample", num_experts=len(names), ids=ids, gates=torch.ones(len(ids), 1),
                probs=probs, logits=probs, batch=(len(ids), 1), slot=ENSEMBLE, name=ENSEMBLE,
                expert_names=names, noise=torch.linspace(0, 0.999, len(ids)),
                label=torch.arange(len(ids)) // len(asked) % 2,
            )
        ]
    )  # fmt: skip
    return trace


MEMBERS = ("north", "south", "east", "west")


def test_D12_dead_members_are_an_alarm_in_findings_meters_and_table(tmp_path: Path) -> None:
    page = write_report(tmp_path, ReportData("ensemble", trace=ensemble_of(MEMBERS, [0, 1])))
    text = page.read_text(encoding="utf-8")
    assert "experts east and west are dead" in text
    assert re.search(r'<td class="[^"]*bad[^"]*">2 \(east, west\)</td>', text)
    assert "Degradation: experts east and west of layer ensemble work for no" in text
    assert "No degradation" not in text and "degradation or" not in text
    found = json.loads((tmp_path / "report.json").read_text())["anomalies"]["verdicts"]
    assert [one["level"] for one in found if one["meter"] == "Degradation"] == ["alarm"]


def test_D12_members_that_are_all_asked_are_no_alarm(tmp_path: Path) -> None:
    page = write_report(tmp_path, ReportData("ensemble", trace=ensemble_of(MEMBERS, [0, 1, 2, 3])))
    text = page.read_text(encoding="utf-8")
    assert "No dead experts" in text and "for no class at all" not in text


def texts_of(plot: Plot | None) -> list[str]:
    assert plot is not None
    fig = plot.draw()
    return [
        text.get_text()
        for ax in fig.axes
        for text in (*ax.get_xticklabels(), *ax.get_yticklabels())
    ]


def test_D12_pictures_name_the_members_of_an_ensemble() -> None:
    trace = ensemble_of(MEMBERS, [0, 1, 2, 3])
    items = analyse(trace)
    found = analyse_anomalies(trace, items, {}, {}, {})
    for plot in (
        plot_noise(trace.routers, ["ensemble"]),
        plot_classes(trace.routers, ["ensemble"], ()),
        plot_load(items, trace.routers),
        plot_one_sided(found.degradation),
    ):
        assert set(MEMBERS) <= set(texts_of(plot))


def test_D12_ensembles_say_who_their_members_are() -> None:
    process = PROCESSES.parse("rectified_flow").build()
    data = Mixture.gaussian(torch.zeros(2), 0.5)
    members = {name: ExactDenoiser(process, data) for name in ("clean", "noisy")}
    made = ENSEMBLES.parse({"kind": "noise_ranges", "boundaries": [0.5]}).build(members)
    asked = made(torch.zeros(2, 2), torch.tensor([0.2, 0.8]), Condition())
    assert asked.routings[0].expert_names == ("clean", "noisy")


@pytest.mark.parametrize("side", ["left", "right"])
def test_D12_labels_that_reach_over_the_edge_are_not_cut(side: str) -> None:
    def draw(label: str) -> Any:
        fig = figure(3.0, 1.0)
        fig.set_layout_engine("none")
        ax = fig.subplots()
        ax.text(0.5, 0.5, label, ha="right" if side == "left" else "left")
        return fig

    plain = render(Plot("a", "", "", "", lambda: draw("a")))
    long = render(
        Plot("b", "", "", "", lambda: draw("layer patch_in of a network with a long name"))
    )
    assert plain.width == round(3.0 * 96)
    assert long.width > plain.width
    for png in (long.light, long.dark):
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L")).astype(int)
        for edge in (pixels[:, 0], pixels[:, -1]):
            assert np.ptp(edge) == 0
    assert Image.open(io.BytesIO(long.light)).size == Image.open(io.BytesIO(long.dark)).size


def test_D12_titles_of_narrow_panels_do_not_reach_into_the_next() -> None:
    assert in_lines("layer blocks.0.attention: at most 98%") == (
        "layer blocks.0.attention:\nat most 98%"
    )
    assert in_lines("layer 0: at most 98%") == "layer 0: at most 98%"


def test_D12_metrics_have_names_and_directions(tmp_path: Path) -> None:
    metrics = {
        "frechet": {"value": 3.0, "floor": 1.0},
        "one_nn_cd": {"value": 0.7, "floor": 0.5},
        "psnr/rain": 20.0,
        "dropped_users/like": 3,
        "flops_per_call": 7,
        "held-out loss (nats)": 0.5,
        "some_new_number": 1.0,
    }
    text = write_report(tmp_path, ReportData("m", metrics=metrics)).read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[-1]
        for cells in (
            re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)
            for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
        )
        if cells
    }
    assert rows["Metric"] == "Better"
    assert rows["Frechet distance"] == "↓ lower"
    assert rows["1-NNA by Chamfer distance"] == "↓ lower"
    assert rows["PSNR (dB), rain"] == "↑ higher"
    assert rows["users without both kinds of answer, left out of GAUC, like"] == "–"
    assert rows["FLOPs per call"] == rows["held-out loss (nats)"] == "↓ lower"
    assert rows["some new number"] == "–"
    assert "By Frechet distance (lower is better) the samples score 3" in text


def test_D12_every_number_that_judges_write_has_a_name() -> None:
    """Keys of dictionaries that ``scores``, ``measures`` and ``details`` answer."""
    keys: set[str] = set()
    for path in Path(judges.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
                keys |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
    assert {"label_accuracy", "island_distance", "cluster_accuracy", "milliseconds"} <= keys
    assert sorted(keys - set(NAMES)) == []


def test_H_class_names_in_other_scripts_do_not_flood_the_terminal() -> None:
    def draw() -> object:
        fig = figure(3.0, 2.0)
        fig.subplots().set_title("猫 犬 鳥 \U0001f600")
        return fig

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(Plot("cjk", "", "", "", draw)).light[:4] == b"\x89PNG"


@pytest.mark.parametrize("text", ["runs/\x1b[31mred\x1b[0m", "a\x07b", "c\rd", "\x9b31m"])
def test_H_control_characters_are_written_out(text: str) -> None:
    shown = printable(text)
    assert (shown.isprintable() and "\\x" in shown) or "\\r" in shown
    assert printable("runs/été 猫\n\tnext") == "runs/été 猫\n\tnext"
