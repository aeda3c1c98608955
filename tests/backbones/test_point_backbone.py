"""The point transformer: what it drops in training, that it pays for nothing dropped, and that
nothing is dropped when it samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coterie.backbones import PointsConfig
from coterie.backbones.points import PointTransformer
from coterie.backbones.voxels import voxelise
from coterie.core.batch import Batch
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise, generator
from coterie.denoiser import DenoiserConfig
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample
from coterie.train.objectives import DenoisingConfig

POINTS, L = 60, 64
SMALL: dict[str, Any] = {
    "num_points": POINTS,
    "voxels": 8,
    "patch": 2,
    "trunk": {"width": 24, "depth": 2, "heads": 2},
    "decoder": {"width": 12, "depth": 2, "heads": 2, "window": 2, "window_layers": [1]},
}
FGBG = {"kind": "fgbg", "rf": 0.5, "rb": 0.9}
MOE = {"num_experts": 3, "router": {"select": {"kind": "top_k", "k": 1}}}
MOE["balance"] = [{"kind": "switch", "weight": 0.01}]  # type: ignore[assignment]


def config(mask: Any = FGBG, **changes: Any) -> PointsConfig:
    return PointsConfig.from_dict({**SMALL, "mask": mask, **changes})


def built(*args: Any, std: float = 0.1, **changes: Any) -> PointTransformer:
    """The model with every parameter moved, as after some training."""
    torch.manual_seed(0)
    model = config(*args, **changes).build().double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=rng))
    return model


def clouds(batch: int = 3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(batch, POINTS, 3, generator=rng, dtype=torch.float64)
    x[-1] *= torch.tensor([1.0, 0.02, 1.0])  # a flat one has another foreground
    return x


def context(batch: int = 3, training: bool = True, **changes: Any) -> Context:
    time = torch.linspace(100, 900, batch)
    rng = generator(0, "mask") if training else None
    return Context(batch, 0, time_input=time, training=training, rng=rng).replace(**changes)


def labels(batch: int = 3) -> Condition:
    return Condition(label=torch.arange(batch) % 3)


@pytest.mark.parametrize("mask", [{"kind": "random", "r": 0.0}, {"kind": "fgbg", "rf": 0, "rb": 0}])
def test_dropping_nothing_is_the_unmasked_path_exactly(mask: dict[str, Any]) -> None:
    masked, plain = built(mask).train(), built({"kind": "none"}).train()
    x = clouds()
    a, b = masked(x, context(), labels()), plain(x, context(), labels())
    assert a.visible.all() and b.visible is None
    assert torch.equal(a.sample, b.sample) and a.sample.abs().max() > 0.01


def test_nothing_is_dropped_when_sampling_without_a_generator_or_late() -> None:
    x, plain = clouds(), built({"kind": "none"})
    model = built({**FGBG, "until": 0.8})
    wanted = plain(x, context(training=False), labels()).sample
    early = model(x, context(progress=0.5), labels())
    assert early.visible is not None and not torch.allclose(early.sample, wanted)
    for ctx in (context(training=False), context(rng=None), context(progress=0.9)):
        out = model(x, ctx, labels())
        assert out.visible is None and torch.equal(out.sample, wanted)


def test_each_cloud_keeps_its_own_share_of_foreground_and_background() -> None:
    model = built()
    x = clouds()
    voxels = voxelise(x, 8)
    foreground = model.config.foreground(voxels)
    ids = model.config.mask.draw(foreground, context())
    for row in range(3):
        place = voxels.coordinates[row].round().long() // 2
        by_hand = torch.zeros(4, 4, 4, dtype=torch.bool)
        by_hand[tuple(place.T)] = True
        assert torch.equal(foreground[row], by_hand.flatten())
        kept = ids[row][ids[row] < L]
        n = int(by_hand.sum())
        wanted = max(1, round(0.5 * n)), max(1, round(0.1 * (L - n)))
        inside = int(by_hand.flatten()[kept].sum())
        assert (inside, len(kept) - inside) == wanted
    assert len(set(foreground.sum(1).tolist())) > 1  # so that something was padded


def test_foreground_is_that_of_the_noisy_input() -> None:
    """Noise fills the cube: a flat cloud has more occupied patches after it is noised."""
    model, x = built(), clouds()[-1:]
    noisy = 0.5 * x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    clean, full = (int(model.config.foreground(voxelise(cloud, 8)).sum()) for cloud in (x, noisy))
    assert full >= 1.5 * clean
    seen: list[int] = []
    model.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for cloud in (x, noisy):
        model(cloud, context(1), labels(1))
    assert seen == [round(0.5 * n) + round(0.1 * (L - n)) for n in (clean, full)]


def test_the_encoder_reads_visible_tokens_only() -> None:
    model = built()
    voxels = voxelise(clouds(), 8)
    ctx = context(embedding=torch.randn(3, 24, dtype=torch.float64))
    ids = model.config.mask.draw(model.config.foreground(voxels), ctx)
    before, _ = model._encode(voxels, ids, ctx)
    tokens = model.patches.split(voxels.means).reshape(3, L, -1).clone()
    seen = torch.zeros(3, L + 1, dtype=torch.bool).scatter(1, ids, True)[:, :L]
    tokens[~seen] = 99.0
    changed = model.patches.join(tokens.reshape(3 * L, -1, 3))
    after, _ = model._encode(dataclasses.replace(voxels, means=changed), ids, ctx)
    real = ids < L
    assert torch.equal(before[real], after[real])
    tokens[:, ids[0, 0]] = 99.0
    changed = model.patches.join(tokens.reshape(3 * L, -1, 3))
    after, _ = model._encode(dataclasses.replace(voxels, means=changed), ids, ctx)
    assert (before[0] != after[0]).any()


def test_the_decoder_sees_mask_token_and_position_where_nothing_was_seen() -> None:
    model = built()
    seen: dict[str, torch.Tensor] = {}
    model.trunk.register_forward_hook(lambda m, args, out: seen.update(z=out[0], ctx=args[1]))
    model.decoder.register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
    model(clouds(), context(), labels())
    ids, positions = seen["ctx"].positions, model.decoder_positions
    encoded = model.bridge(model.bridge_norm(seen["z"]))
    for row in range(3):
        kept = {int(token): k for k, token in enumerate(ids[row]) if token < L}
        for token in range(L):
            inner = encoded[row, kept[token]] if token in kept else model.mask_token
            torch.testing.assert_close(seen["h"][row, token], inner + positions[token])


def test_positions_are_added_before_dropping() -> None:
    model = built()
    seen: dict[str, Any] = {}
    model.trunk.register_forward_pre_hook(lambda m, args: seen.update(z=args[0], ctx=args[1]))
    x = clouds()
    model(x, context(), labels())
    ids = seen["ctx"].positions
    patches = model.patches.split(voxelise(x, 8).means).reshape(3, L, -1)
    full = model.patch_in(patches) + model.positions
    for row in range(3):
        kept = ids[row][ids[row] < L]
        torch.testing.assert_close(seen["z"][row, : len(kept)], full[row, kept])


def test_patches_are_a_convolution_with_its_stride() -> None:
    model, x = built(), clouds()
    voxels = voxelise(x, 8)
    kernel = model.patch_in.weight.reshape(24, 2, 2, 2, 3).permute(0, 4, 1, 2, 3)
    grid = voxels.means.transpose(1, 2).reshape(3, 3, 8, 8, 8)
    conv = torch.nn.functional.conv3d(grid, kernel, model.patch_in.bias, stride=2)
    patches = model.patches.split(voxels.means).reshape(3, L, -1)
    torch.testing.assert_close(model.patch_in(patches), conv.flatten(2).transpose(1, 2))


def test_a_cloud_does_not_depend_on_how_full_its_neighbours_are() -> None:
    slot = {"layers": "all", "expert": MOE}
    model = built(trunk={**SMALL["trunk"], "slots": [slot]})
    x = clouds()
    whole = model(x, context(), labels())
    first = model(x[:1], context(1, time_input=context().time_input[:1]), labels(1))
    torch.testing.assert_close(whole.sample[:1], first.sample)
    assert torch.equal(whole.visible[:1], first.visible)


def test_padding_is_never_routed() -> None:
    model = built(trunk={**SMALL["trunk"], "slots": [{"expert": MOE}]})
    x = clouds()
    out = model(x, context(), labels())
    foreground = model.config.foreground(voxelise(x, 8)).sum(1)
    wanted = sum(round(0.5 * n) + round(0.1 * (L - n)) for n in foreground.tolist())
    for routing in out.routings:
        assert routing.mask is not None and int(routing.mask.sum()) == wanted
        assert routing.counts().sum() == wanted < routing.batch[0] * routing.batch[1]


def test_visible_points_lie_in_patches_that_were_kept() -> None:
    model, x = built(), clouds()
    out = model(x, context(), labels())
    voxels = voxelise(x, 8)
    ids = model.config.mask.draw(model.config.foreground(voxels), context())
    place = voxels.coordinates.round().long() // 2
    token = (place[..., 0] * 4 + place[..., 1]) * 4 + place[..., 2]
    for row in range(3):
        assert torch.equal(out.visible[row], torch.isin(token[row], ids[row]))


def test_order_of_points_permutes_the_answer() -> None:
    model, x = built(), clouds()
    order = torch.randperm(POINTS, generator=torch.Generator().manual_seed(3))
    a = model(x, context(training=False), labels()).sample
    b = model(x[:, order], context(training=False), labels()).sample
    torch.testing.assert_close(b, a[:, order])


def test_the_answer_is_zero_at_the_start() -> None:
    model = config().build()
    for training in (True, False):
        out = model(clouds().float(), context(training=training), labels())
        assert out.sample.abs().max() == 0 and out.sample.shape == (3, POINTS, 3)


def test_one_expert_is_a_dense_network() -> None:
    trunk = {**SMALL["trunk"], "mlp": "swiglu", "mlp_hidden": 10}
    one = {"num_experts": 1, "experts": {"kind": "swiglu", "hidden": 10}}
    one["router"] = {"select": {"kind": "top_k", "k": 1}}
    dense, moe = built(trunk=trunk), built(trunk={**trunk, "slots": [{"expert": one}]})
    states = moe.state_dict()
    for name, value in dense.state_dict().items():
        place, _, kind = name.partition(".ffn.")
        if kind and name.startswith("trunk."):
            states[f"{place}.ffn.pool.{kind.removesuffix('.weight')}"] = value[None]
        else:
            states[name] = value
    moe.load_state_dict(states)
    x = clouds()
    for training in (True, False):
        a, b = (model(x, context(training=training), labels()) for model in (dense, moe))
        torch.testing.assert_close(a.sample, b.sample)


def test_attention_of_the_encoder_costs_the_square_of_what_it_sees() -> None:
    def attention(r: float) -> int:
        model = built({"kind": "random", "r": r})
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            counter = FlopCounterMode(display=False)
            with counter:
                model(clouds(), context(), labels())
        counts = counter.get_flop_counts()
        found = counts["PointTransformer.trunk.blocks.0.attention"]
        linear = ("qkv", "out")
        for name in linear:
            part = counts[f"PointTransformer.trunk.blocks.0.attention.{name}"]
            found = {op: found[op] - part.get(op, 0) for op in found}
        return sum(found.values())

    assert attention(0.75) * 16 == attention(0.0) > 0


def test_the_stated_cost_falls_with_what_the_encoder_sees() -> None:
    full, half = (config({"kind": "random", "r": r}) for r in (0.0, 0.5))
    assert (full.visible_tokens(), half.visible_tokens()) == (L, L // 2)
    assert config({"kind": "none"}).multiply_adds() == full.multiply_adds()
    model = full.build()
    encoder = count_parameters(model.trunk).total + count_parameters(model.patch_in).total
    assert full.multiply_adds() - half.multiply_adds() == encoder * L // 2
    aware = config()
    noise = torch.randn(1, POINTS, 3, generator=torch.Generator().manual_seed(0))
    n = int(aware.foreground(voxelise(noise, 8)).sum())
    assert aware.visible_tokens() == round(0.5 * n) + round(0.1 * (L - n))


@pytest.mark.parametrize(
    ("process", "precondition", "view"),
    [
        ({"kind": "ddpm", "schedule": "linear"}, "none", "eps"),
        ("rectified_flow", "none", "flow"),
        ({"kind": "ve"}, "edm", "x0"),
    ],
)
def test_every_process_trains_and_samples(process: Any, precondition: str, view: str) -> None:
    slots = [{"expert": MOE}]
    backbone = config(trunk={**SMALL["trunk"], "slots": slots})
    torch.manual_seed(0)
    model = DenoiserConfig.from_dict(
        {"backbone": backbone, "process": process, "precondition": precondition, "view": view}
    ).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = Batch(clouds(6).float() / 3, labels(6), torch.arange(6))
    objective = DenoisingConfig(support="visible", reconstruction=0.1).build(model)
    losses = objective(model.train(), batch, generator(0, "t"), 0.5)
    losses.total.backward()
    assert set(losses.main) == {"denoising", "reconstruction"} and losses.aux
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    noise = SampleNoise([1, 2])
    start = initial_noise(model.process, (POINTS, 3), noise)
    parts = {"solver": SOLVERS.parse("euler"), "grid": GRIDS.parse("uniform")}
    x = sample(model.eval(), start, labels(2), steps=3, **parts)
    assert x.shape == (2, POINTS, 3) and x.isfinite().all()


@pytest.mark.parametrize(
    ("x", "label", "message"),
    [
        (torch.zeros(2, 59, 3), [0, 1], r"x: \(2, 59, 3\) .*\(60, 3\)"),
        (torch.zeros(2, 0, 3), [0, 1], r"x: \(2, 0, 3\)"),
        (torch.zeros(2, 60, 3), [0, 1], "cloud 0 has all its points in one place"),
        (torch.full((2, 60, 3), float("nan")), [0, 1], "cloud 0 holds NaN"),
        (torch.rand(2, 60, 3), [0, 3], r"label: 3 .*0\.\.2"),
        (torch.rand(2, 60, 3), None, r"cond\.label: None"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x: torch.Tensor, label: Any, message: str) -> None:
    cond = Condition(label=None if label is None else torch.tensor(label))
    with pytest.raises(DataError, match=message):
        config().build()(x, context(2), cond)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "patch: 3 .*voxels = 8"),
        ({"decoder": {"window": 3}}, r"decoder\.window: 3 .*\(4, 4, 4\)"),
        ({"decoder": {"slots": [{"expert": MOE}]}}, r"decoder\.slots: 1 .*trunk\.slots"),
        ({"trunk": {"window": 2}}, r"trunk\.window: 2 .*windows are for the decoder"),
        ({"trunk": {"causal": True}}, r"trunk\.causal: True"),
        ({"decoder": {"rotary": True}}, r"decoder\.rotary: True"),
        ({"mask": {"kind": "fgbg", "rf": 1.5}}, r"mask\.rf: 1\.5"),
        ({"mask": {"kind": "front"}}, r"mask\.kind"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
