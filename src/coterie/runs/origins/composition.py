"""A run that is several trained models composed, right in distribution: it trains nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.ensembles.model import EnsembleModelConfig, MemberConfig
from coterie.ensembles.product import Composition, CompositionConfig
from coterie.hub import load_manifest
from coterie.inspect.statistics.compositions import Composed
from coterie.interop.diffusers.expert import DiffusersConfig, is_diffusers
from coterie.interop.diffusers.pipeline import INDEX
from coterie.runs.config import RunConfig
from coterie.runs.origins.first_weights import KINDS
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.runs.trained_run import LoadedRun
from coterie.solvers import FeynmanKacConfig, GuidanceConfig
from coterie.train.config import TrainConfig


def composed_run(
    paths: Sequence[str | Path],
    composition: CompositionConfig,
    particles: FeynmanKacConfig | None = None,
    data: Part | None = None,
    view: str | None = None,
) -> RunConfig:
    """The configuration of a run whose model is the composition of those at ``paths``: runs, model
    directories, pipelines or networks of diffusers. Data and grid are those of the first run; where
    there is none, ``data`` says what samples are compared with.

    ``particles`` is for corrector "fkc". Guidance is off: it is a composition itself. A network of
    diffusers without a scheduler answers ``view`` in the composition's process. ConfigError where
    nothing lies at a path, or the models are of different data.
    """
    base = first_run(paths)
    if base is not None and data is not None:
        raise ConfigError(describe("data", data.kind, "none: a run says what its data are"))
    corrected = composition.corrector == "fkc"
    if corrected != (particles is not None):
        allowed = "settings of the particles" if corrected else "none without a corrector"
        raise ConfigError(describe("particles", particles, allowed))
    members = members_at(paths, composition.process, view)
    composition = _pinned(composition)
    model = EnsembleModelConfig(ensemble=composition, members=members)
    if base is None:
        check_data_named(data, paths)
        base = RunConfig(data=data, model=model, train=TrainConfig(steps=0))
    solver = particles or base.sample.solver
    count = (particles.particles if particles else None) or 1
    return base.replace(
        recipe="",
        preset="",
        init=None,
        model=model,
        train=base.train.replace(steps=0),
        sample=base.sample.replace(
            solver=solver,
            batch=max(base.sample.batch // count, 1) * count,
            guidance=GuidanceConfig(),
        ),
    )


def first_run(paths: Sequence[str | Path]) -> RunConfig | None:
    """The first run among ``paths``, which says what data, objective and sampling are."""
    return next((RunConfig.load(_config(path)) for path in paths if _is_run(path)), None)


def check_data_named(data: Any, paths: Sequence[str | Path]) -> None:
    """ConfigError if ``data`` is None: there is no run among ``paths``."""
    if data is None:
        given = [str(path) for path in paths]
        hint = "a model alone does not say what its data are: name them (--data)"
        raise ConfigError(describe("RUN", given, "a run directory", hint))


def _pinned(composition: CompositionConfig) -> CompositionConfig:
    """With the weights that its reward reads now."""
    reward = composition.reward
    network = getattr(reward, "network", None)
    if reward is None or not isinstance(network, PretrainedConfig | DiffusersConfig):
        return composition
    return composition.replace(reward=reward.replace(network=network.pinned()))


def members_at(
    paths: Sequence[str | Path], process: Part | None = None, view: str | None = None
) -> tuple[MemberConfig, ...]:
    """The runs, model directories, pipelines or networks of diffusers at ``paths``, with the hashes
    of their weights. A network of diffusers without a scheduler answers ``view`` (default: eps) in
    ``process``. The same path may stand there several times. ConfigError where nothing lies."""
    named = zip(paths, member_names(paths), strict=True)
    return tuple(_member(Path(path), name, process, view) for path, name in named)


def _member(path: Path, name: str, process: Part | None, view: str | None) -> MemberConfig:
    model: PretrainedConfig | DiffusersConfig = PretrainedConfig(path=str(path))
    if is_diffusers(path):
        alone = not (path / INDEX).is_file()
        told = {"process": process, "view": view or "eps"} if alone else {}
        model = DiffusersConfig.from_dict({"path": str(path), **told})
    elif model.absent:
        raise ConfigError(describe("RUN", str(path), KINDS, model.absent))
    return MemberConfig(name=name, model=model.pinned(), space=_space(path))


def member_names(paths: Sequence[str | Path]) -> list[str]:
    """What members are called: by folder; by path where folders are called alike; and where one is
    given several times, by its place too."""
    folders, whole = [Path(path).name for path in paths], [str(path) for path in paths]
    names = []
    for place, (folder, path) in enumerate(zip(folders, whole, strict=True), 1):
        name = folder if folders.count(folder) == whole.count(path) else path
        names.append(name if whole.count(path) == 1 else f"{name} ({place})")
    return names


def _space(path: Path) -> str:
    """What the numbers of a sample are: pixels and latents of one shape are not the same."""
    if is_diffusers(path):
        return "latents" if (path / "vae").is_dir() else ""
    if _is_run(path):
        kind = RunConfig.load(_config(path)).data.whole.kind
    else:
        kind = str(load_manifest(path).extra.get("data", ""))
    if not kind:
        return ""
    return "latents" if kind == "latents" else "data"


def _is_run(path: str | Path) -> bool:
    return _config(path).is_file() and not is_diffusers(path)


def _config(path: str | Path) -> Path:
    return Path(path) / "config.json"


def composed_of(run: LoadedRun) -> Composed | None:
    """What a report says of a composition; None for any other model."""
    model = run.model
    if not isinstance(model, Composition):
        return None
    names, config = model.members.names, model.config
    factors = [f"{name}^{beta:g}" for name, beta in zip(names, model.betas, strict=True)]
    if config.mode == "tilt":
        reward = config.reward.kind if config.reward is not None else "reward"
        factors.append(f"exp({config.tilt:g} {reward})")
    dims = math.prod(run.source.shape)
    return Composed(
        mode=config.mode,
        target=" ".join(factors),
        experts=[
            (name, beta, str(told))
            for name, beta, told in zip(names, model.betas, model.labels, strict=True)
        ],
        corrected=config.corrector == "fkc",
        log_prior=model.log_prior(dims),
    )
