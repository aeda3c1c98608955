"""A run that is several trained models composed, right in distribution: it trains nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from coterie.core.errors import ConfigError, describe
from coterie.ensembles.model import EnsembleModelConfig, MemberConfig
from coterie.ensembles.product import Composition, CompositionConfig
from coterie.hub import load_manifest
from coterie.inspect.composed import Composed
from coterie.solvers import FeynmanKacConfig, GuidanceConfig
from coterie.train.initial import KINDS
from coterie.train.pretrained import PretrainedConfig
from coterie.train.run import LoadedRun, RunConfig


def composed_run(
    paths: Sequence[str | Path],
    composition: CompositionConfig,
    particles: FeynmanKacConfig | None = None,
) -> RunConfig:
    """The configuration of a run whose model is the composition of those at ``paths``: run or
    model directories, at least one of them a run: data and grid are those of the first.

    ``particles`` is for corrector "fkc". Guidance is off: it is a composition itself.
    ConfigError where nothing lies at a path, or the models are of different data.
    """
    base = next((RunConfig.load(file) for file in map(_config, paths) if file.is_file()), None)
    if base is None:
        hint = "a model directory does not say how to sample"
        raise ConfigError(describe("RUN", [str(path) for path in paths], "a run directory", hint))
    corrected = composition.corrector == "fkc"
    if corrected != (particles is not None):
        allowed = "settings of the particles" if corrected else "none without a corrector"
        raise ConfigError(describe("particles", particles, allowed))
    members = tuple(member_of(Path(path), paths) for path in paths)
    solver = particles or base.sample.solver
    count = (particles.particles if particles else None) or 1
    return base.replace(
        recipe="",
        preset="",
        init=None,
        model=EnsembleModelConfig(ensemble=composition, members=members),
        train=base.train.replace(steps=0),
        sample=base.sample.replace(
            solver=solver,
            batch=max(base.sample.batch // count, 1) * count,
            guidance=GuidanceConfig(),
        ),
    )


def member_of(path: Path, all_paths: Sequence[str | Path]) -> MemberConfig:
    model = PretrainedConfig(path=str(path))
    if model.absent:
        raise ConfigError(describe("RUN", str(path), KINDS, model.absent))
    names = [Path(other).name for other in all_paths]
    name = path.name if names.count(path.name) == 1 else str(path)
    return MemberConfig(name=name, model=model.pinned(), space=_space(path))


def _space(path: Path) -> str:
    """What the numbers of a sample are: pixels and latents of one shape are not the same."""
    if _config(path).is_file():
        kind = RunConfig.load(_config(path)).data.whole.kind
    else:
        kind = str(load_manifest(path).extra.get("data", ""))
    if not kind:
        return ""
    return "latents" if kind == "latents" else "data"


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
