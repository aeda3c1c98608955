"""Adaptive feature aggregation: networks in lockstep, their features weighed pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones import DiTConfig, SlotConfig, TrunkConfig, UNetConfig
from coterie.backbones.taps import Tap, finish, lockstep
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.denoiser import DenoiserConfig
from coterie.ensembles import (
    AggregateConfig,
    AggregatorConfig,
    EnsembleModelConfig,
    MemberConfig,
    Members,
)
from coterie.experts import ExpertLayerConfig
from coterie.hub import load_ensemble, load_manifest, load_pretrained, save_ensemble
from coterie.inspect import Trace

SIZES = AggregatorConfig(width=8, layers=1, heads=2, groups=4)
TRUNK = TrunkConfig(width=16, depth=2, heads=2)
DIT = DenoiserConfig(backbone=DiTConfig(image_size=8, patch=2, trunk=TRUNK))
UNET = DenoiserConfig(backbone=UNetConfig(image_size=8, widths=(8, 16), attention=(1,)))
KINDS = pytest.mark.parametrize("config", [DIT, UNET], ids=["dit", "unet"])
LABELS = torch.tensor([0, 3, -1, 9])


def moved(model: nn.Module, seed: int, std: float = 0.1) -> Any:
    """Every parameter drawn, as after some training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def networks(config: DenoiserConfig, count: int = 3) -> list[Any]:
    return [moved(config.build(), seed) for seed in range(count)]


def asked(seed: int = 0, batch: int = 4) -> tuple[Tensor, Tensor, Condition]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 8, 8, generator=rng)
    return x, torch.rand(batch, generator=rng), Condition(label=LABELS[:batch])


def aggregate(members: Any, **changes: Any) -> Any:
    return AggregateConfig.from_dict({"aggregator": SIZES, **changes}).build(members)


@KINDS
@torch.no_grad()
def test_layer_by_layer_is_forward_to_the_bit(config: DenoiserConfig) -> None:
    network, seen = networks(config, 1)[0], []

    def watch(taps: Any) -> list[Tensor]:
        seen.append(taps[0])
        return [tap.feature for tap in taps]

    (answer,) = lockstep([network.layers(*asked())], watch)
    assert torch.equal(answer.value, network(*asked()).value)
    points = network.topology().points
    assert [tap.name for tap in seen] == [point.name for point in points]
    for tap, point in zip(seen, points, strict=True):
        assert isinstance(tap, Tap) and tap.tokens is not None
        assert tap.feature.shape[1 if point.grid is None else 2] == point.channels


@KINDS
@torch.no_grad()
def test_it_begins_as_the_mean_of_the_features(config: DenoiserConfig) -> None:
    members = networks(config)
    begun, mean = aggregate(members), aggregate(members, gate="uniform")
    answer = begun(*asked())
    assert torch.equal(answer.value, mean(*asked()).value)
    assert all(torch.equal(r.gates, torch.full_like(r.gates, 1 / 3)) for r in answer.routings)
    apart = torch.stack([member(*asked()).value for member in members]).mean(0)
    assert not torch.allclose(answer.value, apart)  # the mean of features is not that of answers
    answers = aggregate(members, gate="uniform", points=())(*asked()).value
    assert torch.allclose(answers, apart, atol=1e-6)


@KINDS
@torch.no_grad()
def test_equal_members_are_one_whatever_the_weights(config: DenoiserConfig) -> None:
    one = networks(config, 1)[0]
    same = aggregate({"a": one, "b": one, "c": one})
    moved(same.aggregators, 7)
    answer = same(*asked())
    assert max((r.gates - 1 / 3).abs().max() for r in answer.routings) > 0.01
    assert torch.allclose(answer.value, one(*asked()).value, atol=1e-6)


class Chosen(nn.Module):
    """A gate that follows one member."""

    def __init__(self, member: int) -> None:
        super().__init__()
        self.member = member

    def forward(self, features: Tensor, *told: Any) -> Tensor:
        logits = torch.zeros(features.shape[:2])
        logits[:, self.member] = 1e4
        return logits[:, :, None, None]


@KINDS
@torch.no_grad()
def test_a_certain_gate_is_that_member_alone(config: DenoiserConfig) -> None:
    members = networks(config)
    for index, member in enumerate(members):
        fused = aggregate(members)
        fused.aggregators = nn.ModuleList(Chosen(index) for _ in fused.fused)
        gap = fused(*asked()).value - member(*asked()).value
        assert gap.abs().max() < 1e-6  # 0, but for kernels that depend on how maps lie in memory


@KINDS
@torch.no_grad()
def test_swapped_members_with_their_weights_answer_the_same(config: DenoiserConfig) -> None:
    members, order = networks(config), [2, 0, 1]
    fused = aggregate(members)
    moved(fused.aggregators, 7)
    swapped = aggregate([members[index] for index in order])
    swapped.aggregators.load_state_dict(fused.aggregators.state_dict())
    for part in swapped.aggregators:
        read = part.conv_in.weight.unflatten(1, (3, -1))[:, order]
        part.conv_in.weight.copy_(read.flatten(1, 2))
        part.conv_out.weight.copy_(part.conv_out.weight[order])
    first, second = fused(*asked()), swapped(*asked())
    assert torch.allclose(first.value, second.value, atol=1e-6)
    for one, other in zip(first.routings, second.routings, strict=True):
        assert torch.allclose(one.gates[:, order], other.gates, atol=1e-6)


@KINDS
@torch.no_grad()
def test_weights_are_a_routing_of_every_point(config: DenoiserConfig) -> None:
    fused = aggregate(networks(config))
    moved(fused.aggregators, 7)
    answer = fused(*asked())
    assert [r.name for r in answer.routings] == [p.name for p in fused.topology.points]
    for layer, routing in enumerate(answer.routings):
        assert (routing.slot, routing.layer, routing.unit) == ("ensemble", layer, "token")
        assert routing.gates.shape == (4 * routing.grid[0] * routing.grid[1], 3)
        assert torch.allclose(routing.gates.sum(1), torch.ones(len(routing.gates)))
    trace = Trace()
    trace.add(answer.routings)
    assert len(trace) == len(fused.fused)


@KINDS
def test_aggregators_alone_learn_and_all_of_them_from_the_second_step(
    config: DenoiserConfig,
) -> None:
    fused = aggregate(networks(config)).train()
    before = {name: value.clone() for name, value in fused.networks.state_dict().items()}
    learnt = [p for p in fused.parameters() if p.requires_grad]
    assert {id(p) for p in learnt} == {id(p) for p in fused.aggregators.parameters()}
    optimiser = torch.optim.SGD(learnt, lr=1.0)
    ends = {f"{index}.conv_out.weight" for index in range(len(fused.fused))}
    for step in range(2):
        optimiser.zero_grad()
        fused(*asked()).value.square().mean().backward()
        got = {n for n, p in fused.aggregators.named_parameters() if p.grad.abs().sum() > 0}
        if step == 0:
            assert got == ends  # what follows a zero weight hears nothing of what is before it
        optimiser.step()
    for index in range(len(fused.fused)):
        assert any(name.startswith(f"{index}.conv_in") for name in got)
    assert all(torch.equal(before[n], v) for n, v in fused.networks.state_dict().items())
    assert not any(part.training for part in fused.networks.modules())


@KINDS
def test_parameters_are_counted_by_the_formula(config: DenoiserConfig) -> None:
    fused = aggregate(networks(config))
    told = fused.topology
    for point, part in zip(told.points, fused.aggregators, strict=True):
        made = SIZES.parameters(point.channels, 3, told.time_width, told.condition_width)
        assert made == sum(p.numel() for p in part.parameters())


def test_the_published_aggregators_have_45_million_parameters() -> None:
    """Stable Diffusion 1.5, three experts: 25 points, d = 128, 2 layers, 8 heads."""
    down = [320] * 3 + [640] * 3 + [1280] * 5
    up = [1280] * 6 + [640] * 3 + [320] * 2
    channels = [320, *down, 1280, *up, 4]
    assert len(channels) == 25
    total = sum(AggregatorConfig().parameters(c, 3, 1280, 768) for c in channels)
    assert total == 45_132_416


@torch.no_grad()
def test_it_costs_all_members_and_the_aggregators() -> None:
    members = networks(UNET, 2)
    fused = aggregate(members)

    def cost(model: Any) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counted:
            model()
        return int(counted.get_total_flops())

    alone = sum(cost(lambda m=member: finish(m.layers(*asked()))) for member in members)
    mean = cost(lambda: aggregate(members, gate="uniform")(*asked()))
    whole = cost(lambda: fused(*asked()))
    assert mean == alone < whole
    config = EnsembleModelConfig(
        ensemble=fused.config,
        members=tuple(MemberConfig(name=name, model=UNET) for name in "ab"),
    )
    assert config.multiply_adds() == whole // 2 // 4


@torch.no_grad()
def test_some_points_only_and_one_weight_per_step() -> None:
    members = networks(UNET, 2)
    fused = aggregate(members, points=("mid", "up.*"))
    assert list(fused.fused) == ["mid", "up.0.0", "up.0.1", "up.1.0", "conv_out"]
    step = aggregate(members, gate="step")
    moved(step.aggregators, 3, std=1.0)
    x, _, cond = asked()
    t = torch.tensor([0.2, 0.2, 0.9, 0.9])
    gates = step(x, t, cond).routings[0].gates.unflatten(0, (4, -1))
    assert torch.equal(gates, gates[:, :1].expand_as(gates))  # nowhere else than anywhere
    assert torch.equal(gates[0], gates[1]) and not torch.allclose(gates[0], gates[2])


@torch.no_grad()
def test_members_with_experts_inside_keep_their_routings_apart() -> None:
    slot = SlotConfig(slot="conv", names=("mid_block.*conv1",), expert=ExpertLayerConfig.from_dict(
        {"experts": "conv", "num_experts": 2, "router": {"unit": "sample"}}
    ))  # fmt: skip
    members = networks(UNET.replace(backbone=UNET.backbone.replace(slots=(slot,))), 2)
    alone = finish(members[1].layers(*asked()))
    assert torch.equal(alone.value, members[1](*asked()).value)
    made = aggregate(members, points=())(*asked()).routings
    inner = [r for r in made if r.slot == "expert 1/conv"]
    assert len(inner) == len(alone.routings) > 0
    assert torch.equal(inner[0].ids, alone.routings[0].ids)


@torch.no_grad()
def test_both_branches_of_guidance_have_weights_of_their_own() -> None:
    fused = aggregate(networks(DIT, 2))
    moved(fused.aggregators, 7)
    x, t, cond = asked()
    null = cond.as_null(4)
    both = fused.paired(x, t, cond, null)
    assert torch.allclose(both.value[:4], fused(x, t, cond).value, atol=1e-6)
    assert torch.allclose(both.value[4:], fused(x, t, null).value, atol=1e-6)


def test_files_hold_every_member_and_the_aggregators(tmp_path: Path) -> None:
    fused = aggregate(networks(UNET, 2))
    moved(fused.aggregators, 7)
    path = save_ensemble(fused, tmp_path / "fused")
    assert len(load_manifest(path).members) == 2
    with torch.no_grad():
        again = load_pretrained(path)
        assert torch.equal(again(*asked()).value, fused(*asked()).value)
    with pytest.raises(ConfigError, match="members: 'read when needed'"):
        load_ensemble(path, resident=1)


REFUSED: dict[str, tuple[Any, str]] = {
    "width": (
        lambda: [DIT, DIT.replace(backbone=DIT.backbone.replace(trunk=TRUNK.replace(width=32)))],
        "members.expert 1: point patch_in: 'patch_in of 32 channels",
    ),
    "depth": (
        lambda: [DIT, DIT.replace(backbone=DIT.backbone.replace(trunk=TRUNK.replace(depth=3)))],
        "members.expert 1: point block.2: 'block.2 of 16 channels",
    ),
    "process": (
        lambda: [DIT, DIT.replace(process="vp_linear")],
        "members.expert 1.process: ",
    ),
    "view": (lambda: [DIT, DIT.replace(view="eps")], "members.expert 1.view: 'eps'"),
    "classes": (
        lambda: [DIT, DIT.replace(backbone=DIT.backbone.replace(num_classes=0))],
        "members.expert 1: condition_width: 0",
    ),
    "shape": (
        lambda: [UNET, UNET.replace(backbone=UNET.backbone.replace(image_size=16))],
        "members.expert 1.sample_shape: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_members_that_differ_are_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        aggregate([config.build() for config in make()])
    assert message in str(error.value)


def test_bad_settings_are_refused_by_name() -> None:
    members = networks(DIT, 2)
    with pytest.raises(ConfigError, match=r"members\.expert 1: .*every member"):
        aggregate([members[0], None])
    with pytest.raises(ConfigError, match=r"points: 'mid'.*patch_in, block\.0"):
        aggregate(members, points=("mid",))
    with pytest.raises(ConfigError, match=r"heads: 3"):
        AggregatorConfig.from_dict({"width": 8, "heads": 3})
    with pytest.raises(ConfigError, match="router: "):
        AggregateConfig().build(members, router=nn.Identity())
    spaces = Members(
        {"a": members[0], "b": members[1]},
        traits={"a": {"space": "latents"}, "b": {"space": "data"}},
    )
    with pytest.raises(ConfigError, match=r"members\.b\.space: 'data'"):
        aggregate(spaces)
    x, t, _ = asked()
    with pytest.raises(DataError):
        aggregate(members)(x, t, Condition())
    with pytest.raises(DataError, match="lockstep: network 1"):
        other = networks(UNET, 1)[0]
        lockstep([members[0].layers(*asked()), other.layers(*asked())], lambda taps: [])
