"""Reports and measures of finished runs, images and text; probes that leave a model as it was."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coterie.core.rng import generator
from coterie.core.routing import Routing
from coterie.experts import Router
from coterie.runs import feature_networks
from coterie.runs.build import build_source
from coterie.runs.judges import base, noise
from coterie.runs.measure import evaluation, report, routing_probes
from coterie.runs.trained_run import LoadedRun, load_run
from coterie.train.config import TrainConfig
from small_models import images, small, times, woken
from small_runs import finished

QUICK = TrainConfig(steps=5, batch=32, lr=2e-3, ema=(0.9,), threads=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A feature network of five steps, and few samples; the code is the real one."""
    monkeypatch.setattr(feature_networks, "SETTINGS", QUICK)
    monkeypatch.setattr(report, "SCORED", 60)
    monkeypatch.setattr(report, "SHOWN", 8)
    monkeypatch.setattr(noise, "LEVELS", 3)
    few = partial(evaluation.held_out, limit=64)
    monkeypatch.setattr(report, "held_out", few)
    monkeypatch.setattr(evaluation, "held_out", few)
    cache = tmp_path_factory.getbasetemp() / "classifiers"
    monkeypatch.setenv("COTERIE_CACHE", str(cache))


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("promoe", tmp_path_factory.mktemp("runs") / "image", train__steps=10)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shallow = {"model__backbone__trunk__depth": 1, "train__steps": 10}
    return finished("deepseekmoe/text", tmp_path_factory.mktemp("runs") / "text", **shallow)


def test_report_of_an_image_run(image_run: Path) -> None:
    page = report.report_run(image_run, progress=False, citation="@misc{key}")
    assert page == image_run / "report" / "index.html"
    html = page.read_text(encoding="utf-8")
    assert "promoe" in html and "@misc{key}" in html
    found = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    text = json.dumps(found)
    assert "held-out loss (mean squared error, flow)" in text and "frechet" in text
    assert "NaN" not in text and "Infinity" not in text


def test_report_of_a_text_run(text_run: Path, tmp_path: Path) -> None:
    page = report.report_run(text_run, out=tmp_path / "page", progress=False)
    assert page.parent == tmp_path / "page"
    text = (page.parent / "report.json").read_text(encoding="utf-8")
    assert "held-out loss (bits per token)" in text and "frechet" not in text


def test_measures_are_finite_numbers_with_floors(image_run: Path) -> None:
    found = evaluation.measure(load_run(image_run), num_samples=60)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    wanted = {"held_out_loss", "load_cv", "load_entropy", "dead_experts", "separation"}
    wanted |= {f"{name}{end}" for name in ("frechet", "kid") for end in ("", "_floor")}
    assert wanted | {"precision", "recall", "noise_bits_first", "class_bits_last"} <= found.keys()
    assert found["frechet"] > found["frechet_floor"]
    again = evaluation.measure(load_run(image_run), num_samples=60)
    assert again == found


def test_measures_of_text_and_of_a_dense_model(text_run: Path, tmp_path: Path) -> None:
    found = evaluation.measure(load_run(text_run))
    assert {"held_out_loss", "first_choice_cost", "load_cv"} <= found.keys()
    assert "frechet" not in found and 0 < found["held_out_loss"] < 9
    dense = load_run(finished("dit", tmp_path / "dense"))
    assert (
        routing_probes.measure(dense) == {}
        and evaluation.held_out(dense, limit=20).trace is not None
    )
    assert evaluation.routing_measures(evaluation.held_out(dense, limit=20).trace) == {}


def as_run(name: str, std: float = 0.05) -> LoadedRun:
    """An untrained but awake model, as a run."""
    config = small(name)
    return LoadedRun(Path("unused"), config, woken(config, std=std), build_source(config), 0)


@pytest.mark.parametrize("name", ["dit-moe", "dtr"])
def test_held_out_loss_is_the_mean_over_levels_of_the_loss_there(name: str) -> None:
    run = as_run(name)
    found = evaluation.held_out(run, limit=40, size=40)
    assert found.loss == pytest.approx(np.mean([row["loss"] for row in found.bins]))
    assert [row["bin"] for row in found.bins] == [0, 1, 2]
    assert all(row["count"] == 40 for row in found.bins)
    source = build_source(run.config, "held_out")
    (batch,) = base.batches(source, 40, 40)
    process = run.model.process
    unit = torch.full((40,), 0.5)
    t = process.time_of_unit(unit)
    rng = generator(0, "held_out", int(batch.ids[0]), 1)
    eps = torch.randn(batch.x.shape, generator=rng)
    with torch.no_grad():
        answer = run.model(process.diffuse(batch.x, eps, t), t, batch.cond).value
    target = eps if run.config.model.view == "eps" else eps - batch.x
    expected = (answer - target).square().mean()
    assert found.bins[1]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_two_models_are_compared_on_the_same_noise() -> None:
    """Two models that answer zero have equal losses, whatever their experts."""
    losses = []
    for name in ("dit", "dit-moe"):
        run = as_run(name)
        with torch.no_grad():
            run.model.backbone.head.weight.zero_()
            run.model.backbone.head.bias.zero_()
        losses.append([row["loss"] for row in evaluation.held_out(run, limit=30).bins])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_batches_are_always_the_same_and_spread_over_the_source() -> None:
    source = build_source(small("dit"), "held_out")
    first, again = (
        torch.cat([batch.ids for batch in base.batches(source, 30, 100)]) for _ in range(2)
    )
    assert torch.equal(first, again) and len(first.unique()) == 100
    assert first.max() > 0.8 * len(source) and first.min() < 0.2 * len(source)
    assert sum(len(b.ids) for b in base.batches(source, 100, 10_000)) == len(source)


# Probes


@pytest.mark.parametrize("name", ["dit-moe", "deepseekmoe"])
def test_losing_the_best_experts_takes_the_next_ones(name: str) -> None:
    model = woken(small(name))
    batch, t = images(4), times(4)
    before = model(batch.x, t, batch.cond)
    k, count = before.routings[0].top_k, before.routings[0].num_experts
    lost = max(1, round(count / 8))
    with routing_probes.rerouted(model, routing_probes.without_best):
        changed = model(batch.x, t, batch.cond)
    ranked = before.routings[0].probs.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(changed.routings[0].ids, ranked[:, lost : lost + k])
    assert (changed.value - before.value).abs().max() > 1e-5
    assert torch.equal(model(batch.x, t, batch.cond).value, before.value)


def test_routing_is_put_back_after_an_error() -> None:
    model = woken(small("dit-moe"))
    configs = [m.config for m in model.modules() if isinstance(m, Router)]
    with (
        pytest.raises(RuntimeError, match="inside"),
        routing_probes.rerouted(model, routing_probes.without_best),
    ):
        assert [m.config for m in model.modules() if isinstance(m, Router)] != configs
        raise RuntimeError("inside")
    assert [m.config for m in model.modules() if isinstance(m, Router)] == configs


def test_routers_of_noise_levels_are_not_probed() -> None:
    """A mask by noise level beside experts for tokens: only the latter have tokens to lose."""
    assert routing_probes.measure(as_run("switch-dit")) == {}
    slots = (
        *small("switch-dit").model.backbone.trunk.slots,
        *small("dit-moe").model.backbone.trunk.slots,
    )
    config = small("dit-moe")
    trunk = config.model.backbone.trunk.replace(slots=slots)
    mixed = config.model.replace(backbone=config.model.backbone.replace(trunk=trunk))
    config = config.replace(model=mixed)
    run = LoadedRun(Path("unused"), config, woken(config), build_source(config), 0)
    found = routing_probes.measure(run)
    assert found.keys() == {"separation", "first_choice_cost", "expert_similarity"}
    assert all(math.isfinite(value) for value in found.values())


def routing_of(rows: torch.Tensor, ids: list[list[int]], num_experts: int) -> Routing:
    chosen = torch.tensor(ids)
    probs = torch.full((len(rows), num_experts), 1 / num_experts)
    gates = torch.ones(chosen.shape)
    return Routing("token", num_experts, chosen, gates, probs, probs, (1, len(rows)), inputs=rows)


def test_separation_of_orthogonal_equal_and_hand_counted_experts() -> None:
    apart = torch.eye(3)[[0, 0, 1, 1, 2]]
    ids = [[0], [0], [1], [1], [2]]
    assert routing_probes.separation(routing_of(apart, ids, 4)) == pytest.approx(1.0)
    assert routing_probes.separation(routing_of(torch.ones(5, 3), ids, 4)) == pytest.approx(
        0.0, abs=1e-6
    )
    assert routing_probes.separation(routing_of(apart, [[0]] * 5, 4)) == 0.0
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    means = torch.stack([rows[:2].mean(0), rows[2:4].mean(0), rows[4]])
    cosine = F.cosine_similarity(rows[:, None], means[None], dim=-1)
    own = torch.tensor([0, 0, 1, 1, 2])
    inside = torch.stack([cosine[i, own[i]] for i in range(5)])
    outside = torch.stack([cosine[i, e] for i in range(5) for e in range(3) if e != own[i]])
    expected = (inside.mean() - outside.mean()).item()
    assert routing_probes.separation(routing_of(rows, ids, 4)) == pytest.approx(expected, rel=1e-4)
    # A token without an expert, as expert choice may leave one, counts for nobody.
    with_orphan = routing_of(torch.cat([rows, torch.randn(1, 4)]), [*ids, [4]], 4)
    assert routing_probes.separation(with_orphan) == pytest.approx(expected, rel=1e-4)


# The feature network


def test_the_feature_network_is_trained_once_and_never_sees_the_reference() -> None:
    data = small("dit").data
    first = feature_networks.feature_network(data)
    made = list((Path(feature_networks.cache_root()) / "classifiers").glob("digits-*.safetensors"))
    assert len(made) == 1
    stamp = made[0].stat().st_mtime_ns
    again = feature_networks.feature_network(data)
    assert made[0].stat().st_mtime_ns == stamp
    x = images(3).x
    assert np.array_equal(np.asarray(first(x)), np.asarray(again(x)))
    seen, held = feature_networks.learnt_rows(101), feature_networks.reference_rows(101)
    assert sorted([*seen, *held]) == list(range(101))
