"""A folded denoiser is the denoiser at the times of a schedule, and refuses to be anything else."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.backbones import SlotConfig
from coterie.backbones.points import PointsConfig
from coterie.backbones.unet import UNetConfig
from coterie.cache import CachedDenoiser, cost, fold_by_step, measure
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.core.tensors import module_tensors, read_tensors, write_tensors
from coterie.denoiser import DenoiserConfig
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, guide, sample
from small_models import IMAGES, images, small, with_slots, woken

TIMES = torch.linspace(1.0, 0.1, 7, dtype=torch.float64)
LAYER: dict[str, Any] = {
    "num_experts": 4,
    "experts": {"kind": "swiglu", "hidden": 16},
    "shared": {"hidden": 16},
    "router": {
        "score": {"kind": "noise_level", "hidden": 32, "init_std": 0.3},
        "select": {"kind": "random", "k": 2},
        "weight": "renorm",
    },
}


def model(std: float = 0.1, reuse: int = 1, slot: str = "ffn", **fields: Any) -> Any:
    """A small DiT whose experts are chosen by the noise level."""
    layer = SlotConfig.from_dict({"slot": slot, "reuse": reuse, "expert": {**LAYER, **fields}})
    return woken(with_slots(small("dit-moe"), layer), std=std)


def unet() -> Any:
    pytest.importorskip("diffusers")
    router = {"score": {"kind": "noise_level", "init_std": 0.3}, "select": {"kind": "top_k"}}
    expert = {"num_experts": 3, "experts": "conv", "router": router}
    slot = {"slot": "conv", "names": ["*.conv2"], "expert": expert}
    backbone = UNetConfig.from_dict(
        {"image_size": 8, "widths": (8, 16), "groups": 4, "slots": [slot]}
    )
    return wake(DenoiserConfig(backbone=backbone).build())


def points() -> Any:
    trunk = {"width": 16, "depth": 2, "heads": 2, "slots": [{"expert": LAYER}]}
    backbone = PointsConfig.from_dict(
        {
            "num_points": 32,
            "voxels": 4,
            "trunk": trunk,
            "decoder": {"width": 16, "depth": 1, "heads": 2},
            "mask": {"kind": "random", "r": 0.5},
        }
    )
    return wake(DenoiserConfig(backbone=backbone).build())


def wake(made: Any) -> Any:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return made.eval()


MODELS = {
    "ffn": model,
    "pre_block": lambda: model(slot="pre_block"),
    "shared pool": lambda: model(reuse=2),
    "rounds": lambda: model(rounds=2),
    "switch-dit": lambda: woken(small("switch-dit")),
    "dtr": lambda: woken(small("dtr")),
    "unet": unet,
    "points": points,
}


def schedule(made: Any) -> Tensor:
    process = made.process
    return torch.linspace(process.t_max, process.t_min, 5, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_same_answers_at_every_step(name: str) -> None:
    made = MODELS[name]()
    times = schedule(made)
    folded = fold_by_step(made, times)
    assert not any("pool" in key for key, _ in folded.named_parameters() if "shared" not in key)
    x = torch.randn(3, *made.config.backbone.sample_shape, generator=torch.Generator())
    cond = Condition(label=torch.tensor([0, 2, -1]))
    for t in [*times.float(), times.float()[[3, 0, 3]]]:
        expected = made(x, t.expand(3), cond)
        answer = folded(x, t.expand(3), cond)
        torch.testing.assert_close(answer.value, expected.value, atol=1e-5, rtol=1e-5)
        assert answer.view == expected.view
        assert len(answer.routings) == len(expected.routings) > 0
        for one, other in zip(answer.routings, expected.routings):
            assert torch.equal(one.ids, other.ids)
            assert (one.slot, one.layer, one.name, one.round, one.pool_layers) == (
                *(other.slot, other.layer, other.name, other.round),
                other.pool_layers,
            )


@pytest.mark.parametrize("name", ["ffn", "switch-dit", "dtr"])
@torch.no_grad()
def test_the_same_answers_in_float64(name: str) -> None:
    made = MODELS[name]().double()
    times = schedule(made)
    folded = fold_by_step(made, times)
    batch = images(len(times))
    expected = made(batch.x.double(), times, batch.cond)
    answer = folded(batch.x.double(), times, batch.cond)
    torch.testing.assert_close(answer.value, expected.value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_guided_samples_are_the_same(solver: str) -> None:
    made = model()
    grid, guidance = GRIDS.parse("uniform"), GuidanceConfig(weight=2.0)
    cond = Condition(label=torch.tensor([1, 4]))
    folded = fold_by_step(made, grid.build(made.process, 5))
    results = [
        sample(
            guide(one, guidance),
            SampleNoise([0, 1]).normal((1, 8, 8)),
            cond,
            solver=SOLVERS.parse(solver),
            grid=grid,
            steps=5,
        )
        for one in (made, folded)
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_empty_batch_is_answered() -> None:
    folded = fold_by_step(model(), TIMES)
    nobody = Condition(label=torch.zeros(0, dtype=torch.long))
    answer = folded(torch.zeros(0, 1, 8, 8), TIMES[:0].float(), nobody)
    assert answer.value.shape == (0, 1, 8, 8)


def test_a_gradient_flows_to_the_sample() -> None:
    made = model()
    folded = fold_by_step(made, TIMES)
    grads = []
    for one in (made, folded):
        x = images(2).x.requires_grad_()
        one(x, TIMES[:2].float(), images(2).cond).value.square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_a_saved_and_loaded_model_folds_to_the_same(tmp_path: Path) -> None:
    made, other = model(), model(std=0.3)
    write_tensors(tmp_path / "model.safetensors", module_tensors(made))
    other.load_state_dict(read_tensors(tmp_path / "model.safetensors"))
    batch, t = images(3), TIMES[:3].float()
    one, two = fold_by_step(made, TIMES), fold_by_step(other, TIMES)
    assert torch.equal(one(batch.x, t, batch.cond).value, two(batch.x, t, batch.cond).value)


def train_a_step(made: Any) -> None:
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    batch = images(2)
    made(batch.x, TIMES[:2].float(), batch.cond).value.square().sum().backward()
    optimiser.step()


@torch.no_grad()
def one_number(made: Any) -> None:
    made.backbone.trunk.blocks[0].ffn.routers[0].score.proj.bias[0] += 1


CHANGES = {
    "a training step": train_a_step,
    "loaded weights": lambda made: made.load_state_dict(made.state_dict()),
    "other tensors": lambda made: made.load_state_dict(
        {name: value.clone() for name, value in made.state_dict().items()}, assign=True
    ),
    "one number": one_number,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_refused(name: str) -> None:
    made = model()
    folded = fold_by_step(made, TIMES)
    batch, t = images(2), TIMES[:2].float()
    folded(batch.x, t, batch.cond)
    CHANGES[name](made)
    with pytest.raises(ConfigError, match="weights have changed since; fold again"):
        folded(batch.x, t, batch.cond)


def test_a_model_that_trains_is_refused_before_and_after() -> None:
    made = model()
    folded = fold_by_step(made, TIMES)
    made.train()
    batch, t = images(2), TIMES[:2].float()
    with pytest.raises(ConfigError, match="training: True is not allowed"):
        folded(batch.x, t, batch.cond)
    with pytest.raises(ConfigError, match=r"call eval\(\) first"):
        fold_by_step(made, TIMES)
    with pytest.raises(ConfigError, match="the cache is for sampling"):
        folded.train()
    made.eval()
    folded.eval()(batch.x, t, batch.cond)


def test_a_time_between_two_steps_is_refused() -> None:
    folded = fold_by_step(model(), TIMES)
    batch = images(2)
    wrong = TIMES[:2].float() + torch.tensor([0.0, 1e-6])
    with pytest.raises(ConfigError, match=r"t: 0\.85.* 1, 0\.85, 0\.7, 0\.55, \.\.\. \(7 times\)"):
        folded(batch.x, wrong, batch.cond)


@pytest.mark.parametrize(
    ("denoiser", "times", "reason"),
    [
        (lambda: woken(small("dit-moe")), TIMES, r"blocks\.0\.ffn: score: 'linear'"),
        (lambda: woken(small("dit")), TIMES, "a model with experts"),
        (lambda: guide(model(), GuidanceConfig(weight=2.0)), TIMES, "cache the model, then guide"),
        (model, [], "a vector of at least one time"),
        (model, [0.5, float("nan")], "finite times"),
        (model, [0.0], "no time without noise"),
        (model, torch.arange(3), "a vector of at least one time"),
    ],
)
def test_what_cannot_be_folded_is_refused(denoiser: Any, times: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        fold_by_step(denoiser(), times)


@pytest.mark.parametrize("name", IMAGES)
def test_recipes_fold_where_the_noise_level_decides(name: str) -> None:
    made = woken(small(name))
    if name.partition(":")[0] in {"dtr", "switch-dit"}:
        assert isinstance(fold_by_step(made, schedule(made)), CachedDenoiser)
    else:
        with pytest.raises(ConfigError):
            fold_by_step(made, schedule(made))


def test_unused_experts_are_freed_with_the_denoiser() -> None:
    made = model()
    folded = fold_by_step(made, TIMES)
    pool = weakref.ref(made.backbone.trunk.blocks[0].ffn.pool)
    batch, t = images(2), TIMES[:2].float()
    before = folded(batch.x, t, batch.cond).value
    del made
    gc.collect()
    assert pool() is None
    assert torch.equal(folded(batch.x, t, batch.cond).value, before)
    with pytest.raises(ConfigError, match="still held"):
        cost(folded)


def test_cost_counts_what_is_executed() -> None:
    """Per block and token 2 D F 3 multiply-adds for each of k experts, routers once per sample."""
    made = model(shared=None)
    saved = cost(fold_by_step(made, TIMES))
    width, hidden, experts, inner = 64, 16, 4, 32
    routers = 2 * (width * inner + inner * experts)
    each = 16 * 3 * width * hidden  # 16 tokens
    assert saved.flops_without - saved.flops_with == 2 * 2 * routers / 2
    assert saved.flops_all_experts - saved.flops_without == 2 * 2 * (experts - 2) * each
    assert saved.flops_saved == 1 - saved.flops_with / saved.flops_without
    assert saved.parameters_without == sum(p.numel() for p in made.parameters())
    assert made.backbone.trunk.blocks[0].ffn.config.dispatch == "auto"


def test_parameters_of_fixed_choices_are_those_of_the_experts_in_use() -> None:
    """One window for the whole schedule: two layers keep one expert of four each, no router."""
    router = {
        "score": "noise_window",
        "probability": "identity",
        "select": {"kind": "top_k", "k": 1},
        "weight": "one",
    }
    made = model(router=router, shared=None)
    saved = cost(fold_by_step(made, [1.0, 0.999]))
    assert saved.parameters_without - saved.parameters_with == 2 * 3 * (3 * 64 * 16)


def test_time_is_measured_for_both() -> None:
    made = model()
    taken = measure(fold_by_step(made, TIMES[:2]), rounds=3)
    assert set(taken) == {"without_ms", "with_ms", "ratio"}
    assert min(taken.values()) > 0
