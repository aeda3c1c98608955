"""The native operator refuses sizes that no arrays have, before anything is read or divided."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.experts.dispatch import native
from coterie.experts.dispatch.native import op
from coterie.experts.kinds import GeluMLP

pytestmark = pytest.mark.skipif(not native.library().ready, reason=native.library().reason)
GOOD = {"rows": 3, "slots": 1, "experts": 2, "width": 8, "hidden": 8, "gated": 0, "activation": 0}
REFUSED = 2


CASES = [
    *({name: v} for name in GOOD if name != "gated" for v in (-(2**63), -1, 2**62, 2**63 - 1)),
    *({name: 0} for name in ("experts", "width", "hidden")),
    *({"width": 2**20, "hidden": 2**20, name: 2**31 - 1} for name in ("rows", "slots", "experts")),
    {"width": 2**31 - 1, "hidden": 2**31 - 1},
    {"activation": 4},
]


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_F3_the_operator_checks_its_sizes(which: str, changes: dict[str, int]) -> None:
    """With pointers to nowhere: a size that gets through would be a segmentation fault."""
    call = op._Call(*{**GOOD, **changes}.values(), 1)
    library = native.library().handle
    assert library is not None
    assert getattr(library, f"coterie_experts_{which}")(ctypes.byref(call)) == REFUSED


def tensors(**changes: Any) -> list[Any]:
    given = {
        "x": torch.ones(4, 8),
        "gates": torch.ones(4, 2),
        "ids": torch.zeros(4, 2, dtype=torch.long),
        "w1": torch.ones(2, 6, 8),
        "b1": torch.ones(2, 6),
        "w2": torch.ones(2, 8, 6),
        "b2": torch.ones(2, 8),
    }
    return list({**given, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"w1": torch.ones(2, 0, 8), "b1": torch.ones(2, 0), "w2": torch.ones(2, 8, 0)},
        {"w1": torch.ones(0, 6, 8), "b1": torch.ones(0, 6), "w2": torch.ones(0, 8, 6)},
        {"w2": torch.ones(2, 8, 7)},
        {"w2": torch.ones(3, 8, 6)},
        {"b1": torch.ones(2, 5)},
        {"b2": torch.ones(1, 8)},
        {"x": torch.ones(4, 7)},
        {"x": torch.ones(3, 8)},
        {"gates": torch.ones(4, 1)},
        {"w1": torch.ones(12, 8)},
    ],
)
def test_F3_tensors_that_do_not_fit_are_one_line(changes: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"native experts forward: .* is not allowed; allowed:"):
        op.native_experts(*tensors(**changes), 1, False, False)
    saved, dy = torch.ones(1000), torch.ones(4, 8)
    with pytest.raises(ConfigError, match=r"native experts backward: .* is not allowed; allowed:"):
        op.native_experts_backward(dy, saved, *tensors(**changes), 1, False, True, True)


def test_F3_one_expert_without_hidden_units() -> None:
    made = GeluMLP().feed_forward()
    assert made is not None
    weights = {"up": torch.ones(0, 8), "up_bias": torch.ones(0), "down": torch.ones(8, 0)}
    weights["down_bias"] = torch.ones(8)
    with pytest.raises(ConfigError, match="native experts forward"):
        op.run_one(torch.ones(4, 8), made, weights)
