"""How networks start: a trunk's ``init_std`` reaches whatever states no start of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones.causal import CausalConfig
from coterie.backbones.trunk import Trunk, TrunkConfig
from coterie.core.errors import ConfigError
from coterie.experts import EXPERTS, SCORES, ExpertLayer, ExpertLayerConfig

WIDTH, STD = 64, 0.006


def trunk(expert: dict[str, Any], init_std: float | None = STD, reuse: int = 1) -> Trunk:
    made = {"num_experts": 4, "experts": {"kind": "swiglu", "hidden": 32}, **expert}
    config = TrunkConfig.from_dict(
        {
            "width": WIDTH, "depth": 2, "heads": 2, "modulation": "none", "init_std": init_std,
            "slots": [{"expert": made, "reuse": reuse}],
        }
    )  # fmt: skip
    torch.manual_seed(0)
    built = Trunk(config, 4)
    built.reset_parameters()
    return built


def spreads(module: nn.Module) -> dict[str, float]:
    """Standard deviation of every matrix."""
    found: dict[str, Tensor] = {
        name: p.detach() for name, p in module.named_parameters() if p.dim() > 1
    }
    return {name: float(value.std()) for name, value in found.items() if "bias" not in name}


FULL: dict[str, Any] = {
    "shared": {"hidden": 16, "count": 2, "gate": "self"},
    "stem": "star",
    "adaptor": 1.0,
    "router": {"score": {"kind": "task_linear", "num_tasks": 2}, "select": "dense"},
    "self_gate": {"by_task": [[0], [1, 2]]},
}


@pytest.mark.parametrize("reuse", [1, 2])
def test_a_trunks_init_std_reaches_experts_routers_and_all_around_them(reuse: int) -> None:
    made = trunk({} if reuse == 2 else FULL, reuse=reuse)
    for name, spread in spreads(made).items():
        assert spread == pytest.approx(STD, rel=0.2), name
    names = " ".join(spreads(made))
    assert "routers.0" in names and ("pools.0" if reuse == 2 else "pool.gate_up") in names
    plain = spreads(trunk(FULL, init_std=None))
    assert all(spread > 3 * STD for name, spread in plain.items()), "Xavier's and Kaiming's rules"


def test_what_states_a_start_of_its_own_keeps_it() -> None:
    experts = {"kind": "swiglu", "hidden": 32, "init_std": 0.5}
    router = {"score": {"kind": "linear", "init_std": 0.25}}
    made = spreads(trunk({"experts": experts, "router": router}).blocks[0].ffn)
    assert made["pool.gate_up"] == pytest.approx(0.5, rel=0.1)
    assert made["routers.0.score.proj.weight"] == pytest.approx(0.25, rel=0.2)
    layer = spreads(trunk({"init_std": 0.1}).blocks[0].ffn)
    assert layer["pool.down"] == pytest.approx(0.1, rel=0.1), "the layer's before the trunk's"
    alone = ExpertLayerConfig.from_dict({"init_std": 0.1}).build(WIDTH)
    assert spreads(alone)["pool.down"] == pytest.approx(0.1, rel=0.1)
    shaken = {"score": {"kind": "uncertain", "of": "linear"}}
    inner = spreads(trunk({"router": shaken}).blocks[0].ffn)["routers.0.score.inner.proj.weight"]
    assert inner == pytest.approx(STD, rel=0.2)


def test_H_init_std_below_0_is_refused_by_every_part_that_has_one() -> None:
    parts = [EXPERTS.get(kind) for kind in EXPERTS.kinds()]
    parts += [SCORES.get(kind) for kind in SCORES.kinds()]
    able = [part for part in parts if "init_std" in part.model_fields]
    assert len(able) >= 8
    for part in [*able, TrunkConfig, ExpertLayerConfig]:
        needs = {"num_tasks": 2} if "num_tasks" in part.model_fields else {}
        with pytest.raises(ConfigError, match="init_std: -1"):
            part.from_dict({**needs, "init_std": -1})


def test_text_networks_start_as_they_say() -> None:
    slots = [{"expert": {"num_experts": 4, "experts": {"kind": "swiglu", "hidden": 32}}}]
    sizes = {"width": WIDTH, "depth": 2, "heads": 2, "modulation": "none", "slots": slots}
    for std in (0.02, 0.0):
        config = CausalConfig.from_dict({"trunk": {**sizes, "init_std": std}})
        for name, spread in spreads(config.build()).items():
            assert spread == pytest.approx(std, rel=0.2), name
    layers = [m for m in config.build().modules() if isinstance(m, ExpertLayer)]
    assert len(layers) == 2
