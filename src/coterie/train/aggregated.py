"""Trained runs of one topology as members of one: what to train on top of them, and whether to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.core.config import override
from coterie.core.errors import ConfigError, describe
from coterie.ensembles import EnsembleModelConfig, MemberConfig, Members
from coterie.ensembles.aggregate import AggregateConfig
from coterie.ensembles.headroom import Headroom, headroom
from coterie.train.composed import member_of
from coterie.train.judges.base import batches
from coterie.train.run import RunConfig, build_source
from coterie.train.rundir import RunDir

STEPS = 1000


def aggregated_run(
    runs: Sequence[str | Path],
    aggregate: AggregateConfig,
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a run that trains aggregators of the features of ``runs``.

    Data (whole, where the first run saw a part of it), objective and sampling are those of the
    first run; ``changes`` are paths into the configuration. ConfigError where a run is not there.
    """
    first = RunDir(runs[0]).read_config(RunConfig)
    members = tuple(member_of(Path(path), runs) for path in runs)
    steps = 0 if aggregate.is_trained else STEPS
    made = first.replace(
        recipe="",
        preset="",
        init=None,
        data=first.data.whole,
        model=EnsembleModelConfig(ensemble=aggregate, members=members),
        train=first.train.replace(steps=steps),
    )
    return override(made, changes or {})


def probe_headroom(
    runs: Sequence[str | Path], changes: Mapping[str, Any] | None = None, samples: int = 256
) -> Headroom:
    """What choosing among ``runs`` could be worth on held-out data; see
    :mod:`coterie.ensembles.headroom`."""
    if len(runs) < 2:
        raise ConfigError(describe("RUN", [str(run) for run in runs], "two or more runs"))
    config = aggregated_run(runs, AggregateConfig(gate="uniform"), changes)
    members: tuple[MemberConfig, ...] = config.model.members
    built = {member.name: member.model.build() for member in members if member.model is not None}
    traits = {member.name: member.traits for member in members}
    seen = batches(build_source(config, "held_out"), 64, samples)
    return headroom(Members(built, traits=traits), seen)
