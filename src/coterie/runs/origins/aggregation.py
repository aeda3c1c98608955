"""Trained models of one topology as members of one: what to train on them, and whether to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.core.config import override
from coterie.core.errors import ConfigError, describe
from coterie.ensembles import EnsembleModelConfig, MemberConfig, Members
from coterie.ensembles.aggregate import AggregateConfig
from coterie.ensembles.headroom import Headroom, headroom
from coterie.process import PROCESSES
from coterie.runs.build import build_source
from coterie.runs.config import RunConfig
from coterie.runs.judges.base import batches
from coterie.runs.origins.composition import check_data_named, first_run, members_at
from coterie.train.config import TrainConfig

STEPS = 1000


def aggregated_run(
    runs: Sequence[str | Path],
    aggregate: AggregateConfig,
    changes: Mapping[str, Any] | None = None,
    process: str | None = None,
    view: str | None = None,
) -> RunConfig:
    """The configuration of a run that trains aggregators of the features of ``runs``: runs, model
    directories, pipelines or networks of diffusers.

    Data (whole, where the first run saw a part of it), objective and sampling are those of the
    first run; ``changes`` are paths into the configuration, and name the data where there is no
    run. ``process`` and ``view``: of networks of diffusers without a scheduler. ConfigError where
    nothing lies at a path.
    """
    changes = changes or {}
    part = None if process is None else PROCESSES.parse(process)
    members = members_at(runs, part, view)
    model = EnsembleModelConfig(ensemble=aggregate, members=members)
    train = TrainConfig(steps=0 if aggregate.is_trained else STEPS)
    first = first_run(runs)
    if first is None:
        check_data_named(changes.get("data"), runs)
        return override(RunConfig(model=model, train=train), changes)
    made = first.replace(
        recipe="",
        preset="",
        init=None,
        data=first.data.whole,
        model=model,
        train=first.train.replace(steps=train.steps),
    )
    return override(made, changes)


def probe_headroom(
    runs: Sequence[str | Path],
    changes: Mapping[str, Any] | None = None,
    samples: int = 256,
    process: str | None = None,
    view: str | None = None,
) -> Headroom:
    """What choosing among ``runs`` could be worth on held-out data; see
    :mod:`coterie.ensembles.headroom`. Arguments as of :func:`aggregated_run`."""
    if len(runs) < 2:
        raise ConfigError(describe("RUN", [str(run) for run in runs], "two or more runs"))
    config = aggregated_run(runs, AggregateConfig(gate="uniform"), changes, process, view)
    members: tuple[MemberConfig, ...] = config.model.members
    built = {member.name: member.model.build() for member in members if member.model is not None}
    traits = {member.name: member.traits for member in members}
    seen = batches(build_source(config, "held_out"), 64, samples)
    return headroom(Members(built, traits=traits), seen)
