"""What a benchmark set out to reach: a figure, the goal, whether it was met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def goal(
    name: str, what: str, figure: float | None, bound: float, at_most: bool, **more: Any
) -> dict[str, Any]:
    """One row ``{goal, what, figure, bound, met, ...}``; ``met`` None: not measured.

    ``figure`` has four significant digits: a difference of 2e-7 is not 0.
    """
    met = None if figure is None else (figure <= bound if at_most else figure >= bound)
    sign = "<=" if at_most else ">="
    shown = None if figure is None else float(f"{figure:.4g}")
    row = {"goal": name, "what": what, "figure": shown, "bound": f"{sign} {bound}", "met": met}
    return {**row, **more}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) over log(sizes) by least squares: 1 = linear growth, 0 = none."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
