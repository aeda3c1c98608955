"""A U-Net with convolutional experts trains, resumes, samples, is saved and reported like any."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coterie.backbones import SlotConfig
from coterie.core.config import override
from coterie.core.errors import ConfigError
from coterie.hub import load_pretrained, save_pretrained
from coterie.hub.load import load_expert
from coterie.inspect import analyse
from coterie.inspect.page.report_json import routing_numbers
from coterie.recipes import get_recipe
from coterie.recipes.common import unet_tiny
from coterie.runs.build import build_model, build_source
from coterie.runs.config import RunConfig
from coterie.runs.cost import plan
from coterie.runs.judges import noise
from coterie.runs.measure.evaluation import held_out
from coterie.runs.sample.sampling import generate
from coterie.runs.trained_run import load_run
from coterie.runs.training import start
from coterie.solvers import SOLVERS
from small_models import images, times
from small_runs import SHORT

SIZES = {"image_size": 8, "widths": (8, 16), "groups": 4}
DENSE = {"unit": "sample", "select": "dense"}
NOISE = {"score": "noise_level", "select": {"kind": "top_k", "k": 2}, "selection_bias": True}


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    pytest.importorskip("diffusers")


def slot(name: str, router: dict[str, Any], *balance: Any) -> SlotConfig:
    expert = {"num_experts": 3, "experts": "conv", "router": router, "balance": balance}
    return SlotConfig.from_dict({"slot": "conv", "names": [name], "expert": expert})


def config(*, flow: bool = True, **changes: Any) -> RunConfig:
    slots = (
        slot("mid_block.*.conv1", DENSE, {"kind": "switch"}),
        slot("up_blocks.*.conv2", NOISE, {"kind": "selection_bias"}),
    )
    made = unet_tiny("unet", *slots, flow=flow, sizes=SIZES)
    return override(made, {"data": {"kind": "digits"}, **SHORT, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(config(), tmp_path_factory.mktemp("runs") / "unet", progress=False)


def test_training_moves_everything_that_is_there(run: Path) -> None:
    first, trained = build_model(config()), load_run(run, "model").model
    before, after = first.state_dict(), trained.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert [name for name in still if "conv_shortcut.bias" not in name] == []
    aux = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["aux"]
    assert set(aux) == {"switch/layer0", "switch/layer1"}


def test_a_resumed_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(run, tmp_path / "run"))
    newest = max(half.glob("checkpoints/step-*"))
    shutil.rmtree(newest)
    start(config(), half, progress=False)
    assert newest.is_dir()
    whole, resumed = (load_run(path, "model").model.state_dict() for path in (run, half))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("solver", [kind for kind in SOLVERS.kinds() if kind != "feynman_kac"])
def test_every_solver_samples_it(run: Path, solver: str) -> None:
    loose = {"rtol": 0.5, "atol": 0.5} if solver == "rk45" else {}
    changes = {"sample.solver": {"kind": solver, **loose}, "sample.steps": 2}
    loaded = load_run(run)
    loaded = replace(loaded, config=override(loaded.config, {**changes, "sample.grid": "lambda"}))
    assert generate(loaded, 1).x.isfinite().all()


def test_a_sample_depends_on_its_seed_alone(run: Path) -> None:
    loaded = load_run(run)
    drawn = generate(loaded, 3).x
    assert drawn.shape == (3, 1, 8, 8) and drawn.std() > 0.1
    torch.testing.assert_close(generate(loaded, 1).x, drawn[:1], atol=1e-4, rtol=1e-4)


def test_discrete_diffusion_with_learned_variance(tmp_path: Path) -> None:
    changes = {"model.backbone.learned_variance": True, "train.steps": 2}
    path = start(config(flow=False, **changes), tmp_path / "run", progress=False)
    assert generate(load_run(path), 2).x.isfinite().all()


def test_a_model_directory_has_a_file_per_kernel(run: Path, tmp_path: Path) -> None:
    model: Any = load_run(run).model
    loaded: Any = load_pretrained(run / "model")
    batch, t = images(4), times(4)
    assert torch.equal(
        model(batch.x, t, batch.cond).value, loaded.eval()(batch.x, t, batch.cond).value
    )
    path = save_pretrained(model, tmp_path / "copy", model.config.model_dump(mode="json"))
    pool = "backbone.network.mid_block.resnets.0.conv1.experts.pool"
    assert sorted(p.name for p in (path / "experts" / pool).iterdir()) == [
        f"e00{expert}.safetensors" for expert in range(3)
    ]
    own = model.get_submodule(pool).expert_state(1)
    stored = load_expert(path, pool, 1)
    assert all(torch.equal(stored[name], value) for name, value in own.items())


def test_the_report_calls_places_by_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "LEVELS", 2)
    trace = held_out(load_run(run), limit=16).trace
    names = ["mid.0.conv1", "mid.1.conv1"]
    names += [f"up.{level}.{block}.conv2" for level in range(2) for block in range(2)]
    items = analyse(trace)
    assert [item.name for item in items] == names
    assert {item.unit for item in items} == {"sample"} and items[0].choices_per_row == 3
    told = routing_numbers(trace, items)
    assert [router["name"] for router in told["routers"]] == names
    assert any("mid.0.conv1" in sentence for sentence in told["summary"])


def test_the_backbone_is_one_flag_of_any_image_recipe() -> None:
    changed = override(get_recipe("dit").config("tiny"), {"model.backbone": "unet"})
    assert changed.model.backbone.kind == "unet"
    assert build_source(changed).shape == changed.model.backbone.sample_shape
    assert plan(changed, measure=False)["parameters_total"] > 900_000
    with pytest.raises(ConfigError, match=r"model\.backbone.*\(1, 8, 8\)"):
        build_source(override(changed, {"data": {"kind": "digits"}}))


def test_the_cost_of_a_step_counts_every_place_of_a_kernel() -> None:
    backbone, batch = config().model.backbone, images(1)
    model = build_model(config())
    counts: list[int] = []

    def count(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        counts.append(module.weight[0].numel() * out.numel())  # type: ignore[union-attr]

    plain = backbone.build_network()
    for module in plain.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    plain(batch.x, 3)
    pools = sum(p.numel() for n, p in model.named_parameters() if ".pool." in n)
    expected, found = sum(counts) + pools, backbone.multiply_adds()
    assert expected < found < 1.01 * expected, "attention's own products are the rest"
    planned = plan(config(), measure=False)
    assert planned["flops_per_step"] == 6 * found * config().train.batch
