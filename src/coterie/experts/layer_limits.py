"""Constraints on an expert layer that come from its experts or from its slot."""

from __future__ import annotations

GRID_ONLY: dict[str, object] = {
    "rounds": 1,
    "stem": "none",
    "adaptor": None,
    "answer": "delta",
    "self_gate": None,
}
"""What a layer whose experts read grids must have: the rest is made for rows of one width."""

SAME_WIDTH: dict[str, object] = {"rounds": 1, "adaptor": None, "answer": "delta"}
"""What a layer must have whose experts answer more or fewer values than they read."""

TRUNK_ONLY = "only slots of a trunk have a stream and its norm"
"""Why routers elsewhere read what the experts read."""
