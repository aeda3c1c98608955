"""What a configuration asks of memory is known before anything is allocated."""

from __future__ import annotations

import pytest

from coterie.core import memory
from coterie.core.config import override
from coterie.core.errors import ConfigError
from coterie.recipes import get_recipe
from coterie.runs.build import build_model
from coterie.runs.cost import plan
from coterie.runs.trained_run import load_run
from coterie.runs.training import make_trainer, start
from small_models import small
from small_runs import short

HUGE = {
    "model.backbone.trunk.width": 10_000_000,
    "model.backbone.trunk.slots.0.expert.experts.hidden": 10_000_000,
    "model.backbone.trunk.depth": 1024,
    "model.backbone.num_classes": 10_000_000,
    "train.batch": 10_000_000,
}


@pytest.mark.parametrize("path", HUGE)
def test_G10_what_does_not_fit_is_refused_by_field_and_total(path, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**27)
    config = override(small("dit-moe"), {path: HUGE[path]})
    name = path.rpartition(".")[2]
    for work in (
        lambda: start(config, tmp_path / "run", progress=False),
        lambda: make_trainer(config),
    ):
        said = r"^model: .*iB are needed; allowed: 128\.0 MiB"
        with pytest.raises(ConfigError, match=said) as error:
            work()
        assert name in str(error.value) or name in ("depth", "batch")
    assert not (tmp_path / "run").exists()


def test_G10_a_tensor_that_cannot_be_is_refused_by_its_fields(tmp_path):
    trunk, expert = "model.backbone.trunk", "model.backbone.trunk.slots.0.expert"
    sizes = {f"{trunk}.width": 2**24, f"{expert}.num_experts": 2**16}
    config = override(small("dit-moe"), {**sizes, f"{expert}.experts.hidden": 2**24})
    for work in (lambda: start(config, tmp_path / "run", False), lambda: plan(config, False)):
        with pytest.raises(ConfigError, match=r"^model: .*width 16777216") as error:
            work()
        assert "\n" not in str(error.value)
    large = override(small("dit"), {f"{trunk}.width": 2**20})
    assert plan(large, measure=False)["parameters_total"] > 2**40  # to know is not to build


def test_G10_a_run_that_fits_is_trained_and_read_as_before(tmp_path, monkeypatch):
    asked: list[int] = []
    real = memory.memory_bytes
    monkeypatch.setattr(memory, "memory_bytes", lambda: asked.append(1) or real())
    load_run(start(short("dit"), tmp_path / "run", progress=False))
    assert len(asked) == 4
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**16)
    with pytest.raises(ConfigError, match=r"are needed; allowed: 0\.1 MiB"):
        load_run(tmp_path / "run")


def test_G10_what_is_counted_is_what_is_there():
    config = small("dit-moe")
    made = memory.on_meta(config.model, lambda: build_model(config))
    weights = sum(p.numel() * 4 for p in made.parameters()) + sum(b.nbytes for b in made.buffers())
    assert all(p.device.type == "meta" for p in made.parameters())
    assert memory.check_memory(config.model, made) == weights
    trained = memory.check_memory(config.model, made, config.train, batch=8)
    assert trained == weights * (4 + len(config.train.ema)) + 8 * memory.sample_bytes(config.model)
    assert memory.check_memory(config.model, made, parts=2, limit=weights) == weights // 2
    paper = get_recipe("dit-moe").config("paper")
    assert "trunk.width 1408" in memory.largest(paper.model)
