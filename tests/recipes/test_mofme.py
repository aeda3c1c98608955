"""MoFME: parameters as published, arms that differ in the feed-forward half only, a short run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.core.config import override
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.data.images.photos import CROP, PhotosConfig
from coterie.data.source import ArraySource
from coterie.denoiser import Denoiser
from coterie.recipes import mofme
from coterie.runs.build import build_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.cost import plan
from coterie.runs.measure.active_parameters import slot_parameters
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

SHORT = {
    "data": {"kind": "weather", "size": 16, "count": 40},
    "model.backbone.image_size": 16,
    "train.steps": 3,
    "train.batch": 4,
    "train.threads": 1,
}


def noisy_photos(self: PhotosConfig, split: str = "train") -> ArraySource:
    data = np.random.default_rng(0).integers(0, 255, (5, 3, CROP, CROP), dtype=np.uint8)
    return ArraySource(
        "photos", "image", data, shape=(3, CROP, CROP), licence="", transform=self.transform
    )


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PhotosConfig, "build", noisy_photos)


@cache
def built(name: str) -> tuple[RunConfig, Denoiser]:
    config = mofme.arms()[name]
    return config, build_model(config)


def weights(name: str) -> int:
    """Of matrices in the feed-forward half of one of the two blocks, biases left out."""
    ffn = built(name)[1].backbone.trunk.blocks[0].ffn
    return sum(p.numel() for key, p in ffn.named_parameters() if "bias" not in key)


def test_the_feed_forward_half_has_the_published_size() -> None:
    d, experts = 96, 8
    router = experts * d
    assert weights("dense") == 8 * d**2
    assert weights("moe") == experts * 8 * d**2 + router
    for name in ("mofme", "plain-router"):
        assert weights(name) == (2 + 2 * experts + 8) * d**2 + router
    # Vectors are called biases: two of them per expert, 2 d E in all.
    assert weights("vectors") == 10 * d**2 + router
    layer = built("vectors")[1].backbone.trunk.blocks[0].ffn
    assert sum(p.numel() for p in layer.pool.parameters()) == 2 * d * experts
    whole = {name: slot_parameters(built(name)[1]) for name in ("mofme", "moe")}
    assert 0.40 < whole["mofme"] / whole["moe"] < 0.45


def test_arms_differ_in_the_feed_forward_half_only() -> None:
    names = list(mofme.arms())
    assert names == ["dense", "moe", "plain-router", "mofme", "vectors"]
    for name in names:
        assert override(built(name)[0], {"model.backbone.trunk.slots": []}) == built("dense")[0]
    plain = {
        k: v.shape for k, v in built("plain-router")[1].state_dict().items() if "score" not in k
    }
    ours = {k: v.shape for k, v in built("mofme")[1].state_dict().items() if "score" not in k}
    assert plain == ours


def test_every_parameter_learns_in_every_arm() -> None:
    for name in mofme.arms():
        config = override(mofme.arms()[name], SHORT)
        model, batch = build_model(config).train(), build_source(config).get(range(12))
        losses = config.objective.build(model)(model, batch, generator(0, "test"), 0.5)
        losses.total.backward()
        idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == [], name


def test_the_cost_of_a_picture_counts_convolutions_at_every_pixel() -> None:
    config = built("dense")[0]
    counts: list[int] = []

    def count(module: torch.nn.Module, given: object, out: torch.Tensor) -> None:
        channels = out.shape[1] if out.dim() == 4 else out.shape[-1]
        counts.append(module.weight.numel() * (out.numel() // channels))

    model = build_model(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 64, 64), torch.zeros(1), Condition())
    backbone = config.model.backbone
    # Biases and norms, which multiply nothing, are the rest.
    assert sum(counts) < backbone.multiply_adds() < 1.03 * sum(counts)
    planned = plan(config, measure=False)
    assert planned["flops_per_step"] == 6 * backbone.multiply_adds() * 12


def test_presets_for_machines_that_are_larger() -> None:
    paper, gpu = mofme.paper(), mofme.gpu()
    with torch.device("meta"):
        blocks = [c.model.build().backbone.trunk.blocks[0].ffn for c in (paper, gpu)]
    for ffn in blocks:
        assert (ffn.width, ffn.pool.num_experts, ffn.config.router.select.k) == (384, 8, 2)
    assert paper.data.kind == "pairs-folder" and paper.data.size == paper.model.backbone.image_size
    assert gpu.data.size == gpu.model.backbone.image_size == 96
    assert paper.train.lr_at(paper.train.steps) == pytest.approx(1e-6)


def test_a_run_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = override(mofme.tiny(), {**SHORT, "train.checkpoint_every": 2})
    whole = load_run(start(config, tmp_path / "whole", progress=False), "model").model
    half = config.replace(train=config.train.replace(steps=3))
    path = start(half, tmp_path / "half", progress=False)
    newest = max(path.glob("checkpoints/step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    again = load_run(start(config, path, progress=False), "model").model
    before, after = whole.state_dict(), again.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias


def convolution(inputs: int, outputs: int) -> int:
    return 9 * inputs * outputs + outputs


def test_C11_the_paper_preset_is_the_published_network() -> None:
    """Parameters of the released classes (what they never use left out), part by part."""
    d, experts, inner, stem, tail = 384, 8, 8 * 64, 32, 128
    head = convolution(3, stem) + 4 * convolution(stem, stem)
    patches = linear(stem * 64, d) + 2 * d
    attention = 2 * d + linear(d, 3 * inner, bias=False) + linear(inner, d)
    shared = 2 * d + 2 * linear(d, d) + linear(d, 4 * d) + linear(4 * d, d)
    block = attention + shared + linear(d, experts) + experts * 2 * linear(d, d)
    out = linear(d, 64 * tail)
    half = tail // 2
    ends = 2 * convolution(tail, tail) + convolution(tail, half)
    ends += 2 * convolution(half, half) + convolution(half, 3)
    with torch.device("meta"):
        model = mofme.paper().model.build()
    assert sum(p.numel() for p in model.parameters()) == head + patches + 2 * block + out + ends
    backbone = model.backbone
    for place in backbone.trunk.blocks:
        norms, attends, ffn = (place.norm1, place.norm2), place.attention, place.ffn
        assert {norm.eps for norm in norms} == {backbone.patch_norm.eps} == {1e-5}
        assert (attends.heads, attends.head_width, attends.dropout) == (8, 64, 0.1)
        assert (ffn.adaptor.activation, ffn.adaptor.dropout) == ("gelu", 0.1)
        assert ffn.router(0).score.inner.proj.bias is not None
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.padding_mode for m in convolutions} == {"zeros"} and len(convolutions) == 12
