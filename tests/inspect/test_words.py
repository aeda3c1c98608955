"""How numbers, names and findings of a report are written."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from coterie.cli.output import printable
from coterie.core.routing import ENSEMBLE, Routing
from coterie.inspect import Trace, analyse, findings
from coterie.inspect.plots.anomalies import _name_dots
from coterie.inspect.plots.style import Plot, figure, render
from coterie.inspect.words import bits, fixed


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
