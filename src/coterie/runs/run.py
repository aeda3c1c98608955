"""One run from its configuration: build, train or resume, load again, project the cost.

A run directory holds ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``model/`` (the
averaged weights as a model directory), ``samples/`` and ``report/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, SerializeAsAny, model_validator

from coterie.backbones import TrunkConfig
from coterie.backbones.base import BackbonePart
from coterie.convert import UpcycleConfig, upcycle, upcycled_config, upcycled_slot
from coterie.core import needs
from coterie.core.batch import Source
from coterie.core.config import Config
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError, describe
from coterie.core.places import relative
from coterie.core.registry import Part
from coterie.core.rng import derive, generator
from coterie.core.tensors import assign, module_tensors
from coterie.core.threads import check_threads
from coterie.data import SOURCES
from coterie.denoiser import MODELS, DenoiserConfig
from coterie.ensembles import Ensemble, model_of
from coterie.experts.routers.config import within
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, ThresholdConfig
from coterie.train import checkpoint
from coterie.runs.origins.adapted import described, put_new
from coterie.train.config import TrainConfig
from coterie.runs.origins.initial import (
    InitConfig,
    calibration,
    find_origin,
    load_source,
    put_on_base,
)
from coterie.train.loop import Trainer
from coterie.train.objectives import OBJECTIVES, DenoisingConfig
from coterie.train.placement import ALONE, Placement
from coterie.train.rundir import RunDir
from coterie.train.state import load_weights
from coterie.train.store import say_changed_data


class SampleConfig(Config):
    """How a run samples by default."""

    solver: Annotated[SerializeAsAny[Part], SOLVERS.validator] = "heun"  # type: ignore[assignment]
    grid: Annotated[SerializeAsAny[Part], GRIDS.validator] = "uniform"  # type: ignore[assignment]
    steps: int = Field(20, ge=1, le=100_000)
    guidance: GuidanceConfig = GuidanceConfig()
    threshold: ThresholdConfig | None = None  # keeps x0 in range, after guidance; pixels only
    batch: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)  # text only


class RunConfig(Config):
    """Everything a run depends on. ``recipe`` and ``preset`` say where it came from; ``init``
    where its first weights do (None: drawn from ``seed``)."""

    recipe: str = ""
    preset: str = ""
    seed: int = Field(0, ge=0, lt=2**63)
    data: Annotated[SerializeAsAny[Part], SOURCES.validator] = "digits"  # type: ignore[assignment]
    model: Annotated[SerializeAsAny[Part], MODELS.validator] = DenoiserConfig()
    objective: Annotated[SerializeAsAny[Part], OBJECTIVES.validator] = DenoisingConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    init: InitConfig | None = None

    @model_validator(mode="after")
    def _experts_are_there(self) -> RunConfig:
        wanted = self.init.upcycle if self.init is not None else None
        if wanted is not None and not _has_slot(self.model, wanted):
            hint = "coterie upcycle writes a run whose model has"
            allowed = "a model that has the experts which upcycling makes"
            raise ConfigError(describe("init.upcycle", wanted.mode, allowed, hint))
        return self

    @model_validator(mode="after")
    def _trains_or_is_trained(self) -> RunConfig:
        added = self.init is not None and self.init.trains_nothing
        trained, steps = getattr(self.model, "is_trained", added), self.train.steps
        if trained and steps:
            hint = "to train a model further, name it in init.path"
            allowed = f"0, for the model {self.model.kind}"
            raise ConfigError(describe("train.steps", steps, allowed, hint))
        if not trained and not steps:
            raise ConfigError(describe("train.steps", 0, "1 or more"))
        return self


def _has_slot(model: Part, config: UpcycleConfig) -> bool:
    """Whether a model has the experts of an upcycled one (its balance losses may be others)."""
    trunk = getattr(getattr(model, "backbone", None), "trunk", None)
    if not isinstance(trunk, TrunkConfig) or trunk.hidden % config.slices:
        return False
    made = upcycled_slot(trunk, config)
    plain = [slot.replace(expert=slot.expert.replace(balance=())) for slot in trunk.slots]
    return made.replace(expert=made.expert.replace(balance=())) in plain


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
        model = config.model.build()
        if config.init is not None:
            put_new(model, config.init.adapters)
        return model


def based_model(config: RunConfig) -> Any:
    """The model as its own weights find it: with the base under its adapters, if it has any."""
    model = build_model(config)
    if config.init is not None and config.init.adapters:
        put_on_base(model, config.init)
    return model


def check_fits(config: RunConfig, training: bool = True, parts: int = 1) -> None:
    """ConfigError where this machine's memory is too small for the model: counted from shapes,
    before anything is allocated. ``parts``: of one of several processes that share it."""
    if getattr(config.model, "is_trained", False) or getattr(config.model, "absent", ""):
        return  # what others trained says how large it is when it is read
    most = needs.memory_bytes() * parts
    if training and config.train.threads is not None:
        check_threads(config.train.threads)
    made = needs.on_meta(config.model, lambda: build_model(config), most)
    train = config.train if training else None
    batch = config.train.batch // config.train.accumulate if training else config.sample.batch
    needs.check_memory(config.model, made, train, batch, parts)


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
        hint = config.data.explain_classes(source)
        allowed = str(source.num_classes)
        raise ConfigError(describe("model.backbone.num_classes", classes, allowed, hint))
    check = getattr(backbone, "check_source", None)
    if check is not None:
        within("model.backbone", partial(check, source))
    if isinstance(backbone, BackbonePart):
        known = {"label": source.num_classes, "task": len(getattr(source, "task_names", ()))}
        told = backbone.told - {name for name, count in known.items() if not count}
        within("model.backbone", partial(backbone.check_told, told, f"source {source.name!r}"))
    return source


def initial_model(config: RunConfig, source: Source) -> Any:
    """The model with the weights that training starts from: those of ``config.init``, or drawn.

    CheckpointError names the first tensor of ``init.path`` that does not fit ``config.model``.
    """
    model = based_model(config)
    init = config.init
    if init is None or init.adapters:
        return model
    found = load_source(init)
    if init.upcycle is not None:
        run = calibration(config.objective, source, config.seed, init.upcycle.calibration)
        rng = generator(config.seed, "upcycle", init.upcycle.seed)
        _, found = upcycle(found, init.upcycle, run, rng)
    assign(module_tensors(model), module_tensors(found), f"init.path: {init.path}")
    return model


def upcycled_run(config: RunConfig, path: str | Path, upcycling: UpcycleConfig) -> RunConfig:
    """``config`` with experts in its model, to be made of the dense weights at ``path``."""
    return config.replace(
        model=upcycled_config(config.model, upcycling),
        init=InitConfig(path=str(path), upcycle=upcycling),
    )


def make_trainer(
    config: RunConfig,
    run_dir: RunDir | None = None,
    source: Source | None = None,
    placement: Placement = ALONE,
) -> Trainer:
    """A trainer of the configured model; ``source`` where it is already built."""
    if source is None:
        check_fits(config, parts=placement.count)
        source = build_source(config)
    resumes = placement.on_first(
        lambda: run_dir is not None and bool(checkpoint.steps(run_dir.path))
    )
    model = based_model(config) if resumes else initial_model(config, source)
    objective = config.objective.build(model)
    return Trainer(
        config.train, model, objective, source, config.seed, run_dir,
        run_config=None if run_dir is None else run_dir.stored_form(config), placement=placement,
    )  # fmt: skip


def start(
    config: RunConfig, out: str | Path, progress: bool = True, placement: Placement = ALONE
) -> Path:
    """Train to ``config.train.steps``; the same call again resumes, bit for bit on a CPU.

    With 0 steps the run is its configuration: nothing is copied, its model lies where that says.
    ``placement``: this process's part, where several train together and all call this.
    """
    if not config.train.steps:
        return Path(placement.on_first(lambda: str(_as_it_is(config, out))))
    trainer, run_dir, source = _begin(config, out, placement)
    with trainer.locked():  # to the end: another trainer would clear away what is half exported
        trainer.fit(progress=progress)
        if placement.count == 1:
            with trainer.averaged() as model:
                _export(model, config, run_dir, source)
        else:  # what is held here is a part of the model: the checkpoint has all of it
            placement.on_first(lambda: _export_saved(config, run_dir, source))
    return run_dir.path


def _as_it_is(config: RunConfig, out: str | Path) -> Path:
    """A run that trains nothing; refused before it is written if its model cannot be built."""
    build_source(config)
    run_dir = RunDir(out)
    config = pinned(config, run_dir)
    based_model(config)
    run_dir.write_config(run_dir.stored_form(config))
    return run_dir.path


def prepare(config: RunConfig, out: str | Path) -> Path:
    """A run directory at step 0: ``start`` with the same configuration trains it, and it can be
    loaded and sampled as it is."""
    if not config.train.steps:
        return _as_it_is(config, out)
    trainer, run_dir, source = _begin(config, out)
    with trainer.locked():
        trainer.begin()
        with trainer.averaged() as model:
            _export(model, config, run_dir, source)
    return run_dir.path


def _begin(
    config: RunConfig, out: str | Path, placement: Placement = ALONE
) -> tuple[Trainer, RunDir, Source]:
    check_fits(config, parts=placement.count)
    run_dir = RunDir(out)
    run_dir.check_free()  # before data are fetched and a model is built
    config = pinned(config, run_dir)
    source = placement.in_turn(lambda: build_source(config))  # data are fetched once
    trainer = make_trainer(config, run_dir, source, placement)
    if config.init is not None and not placement.on_first(
        lambda: bool(checkpoint.steps(run_dir.path))
    ):
        trainer.begin()  # from here on the source is not needed again
    return trainer, run_dir, source


def pinned(config: RunConfig, run_dir: RunDir) -> RunConfig:
    """``config`` with the origin of its first weights: the one this run began with, or today's."""
    init = config.init
    if init is None or init.origin is not None:
        return config
    stored = (run_dir.stored_config() or {}).get("init") or {}
    same = stored.get("path") == relative(init.path, run_dir.path)
    origin = stored.get("origin") if same else None
    return config.replace(init=init.replace(origin=origin or find_origin(init)))


def _export_saved(config: RunConfig, run_dir: RunDir, source: Source) -> None:
    """The newest checkpoint as a model directory."""
    model = based_model(config)
    load_weights(run_dir.path, model)
    _export(model, config, run_dir, source)


def _export(model: Any, config: RunConfig, run_dir: RunDir, source: Source) -> None:
    """The model as a model directory; its weights are the averaged ones."""
    from coterie.hub import save_pretrained

    facts: dict[str, Any] = {
        "recipe": config.recipe,
        "preset": config.preset,
        "data": config.data.kind,
    }
    if config.init is not None and config.init.adapters:
        facts |= described(model, config.init.path, run_dir.path / "model")
    whole = model_of(model) if isinstance(model, Ensemble) else config.model
    save_pretrained(
        model,
        run_dir.path / "model",
        whole.model_dump(mode="json"),
        overwrite=True,
        data_licence=source.licence,
        extra=facts,
    )


def load_run(path: str | Path, which: str = "ema") -> LoadedRun:
    """The run's newest valid weights; ``which``: "ema", "ema-<decay>" or "model"."""
    run_dir = RunDir(path)
    config = run_dir.read_config(RunConfig)
    check_fits(config, training=False)
    model = based_model(config)
    found = load_weights(run_dir.path, model, which) if config.train.steps else None
    source = build_source(config)
    if found is not None:
        say_changed_data(run_dir.path, found.scalars, source)
    return LoadedRun(run_dir.path, config, model.eval(), source, found.step if found else 0)


def plan(config: RunConfig, measure: bool = True) -> dict[str, Any]:
    """Sizes and cost before any work: parameters, multiply-adds, projected minutes; of a run that
    trains nothing only that, of one whose parts are not there what it needs."""
    if not config.train.steps:
        return {"recipe": config.recipe, "preset": config.preset, "steps": 0}
    missing = getattr(config.model, "absent", "")
    if missing:
        known = {"steps": config.train.steps, "batch": config.train.batch}
        return {"recipe": config.recipe, "preset": config.preset, **known, "needs": missing}
    # Shapes are enough, and published sizes fit few machines.
    counted = count_parameters(needs.on_meta(config.model, lambda: build_model(config)))
    backbone = getattr(config.model, "backbone", None)
    tokens = int(getattr(backbone, "tokens", 1))
    # Where a parameter serves many places, or several networks answer.
    whole = getattr(config.model, "multiply_adds", None)
    own = whole or getattr(backbone, "multiply_adds", None)
    work = counted.active * tokens if own is None else own()
    out: dict[str, Any] = {
        "recipe": config.recipe,
        "preset": config.preset,
        "parameters_total": counted.total,
        "parameters_active": counted.active,
        "tokens_per_sample": tokens,
        "steps": config.train.steps,
        "batch": config.train.batch,
        # 2 FLOPs per multiply-add, forward + twice that backward, active parameters only.
        "flops_per_step": 6 * work * config.train.batch,
    }
    if measure:
        # What a step costs does not depend on where the first weights come from, but adapters do.
        plain = config.init is None or not config.init.adapters
        timed = config.replace(init=None) if plain else config
        seconds = make_trainer(timed, None).project(steps=5)
        out["projected_minutes"] = round(seconds / 60, 2)
    return out
