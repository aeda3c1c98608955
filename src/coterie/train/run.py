"""One run from its configuration: build, train or resume, load again, project the cost.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``model/`` (the
averaged weights as a model directory), ``samples/`` and ``report/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, SerializeAsAny

from coterie.core.batch import Source
from coterie.core.config import Config
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.rng import derive
from coterie.data import SOURCES
from coterie.denoiser import MODELS, DenoiserConfig
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, ThresholdConfig
from coterie.train.config import TrainConfig
from coterie.train.loop import Trainer
from coterie.train.objectives import OBJECTIVES, DenoisingConfig
from coterie.train.rundir import RunDir
from coterie.train.state import load_weights


class SampleConfig(Config):
    """How a run samples by default."""

    solver: Annotated[SerializeAsAny[Part], SOLVERS.validator] = "heun"  # type: ignore[assignment]
    grid: Annotated[SerializeAsAny[Part], GRIDS.validator] = "uniform"  # type: ignore[assignment]
    steps: int = Field(20, ge=1)
    guidance: GuidanceConfig = GuidanceConfig()
    threshold: ThresholdConfig | None = None  # keeps x0 in range, after guidance; pixels only
    batch: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)  # text only


class RunConfig(Config):
    """Everything a run depends on. ``recipe`` and ``preset`` say where it came from."""

    recipe: str = ""
    preset: str = ""
    seed: int = Field(0, ge=0)
    data: Annotated[SerializeAsAny[Part], SOURCES.validator] = "digits"  # type: ignore[assignment]
    model: Annotated[SerializeAsAny[Part], MODELS.validator] = DenoiserConfig()
    objective: Annotated[SerializeAsAny[Part], OBJECTIVES.validator] = DenoisingConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to sample: ``model`` is in eval mode with the averaged weights."""

    path: Path
    config: RunConfig
    model: Any
    source: Source
    step: int

    @property
    def is_text(self) -> bool:
        return bool(self.config.model.kind == "token_denoiser")


def build_model(config: RunConfig) -> Any:
    """The model with initial weights that depend on ``config.seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "init"))
        return config.model.build()


def build_source(config: RunConfig, split: str = "train") -> Source:
    """The data, checked against the model's shape and classes."""
    source: Source = config.data.build(split=split)
    backbone = getattr(config.model, "backbone", None)
    wanted = getattr(backbone, "sample_shape", None)
    if wanted is not None and tuple(source.shape) != tuple(wanted):
        hint = f"source {source.name!r} yields samples of shape {tuple(source.shape)}"
        raise ConfigError(describe("model.backbone", tuple(wanted), str(source.shape), hint))
    words, known = getattr(source, "vocab_size", 0), getattr(backbone, "vocabulary", None)
    if known is not None and words > known:
        hint = f"source {source.name!r} has {words} tokens"
        raise ConfigError(describe("model.backbone.vocabulary", known, f"{words} or more", hint))
    classes = getattr(backbone, "num_classes", None)
    if classes and source.num_classes != classes:
        hint = f"source {source.name!r} has {source.num_classes} classes"
        allowed = str(source.num_classes)
        raise ConfigError(describe("model.backbone.num_classes", classes, allowed, hint))
    return source


def make_trainer(
    config: RunConfig, run_dir: RunDir | None = None, source: Source | None = None
) -> Trainer:
    """A trainer of the configured model; ``source`` where it is already built."""
    source = source or build_source(config)
    model = build_model(config)
    objective = config.objective.build(model)
    whole = config.model_dump(mode="json")
    return Trainer(config.train, model, objective, source, config.seed, run_dir, run_config=whole)


def start(config: RunConfig, out: str | Path, progress: bool = True) -> Path:
    """Train to ``config.train.steps``; the same call again resumes, bit for bit on a CPU."""
    from coterie.hub import save_pretrained

    run_dir = RunDir(out)
    source = build_source(config)
    trainer = make_trainer(config, run_dir, source)
    trainer.fit(progress=progress)
    with trainer.averaged() as model:
        save_pretrained(
            model,
            run_dir.path / "model",
            config.model.model_dump(mode="json"),
            overwrite=True,
            data_licence=source.licence,
            extra={"recipe": config.recipe, "preset": config.preset, "data": config.data.kind},
        )
    return run_dir.path


def load_run(path: str | Path, which: str = "ema") -> LoadedRun:
    """The run's newest valid weights; ``which``: "ema", "ema-<decay>" or "model"."""
    run_dir = RunDir(path)
    config = run_dir.read_config(RunConfig)
    model = build_model(config)
    step = load_weights(run_dir.path, model, which).step
    return LoadedRun(run_dir.path, config, model.eval(), build_source(config), step)


def plan(config: RunConfig, measure: bool = True) -> dict[str, Any]:
    """Sizes and cost before any work: parameters, multiply-adds, projected minutes."""
    with torch.device("meta"):  # shapes are enough, and published sizes fit few machines
        counted = count_parameters(config.model.build())
    backbone = getattr(config.model, "backbone", None)
    tokens = int(getattr(backbone, "tokens", 1))
    out: dict[str, Any] = {
        "recipe": config.recipe,
        "preset": config.preset,
        "parameters_total": counted.total,
        "parameters_active": counted.active,
        "tokens_per_sample": tokens,
        "steps": config.train.steps,
        "batch": config.train.batch,
        # 2 FLOPs per multiply-add, forward + twice that backward, active parameters only.
        "flops_per_step": 6 * counted.active * tokens * config.train.batch,
    }
    if measure:
        seconds = make_trainer(config, None).project(steps=5)
        out["projected_minutes"] = round(seconds / 60, 2)
    return out
