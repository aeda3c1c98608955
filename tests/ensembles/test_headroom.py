"""What a choice among experts could be worth: known where errors are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition, Prediction
from coterie.ensembles import Members
from coterie.ensembles.headroom import GO, headroom
from coterie.process import PROCESSES, target_of

FLOW = PROCESSES.parse("rectified_flow").build()
SIDE = 8


class Wrong(nn.Module):
    """Knows the truth (x0 is 0), and is off by ``gap`` [H, W], or by noise of its own."""

    process, view = FLOW, "eps"

    def __init__(self, gap: Tensor, seed: int | None = None) -> None:
        super().__init__()
        self.register_buffer("gap", gap)
        self.rng = None if seed is None else torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, t: Tensor, cond: Condition, **told: Any) -> Prediction:
        zero = torch.zeros_like(x)
        eps = x / FLOW.sigma(t)[:, None, None, None]
        value = target_of(FLOW, zero, eps, "eps", t)
        if self.rng is None:
            return Prediction(value + self.get_buffer("gap"), "eps")
        return Prediction(value + torch.randn(x.shape, generator=self.rng), "eps")


def pictures(count: int = 4) -> list[Batch]:
    return [Batch(torch.zeros(count, 1, SIDE, SIDE), Condition(), torch.arange(count))]


def half(left: float, right: float) -> Tensor:
    gap = torch.full((SIDE, SIDE), left)
    gap[:, SIDE // 2 :] = right
    return gap


def test_experts_of_one_half_each_can_be_chosen_by_place() -> None:
    members = Members({"left": Wrong(half(0.1, 1.0)), "right": Wrong(half(1.0, 0.2))})
    found = headroom(members, pictures(), levels=3)
    assert found.alone == pytest.approx((0.505, 0.52), rel=1e-4) and found.best == "left"
    assert found.gain("oracle") == pytest.approx(1 - 0.025 / 0.505, rel=1e-3)
    assert found.gain("predictable") == pytest.approx(found.gain("oracle"), rel=1e-6)
    assert found.gain("per_sample") == pytest.approx(0.0, abs=1e-6)
    assert found.go and all(level.agreement == 1.0 for level in found.levels)
    assert all(level.chance == pytest.approx(0.5) for level in found.levels)


def test_luck_is_no_headroom() -> None:
    """Equal skill, errors of chance: an oracle wins much, and nothing of it can be predicted."""
    members = Members({name: Wrong(torch.zeros(()), seed=s) for s, name in enumerate("ab")})
    found = headroom(members, pictures(64), levels=2)
    assert found.gain("oracle") > 0.3
    assert abs(found.gain("predictable")) < GO and not found.go
    assert found.levels[0].agreement == pytest.approx(found.levels[0].chance, abs=0.03)


def test_too_few_members_and_different_processes_are_refused() -> None:
    one = Wrong(half(0.0, 0.0))
    with pytest.raises(ConfigError, match="members"):
        headroom(Members({"a": one}), pictures())
    other = Wrong(half(0.0, 0.0))
    other.process = PROCESSES.parse("vp_linear").build()
    with pytest.raises(ConfigError, match=r"members\.b\.process"):
        headroom(Members({"a": one, "b": other}), pictures())
    with pytest.raises(ConfigError, match="samples: 0"):
        headroom(Members({"a": one, "b": one}), [])
