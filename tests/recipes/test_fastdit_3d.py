"""FastDiT-3D: arms of equal time, experts of equal cost, published sizes, a short run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from coterie.core.config import override
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.rng import generator
from coterie.denoiser import Denoiser
from coterie.metrics import score_points
from coterie.recipes import fastdit_3d
from coterie.runs.build import build_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import load_run
from coterie.runs.training import start

SHORT = {
    "data.num_points": 40,
    "data.count": 12,
    "data.held_out": 6,
    "model.backbone.num_points": 40,
    "model.backbone.voxels": 8,
    "model.backbone.decoder.window": 2,
    "train.steps": 4,
    "train.batch": 3,
    "train.threads": 1,
    "sample.steps": 2,
}


@cache
def built(name: str) -> tuple[RunConfig, Denoiser]:
    config = fastdit_3d.arms()[name]
    return config, build_model(config)


def real_tokens(z: torch.Tensor, ctx: Context) -> int:
    """Tokens of a batch without padding."""
    return len(z) * z.shape[1] if ctx.token_mask is None else int(ctx.token_mask.sum())


def test_arms_train_for_equal_seconds() -> None:
    for name, (_, milliseconds) in fastdit_3d.ARMS.items():
        seconds = built(name)[0].train.steps * milliseconds / 1000
        assert seconds == pytest.approx(fastdit_3d.SECONDS, rel=0.005), name


def test_arms_differ_in_mask_and_experts_only() -> None:
    plain = {
        name: override(built(name)[0], {"model.backbone.mask": {}, "train.steps": 1})
        for name in ("no-mask", "random", "aware")
    }
    assert plain["no-mask"] == plain["random"] == plain["aware"]
    moe = override(built("moe")[0], {"model.backbone.trunk.slots": []})
    assert moe.model == built("aware")[0].model


def test_an_expert_costs_what_it_replaces() -> None:
    dense, moe = (count_parameters(built(name)[1]) for name in ("aware", "moe"))
    assert dense.active < moe.active < 1.01 * dense.active  # the router
    assert moe.total > 1.8 * dense.total


def test_random_keeps_as_many_tokens_as_aware_over_the_noise_of_training() -> None:
    counts = {}
    for name in ("random", "aware"):
        config, model = built(name)
        seen: list[int] = []
        hook = model.backbone.trunk.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(real_tokens(*args))
        )
        batch = build_source(config).get(range(24))
        objective = config.objective.build(model)
        with torch.no_grad():
            objective(model.train(), batch, generator(0, "count"), 0.5)
        hook.remove()
        counts[name] = seen[0] / 24
    assert counts["random"] == pytest.approx(counts["aware"], rel=0.05)
    assert counts["aware"] < 0.2 * 512


def test_paper_is_dit_3d_s_with_a_light_decoder() -> None:
    config = fastdit_3d.paper()
    backbone = config.model.backbone
    assert backbone.tokens == 512 and backbone.grid == (8, 8, 8)
    assert [backbone.decoder.windows(i, backbone.grid) is not None for i in range(4)] == [
        *(False, False, True, True)
    ]
    with torch.device("meta"):
        dense = override(config, {"model.backbone.trunk.slots": []})
        model, plain = config.model.build(), dense.model.build()
    encoder = count_parameters(plain.backbone.trunk).total
    assert encoder == pytest.approx(12 * 18 * 384**2, rel=0.01)  # 18 D^2 of weights in a block
    found = count_parameters(model)
    assert found.active == pytest.approx(count_parameters(plain).total, rel=0.001)
    assert found.total > 1.9 * found.active


def test_a_run_trains_samples_and_is_scored(tmp_path: Path) -> None:
    path = start(override(fastdit_3d.tiny(), SHORT), tmp_path / "run", progress=False)
    run = load_run(path)
    made = generate(run, 6)
    assert made.x.shape == (6, 40, 3) and made.labels.tolist() == [0, 1, 2, 0, 1, 2]
    real = build_source(run.config, "held_out").get(range(6)).x
    scores = score_points(made.x, real, run.source.get(range(12)).x)
    assert scores["n"] == 6 and 0 <= scores["one_nn_cd"]["value"] <= 1
    again = load_run(path)
    assert torch.equal(generate(again, 2).x, made.x[:2])
