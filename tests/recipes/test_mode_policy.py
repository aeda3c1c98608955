"""MoDE: sizes as published, arms of equal active width, and the balance loss it is trained with."""

from __future__ import annotations

import pytest
import torch

from coterie.core.cost import count_parameters
from coterie.core.prediction import Condition
from coterie.recipes import mode_policy
from coterie.runs.build import build_model


def test_published_sizes() -> None:
    """Without vision: 685.8 million parameters, 383.6 of them active with routers."""
    with torch.device("meta"):
        counted = count_parameters(mode_policy.paper().model.build())
    assert counted.total == pytest.approx(685.8e6, rel=0.01)
    assert counted.active == pytest.approx(383.6e6, rel=0.01)


def test_arms_have_equal_active_width() -> None:
    """But for the routers: about 12 % of a small policy, dropped once it is cached."""
    sizes = {arm: count_parameters(build_model(c)) for arm, c in mode_policy.arms().items()}
    routers = {
        arm: sum(
            parameter.numel()
            for name, parameter in build_model(config).named_parameters()
            if ".routers." in name
        )
        for arm, config in mode_policy.arms().items()
    }
    plain = {arm: size.active - routers[arm] for arm, size in sizes.items()}
    assert len(set(plain.values())) == 1 and routers["noise"] == routers["token"] > 0
    assert sizes["noise"].total == sizes["token"].total > 1.4 * sizes["dense"].total


def test_only_noise_levels_route_in_the_first_arm() -> None:
    model = build_model(mode_policy.tiny())
    router = model.backbone.trunk.blocks[0].ffn.config.router
    assert router.routed_unit == "sample" and not router.score_part.reads_rows
    assert {p.mean().item() for n, p in model.named_parameters() if n.endswith("proj.bias")} == {0}
    x, t = torch.zeros(2, 8, 2), torch.tensor([0.1, 5.0])
    cond = Condition(label=torch.tensor([0, -1]), tokens=torch.zeros(2, 1, 4))
    terms = model.aux_losses(model.eval()(x, t, cond).routings)
    assert [term.weight for term in terms] == [pytest.approx(0.01 / 3)] * 3
