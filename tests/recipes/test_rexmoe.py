"""ReXMoE as a whole model: one pool for several layers, counted, trained and stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.convert import extend_reuse, untie
from coterie.core.batch import Losses
from coterie.core.config import override
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from coterie.core.tensors import read_tensors
from coterie.experts import ExpertLayer, ExpertPool
from coterie.hub import load_manifest, load_pretrained, save_pretrained
from coterie.recipes import get_recipe
from coterie.recipes.rexmoe import SIZES, paper, slot, text, tiny
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from coterie.runs.trained_run import load_run
from coterie.runs.training import make_trainer, start
from coterie.train import TrainConfig
from coterie.train.optimizer import build_optimizer, trainable
from coterie.train.run_directory import RunDir
from small_models import small, with_slots, woken, words

PSR = {"begin": 0.2, "end": 0.6}


def run_of(reuse: int = 2, **options: Any) -> RunConfig:
    """The text preset on short windows, with 4 experts a layer."""
    return with_slots(small("rexmoe/text"), slot(4, 2, 8, reuse, **{**PSR, **options}))


def layers_of(model: nn.Module) -> list[ExpertLayer]:
    return [module for module in model.modules() if isinstance(module, ExpertLayer)]


def losses_of(model: nn.Module, progress: float, step: int = 0) -> Losses:
    objective = small("rexmoe/text").objective.build(model)
    return objective(model, words(8), generator(0, "train", step), progress)


def test_one_layer_serves_text_and_images() -> None:
    assert with_slots(tiny(), *text().model.backbone.trunk.slots) == tiny()
    assert with_slots(text(), *tiny().model.backbone.trunk.slots) == text()
    assert text().model.backbone.kind != tiny().model.backbone.kind


def test_reuse_costs_router_rows_only() -> None:
    arms = get_recipe("rexmoe").arms()
    found = {arm: count_parameters(build_model(config)) for arm, config in arms.items()}
    for arm, reuse, width in (("text-psr", 2, 80), ("text-psr-all", 4, 80), ("image-psr", 2, 64)):
        base = found[arm.split("-")[0] + "-base"]
        extra = 4 * (reuse - 1) * 8 * width  # L (r - 1) N d
        assert found[arm].total - base.total == found[arm].active - base.active == extra
    assert found["text-open"] == found["text-psr"]


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    """Printed as <total>B-A<active>B; the active ones leave out the embeddings."""
    config = paper(size)
    with torch.device("meta"):
        model = config.model.build()
    found = count_parameters(model)
    total, active = {"0.5B": (0.52, 0.08), "2.3B": (2.37, 0.31), "7B-S": (7.1, 2.6)}[size[:4]]
    embeddings = 2 * 32_000 * config.model.backbone.trunk.width
    assert found.total == pytest.approx(total * 1e9, rel=0.05)
    assert found.active - embeddings == pytest.approx(active * 1e9, rel=0.03)
    reuse, num_experts = SIZES[size][8], SIZES[size][4]
    assert {layer.router(0).num_experts for layer in layers_of(model)} >= {reuse * num_experts}


def test_the_optimiser_has_each_shared_expert_once() -> None:
    model = woken(run_of())
    shared = [p for pool in model.backbone.trunk.pools for p in pool.parameters()]
    config = TrainConfig(lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer(config, model, None, trainable(model, None))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {id(p) for p in shared} <= decayed and len(shared) == 4
    before = [p.detach().clone() for p in shared]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for p, old in zip(shared, before):  # decayed once, not once per layer
        torch.testing.assert_close(p.detach(), (1 - 0.5 * 0.1) * old)


def test_the_gradient_of_an_expert_is_the_sum_over_its_layers() -> None:
    model = woken(run_of(), std=0.2).train()
    _, apart = untie(model)
    for each in (model, apart):
        losses_of(each, progress=1.0).total.backward()
    copies = layers_of(apart)
    for number, pool in enumerate(model.backbone.trunk.pools):
        users = copies[2 * number : 2 * number + 2]
        for name, stack in pool.named_parameters():
            parts = [layer.pool.get_parameter(name).grad for layer in users]
            torch.testing.assert_close(stack.grad, sum(parts), rtol=1e-3, atol=1e-6)
            assert all(part.abs().max() > 0 for part in parts)


def test_the_pool_opens_with_training_and_evaluation_sees_all_of_it() -> None:
    model = woken(run_of(), std=0.2).train()
    for progress, count in ((0.0, 4), (0.2, 4), (0.3, 5), (0.41, 6), (0.6, 8), (1.0, 8)):
        routings = losses_of(model, progress).routings
        opened = [routing.probs.gt(0).all(0) for routing in routings]
        for routing, open_ in zip(routings, opened):
            assert open_.sum() == count and not routing.probs[:, ~open_].any()
            assert open_[routing.ids].all()  # top-k never runs out of candidates
            whole = routing.inputs @ layers_of(model)[routing.layer].router(0).score.proj.weight.T
            expected = whole.softmax(-1).masked_fill(~open_, 0.0)
            torch.testing.assert_close(routing.probs, expected)
            assert torch.equal(routing.gates, routing.probs.gather(1, routing.ids))  # raw
        if 4 < count < 8:  # drawn for each layer, and anew in each step
            assert any(not torch.equal(opened[0], other) for other in opened[1:])
            later = losses_of(model, progress, step=1).routings[0].probs.gt(0).all(0)
            assert not torch.equal(later, opened[0])
    model.eval()
    ids = words(3).x
    with torch.no_grad():
        early, late = (
            model(ids, torch.zeros(3), Condition(), rng=generator(0), progress=progress).value
            for progress in (0.0, 1.0)
        )
    assert torch.equal(early, late)


def test_balance_counts_layers_and_pools() -> None:
    aux = losses_of(woken(run_of()).train(), 1.0).aux
    layers = [f"switch/layer{i}" for i in range(4)]
    assert {item.key for item in aux} == {*layers, "switch_pooled/layer0", "switch_pooled/layer2"}
    assert {item.weight for item in aux} == {0.01}
    plain = losses_of(woken(run_of(1)).train(), 1.0).aux
    assert [item.key for item in plain] == layers


def test_shared_experts_stay_with_their_layer() -> None:
    model = woken(run_of(shared=1), std=0.2)
    layers = layers_of(model)
    assert len({id(layer.shared.pool.gate_up) for layer in layers}) == 4
    assert all(pool.num_experts == 8 for pool in model.backbone.trunk.pools)
    h, layer = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0)), layers[1]
    ctx = Context(batch=2, tokens=3, layer=1)
    routing = layer.router(0)(h, ctx.replace(pool_layers=(0, 1)))
    routed = layer.combine(h, routing) - layer.shared(h)
    assert layer.shared(h).abs().max() > 0 and routed.abs().max() > 0
    torch.testing.assert_close(layer(h, ctx).y, routed + layer.shared(h))


# On disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(short(), tmp_path_factory.mktemp("rexmoe"), progress=False)


def short() -> RunConfig:
    """Four steps on one thread, with a checkpoint after two."""
    changes = {"steps": 4, "warmup": 0, "checkpoint_every": 2, "threads": 1}
    return override(run_of(), {f"train.{name}": value for name, value in changes.items()})


def test_a_run_stores_each_expert_once_and_goes_on_to_the_bit(
    finished: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop_at_three(trainer: Any, record: dict) -> None:
        if trainer.state.step == 3:
            raise Stop

    with pytest.raises(Stop):
        make_trainer(short(), RunDir(tmp_path)).fit(False, (stop_at_three,))
    start(short(), tmp_path, progress=False)
    for which in ("model", "ema"):
        whole, again = (load_run(path, which).model.state_dict() for path in (finished, tmp_path))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    for file in ("model", "ema", "optimizer"):
        stored = read_tensors(finished / "checkpoints" / "step-00000004" / f"{file}.safetensors")
        experts = [name for name in stored if name.endswith(("gate_up", "down"))]
        assert all("trunk.pools." in name for name in experts)
        assert len(experts) == (4 if file != "optimizer" else 12)  # step and two moments


def test_a_model_directory_has_one_file_per_expert(finished: Path) -> None:
    manifest = load_manifest(finished / "model")
    pools = {f"backbone.trunk.pools.{i}": 8 for i in (0, 1)}
    assert {name: len(files) for name, files in manifest.pools.items()} == pools
    model, loaded = load_run(finished).model, load_pretrained(finished / "model")
    for pool in (module for module in loaded.modules() if isinstance(module, ExpertPool)):
        assert pool.num_experts == 8
    assert [layer.pool for layer in layers_of(loaded)] == [
        pool for pool in loaded.backbone.trunk.pools for _ in range(2)
    ]
    with torch.no_grad():
        first, second = (answer(each) for each in (model, loaded))
    assert torch.equal(first, second)


def answer(model: nn.Module) -> Tensor:
    value: Tensor = model(words(3).x, torch.zeros(3), Condition()).value
    return value


def test_a_run_may_start_from_an_extended_model(tmp_path: Path) -> None:
    plain = woken(run_of(1), std=0.2)
    config, pooled = extend_reuse(plain, 2, begin=1, end=5)
    save_pretrained(pooled, tmp_path / "extended", config.model_dump(mode="json"))
    origin = {"path": str(tmp_path / "extended")}
    run = start(short().replace(model=config, init=origin), tmp_path / "run", progress=False)
    for which in ("model", "ema"):
        for number, layer in enumerate(layers_of(load_run(run, which).model)):
            share = layer.router(0).edits[0].share.unflatten(0, (2, 4))
            assert (share[number % 2] == 1).all()
            torch.testing.assert_close(share[1 - number % 2], torch.full((4,), 0.75))
