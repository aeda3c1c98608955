"""What routers read beside experts: the stream, or its norm without modulation, with the time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.backbones import DiTConfig
from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition
from coterie.denoiser import DenoiserConfig
from coterie.experts import ExpertLayerConfig
from coterie.recipes import get_recipe
from coterie.runs.build import build_model

WIDTH = 8
SWIGLU = {"kind": "swiglu", "hidden": 6}


def denoiser(slot: str = "ffn", **expert: Any) -> Any:
    made = {"num_experts": 4, "experts": SWIGLU, **expert}
    slots = [{"slot": slot, "expert": made}]
    trunk = {"width": WIDTH, "depth": 2, "heads": 2, "slots": slots}
    backbone = DiTConfig.from_dict({"image_size": 4, "patch": 2, "num_classes": 3, "trunk": trunk})
    torch.manual_seed(0)
    model = DenoiserConfig(backbone=backbone).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ask(model: Any, times: tuple[float, float] = (0.2, 0.7)) -> Any:
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor(times), Condition(label=torch.tensor([1, 2])))


@pytest.mark.parametrize("slot", ["ffn", "pre_block"])
def test_a_router_reads_the_normalised_stream_without_its_modulation(slot: str) -> None:
    model = denoiser(slot, router_reads="normalised")
    seen: dict[str, Tensor] = {}
    block = model.backbone.trunk.blocks[1]
    norm = block.norm2 if slot == "ffn" else block.norm1
    norm.register_forward_hook(lambda _, given, out: seen.setdefault("normal", out))
    layer = getattr(block, slot)
    layer.register_forward_pre_hook(lambda _, given: seen.update(read=given[0]))
    routing = ask(model).routings[-1]
    normal = seen["normal"].flatten(0, 1)
    torch.testing.assert_close(routing.inputs, normal)
    assert routing.inputs.std(dim=1).sub(1).abs().max() < 0.1
    assert not torch.allclose(seen["read"].flatten(0, 1), normal, atol=1e-2), "experts read another"


def test_the_time_is_joined_to_what_a_router_reads() -> None:
    model = denoiser(router_reads="normalised", router_reads_time=True)
    score = model.backbone.trunk.blocks[0].ffn.router(0).score
    assert score.proj.weight.shape == (4, 2 * WIDTH)
    routing = ask(model).routings[0]
    time = model.backbone.time(model.process.time_input(torch.tensor([0.2, 0.7])).float())
    torch.testing.assert_close(routing.inputs[:, WIDTH:], time.repeat_interleave(4, dim=0))
    routing.logits.square().sum().backward()
    assert (score.proj.weight.grad.abs().amax(0) > 0).all()
    with torch.no_grad():
        score.proj.weight[:, :WIDTH] = 0.0  # the time alone decides
    routing = ask(model, (0.2, 0.2)).routings[0]
    assert (routing.logits == routing.logits[0]).all()


@pytest.mark.parametrize("reads", ["input", "stream", "normalised"])
@pytest.mark.parametrize("slot", ["ffn", "pre_block"])
def test_every_reading_trains_and_the_router_learns(slot: str, reads: str) -> None:
    model = denoiser(slot, router_reads=reads, router_reads_time=True).train()
    ask(model).value.square().sum().backward()
    for block in model.backbone.trunk.blocks:
        assert getattr(block, slot).router(0).score.proj.weight.grad.abs().max() > 0


def test_prototypes_live_among_what_the_router_reads() -> None:
    router = {"score": "cosine", "probability": "identity"}
    balance = ["contrastive"]
    made = denoiser(
        router=router, balance=balance, router_reads="normalised", router_reads_time=True
    )
    prediction = ask(made.train())
    assert prediction.routings[0].prototypes.shape == (4, 2 * WIDTH)
    assert all(aux.value.requires_grad for aux in made.aux_losses(prediction.routings))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_reads": "normalised", "rounds": 2}, r"router_reads: 'normalised' .*later rounds"),
        (
            {"router_reads_time": True, "router": {"score": "noise_level"}},
            r"router_reads_time: True .*its score reads no rows",
        ),
        (
            {"router_reads": "normalised", "experts": "conv", "router": {"unit": "sample"}},
            r"router_reads: 'normalised' .*only slots of a trunk have a stream and its norm",
        ),
    ],
)
def test_readings_that_reach_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertLayerConfig.from_dict({"num_experts": 4, "experts": SWIGLU, **fields})


def test_hosts_that_cannot_give_it_say_so() -> None:
    from coterie.backbones import SlotConfig
    from coterie.backbones.causal import CausalConfig
    from coterie.backbones.hosting import check_slot

    expert = {"num_experts": 4, "experts": SWIGLU, "router_reads": "normalised"}
    slot = SlotConfig.from_dict({"slot": "ffn", "names": ["*"], "expert": expert})
    with pytest.raises(ConfigError, match=r"expert\.router_reads: 'normalised' .*only slots of a"):
        check_slot(slot)
    layer = ExpertLayerConfig.from_dict(expert).build(WIDTH)
    with pytest.raises(ConfigError, match=r"router_reads: 'normalised' .*only slots of a trunk"):
        layer(torch.randn(2, 3, WIDTH), Context(2, 3))
    timed = {"expert": {"num_experts": 4, "experts": SWIGLU, "router_reads_time": True}}
    with pytest.raises(ConfigError, match=r"router_reads_time.*tells routers no time_embedding"):
        CausalConfig.from_dict(
            {"trunk": {"width": 8, "heads": 2, "modulation": "none", "slots": [timed]}}
        )


@pytest.mark.parametrize("recipe", ["dit-moe", "promoe"])
def test_the_arm_of_a_recipe_builds_and_trains(recipe: str) -> None:
    found = get_recipe(recipe)
    assert any(claim.ours == "normalised-router" for claim in found.claims)
    config = found.arms()["normalised-router"]
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(step))
        cond = Condition(label=torch.tensor([1, 2, 3, -1]))
        prediction = model(x, torch.tensor([0.1, 0.4, 0.6, 0.9]), cond)
        aux = sum(one.weight * one.value for one in model.aux_losses(prediction.routings))
        loss = (prediction.value - x).square().mean() + aux
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
    (reads,) = {slot.expert.router_reads for slot in config.model.backbone.trunk.slots}
    assert reads == "normalised"
