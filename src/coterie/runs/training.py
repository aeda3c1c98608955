"""Training a run in its directory, from the start or resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.core.batch import Source
from coterie.core.paths import relative
from coterie.ensembles import Ensemble, model_of
from coterie.hub import save_pretrained
from coterie.runs.build import based_model, build_source, check_fits, initial_model
from coterie.runs.config import RunConfig
from coterie.runs.origins.adapters import described
from coterie.runs.origins.first_weights import find_origin
from coterie.train import checkpoint
from coterie.train.loop import Trainer
from coterie.train.run_directory import RunDir
from coterie.train.state import load_weights
from coterie.train.world import ALONE, World


def make_trainer(
    config: RunConfig,
    run_dir: RunDir | None = None,
    source: Source | None = None,
    world: World = ALONE,
) -> Trainer:
    """A trainer of the configured model; ``source``: the data, if already built."""
    if source is None:
        check_fits(config, parts=world.count)
        source = build_source(config)
    resumes = world.on_first(lambda: run_dir is not None and bool(checkpoint.steps(run_dir.path)))
    model = based_model(config) if resumes else initial_model(config, source)
    objective = config.objective.build(model)
    return Trainer(
        config.train, model, objective, source, config.seed, run_dir,
        run_config=None if run_dir is None else run_dir.stored_form(config), world=world,
    )  # fmt: skip


def start(config: RunConfig, out: str | Path, progress: bool = True, world: World = ALONE) -> Path:
    """Train to ``config.train.steps``; calling it again resumes, bit for bit on a CPU.

    With 0 steps only the configuration is written, and the run's model is read from where the
    configuration says. ``world``: this process's part, if several processes train together.
    """
    if not config.train.steps:
        return Path(world.on_first(lambda: str(_as_it_is(config, out))))
    trainer, run_dir, source = _begin(config, out, world)
    with trainer.locked():  # to the end: another trainer would clear away what is half exported
        trainer.fit(progress=progress)
        if world.count == 1:
            with trainer.averaged() as model:
                _export(model, config, run_dir, source)
        else:  # what is held here is a part of the model: the checkpoint has all of it
            world.on_first(lambda: _export_saved(config, run_dir, source))
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
    """Create a run directory at step 0, which can be loaded, sampled, or trained by
    :func:`start`."""
    if not config.train.steps:
        return _as_it_is(config, out)
    trainer, run_dir, source = _begin(config, out)
    with trainer.locked():
        trainer.begin()
        with trainer.averaged() as model:
            _export(model, config, run_dir, source)
    return run_dir.path


def _begin(
    config: RunConfig, out: str | Path, world: World = ALONE
) -> tuple[Trainer, RunDir, Source]:
    check_fits(config, parts=world.count)
    run_dir = RunDir(out)
    run_dir.check_free()  # before data are fetched and a model is built
    config = pinned(config, run_dir)
    source = world.in_turn(lambda: build_source(config))  # data are fetched once
    trainer = make_trainer(config, run_dir, source, world)
    if config.init is not None and not world.on_first(lambda: bool(checkpoint.steps(run_dir.path))):
        trainer.begin()  # from here on the source is not needed again
    return trainer, run_dir, source


def pinned(config: RunConfig, run_dir: RunDir) -> RunConfig:
    """``config`` with the identity of its initial weights: that of the existing run, or the current
    one."""
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
