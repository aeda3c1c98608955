"""Parameter counts of published models, built without allocating a weight."""

from __future__ import annotations

import pytest
import torch

from coterie.core.cost import Parameters, count_parameters
from coterie.experts import RouterConfig, Segmentation
from coterie.experts.kinds import SwiGLU
from coterie.recipes import deepseekmoe, dit, dit_moe, dtr, promoe, switch_dit
from coterie.recipes.common import SIZES
from coterie.runs.config import RunConfig

# Totals and actives in millions, as the papers print them or their code counts.
DIT = {"S": 32.9, "B": 130.3, "L": 457.8, "XL": 674.8}
DIT_MOE = {
    ("S", 8): (199.2, 71.8),
    ("S", 16): (369.1, 71.8),
    ("B", 8): (795.7, 286.1),
    ("L", 8): (2820.0, 1010.0),
    ("XL", 8): (4170.0, 1490.0),
    ("G", 16): (16500.0, 3180.0),
}
PROMOE = {"S": (75.4, 32.9), "B": (300.4, 130.4), "L": (1062.0, 458.0), "XL": (1567.0, 675.0)}
SWITCH_EXTRA = {"S": 5.34, "B": 21.3, "L": 75.6, "XL": 111.7}
WITHIN = 0.005


def counted(config: RunConfig) -> Parameters:
    with torch.device("meta"):
        return count_parameters(config.model.build())


def millions(config: RunConfig) -> tuple[float, float]:
    found = counted(config)
    return found.total / 1e6, found.active / 1e6


@pytest.mark.parametrize("size", DIT)
def test_dit(size: str) -> None:
    assert millions(dit.paper(size)) == pytest.approx((DIT[size], DIT[size]), rel=WITHIN)


@pytest.mark.parametrize(("size", "num_experts"), DIT_MOE)
def test_dit_moe(size: str, num_experts: int) -> None:
    expected = DIT_MOE[size, num_experts]
    assert millions(dit_moe.paper(size, num_experts)) == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("size", PROMOE)
def test_promoe_has_the_active_size_of_the_dense_model(size: str) -> None:
    found = millions(promoe.paper(size))
    assert found == pytest.approx(PROMOE[size], rel=WITHIN)
    assert found[1] == pytest.approx(millions(dit.paper(size))[0], rel=0.001)


@pytest.mark.parametrize("size", SWITCH_EXTRA)
def test_switch_dit_adds_what_its_formula_says(size: str) -> None:
    dense, ours = counted(dit.paper(size)), counted(switch_dit.paper(size))
    depth, width, _ = SIZES[size]
    extra = depth * (width * 3 + 3 + 3 * (width**2 + width))
    assert ours.total - dense.total == extra
    assert extra / 1e6 == pytest.approx(SWITCH_EXTRA[size], rel=WITHIN)
    active = depth * (width * 3 + 3 + 2 * (width**2 + width))
    assert ours.active - dense.active == pytest.approx(active, abs=depth)


@pytest.mark.parametrize("size", DIT)
def test_dtr_adds_nothing(size: str) -> None:
    assert counted(dtr.paper(size)) == counted(dit.paper(size))


@pytest.mark.parametrize(("size", "total", "active"), [("2B", 2.0, 0.3), ("16B", 16.4, 2.8)])
def test_deepseekmoe_to_the_printed_digit(size: str, total: float, active: float) -> None:
    found = counted(deepseekmoe.paper(size))
    assert (round(found.total / 1e9, 1), round(found.active / 1e9, 1)) == (total, active)


def test_deepseekmoe_has_the_printed_numbers_of_experts() -> None:
    for size, routed, k, shared in (("2B", 63, 7, 1), ("16B", 64, 6, 2)):
        (slot,) = deepseekmoe.paper(size).model.backbone.trunk.slots
        expert = slot.expert
        assert (expert.num_experts, expert.router.select.k, expert.shared.count) == (
            routed,
            k,
            shared,
        )


@pytest.mark.parametrize(("base", "k", "segment", "shared"), [(16, 2, 4, 1), (8, 2, 1, 0)])
def test_segments_follow_the_rule(base: int, k: int, segment: int, shared: int) -> None:
    rule = Segmentation(
        base_experts=base, base_k=k, base_hidden=128, segment=segment, shared=shared
    )
    ours = deepseekmoe.slot(base, k, 128, segment=segment, shared=shared).expert
    router = RouterConfig(score={"kind": "linear", "init_std": 0.02})
    assert ours.replace(balance=()) == rule.layer(SwiGLU(init_std=0.02), router)
