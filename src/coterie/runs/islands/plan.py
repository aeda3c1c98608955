"""A plan of islands: one folder in which every expert is an ordinary run that shares nothing with
the others.

    islands.json        the plan: base run, partition and its digest, one entry per island
    partition/          the island of every sample (sealed, hashed)
    island-0/ ...       run directories; ``coterie train PLAN/island-0`` is all an island needs
    router/             the run that learns P(island | noisy sample)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from coterie.core.config import Config, override
from coterie.core.errors import ConfigError, describe
from coterie.core.folder import clean, write_text
from coterie.core.json_reader import parse_json, read_json
from coterie.core.paths import beside
from coterie.data.parts.shard import ShardConfig, write_shard
from coterie.data.source import SPLITS
from coterie.runs.build import build_source
from coterie.runs.config import RunConfig
from coterie.runs.cost import plan
from coterie.runs.islands.partition import Islands, PartitionConfig, copy_partition, partition_of
from coterie.runs.islands.source import IslandConfig
from coterie.train.run_directory import RunDir

FILE = "islands.json"
_WRITTEN = re.compile(r"islands\.json|partition")
Budget = Literal["batch", "steps", "each"]


class IslandEntry(Config):
    """One island of a plan; ``sha256`` is of the indices of its training samples."""

    index: int
    folder: str = Field(pattern=r"^island-\d+$")  # no other place than one in the plan
    samples: int
    sha256: str


class IslandPlan(Config):
    """``base``: the run that one model on all the data would be. ``cut``: digest of the partition.

    ``budget``: how the islands share the base's samples: each has its batch divided by the number
    of islands, or its steps, or the whole of both ("each").
    """

    version: Literal[1] = 1
    base: RunConfig
    partition: PartitionConfig
    cut: str
    budget: Budget
    islands: tuple[IslandEntry, ...]

    def whole(self, folder: Path) -> IslandConfig:
        """The data with the island of each sample as its task."""
        return IslandConfig(
            data=self.base.data,
            partition=self.partition,
            path=str(folder / "partition"),
            cut=self.cut,
        )

    def data(self, folder: Path, index: int) -> IslandConfig:
        return self.whole(folder).replace(index=index)


def make_plan(
    base: RunConfig,
    partition: PartitionConfig,
    out: str | Path,
    budget: Budget = "batch",
    changes: Mapping[int, Mapping[str, Any]] | None = None,
    export: bool = False,
) -> IslandPlan:
    """Cut the data of ``base`` and write one run directory per island, none of them begun.

    ``changes``: ``{island: {path: value}}`` into that island's configuration, where islands differ
    in size or in steps. ``export``: write each island's samples into its own folder, which is then
    all that its machine needs. The same call again leaves everything as it is; another one into the
    same folder is refused (ConfigError, CheckpointError).
    """
    out = Path(out)
    changes = dict(changes or {})
    share = shared_budget(base, partition.islands, budget)  # refuses before anything is written
    for index in changes:
        if not 0 <= index < partition.islands:
            raise ConfigError(describe("island", index, f"0..{partition.islands - 1}"))
    with RunDir(out).lock():  # nobody else writes here, so what a killed call left may go
        clean(out, _WRITTEN)
        islands = copy_partition(base.data, partition, out / "partition")
        made = IslandPlan(
            base=base,
            partition=partition,
            cut=islands.digest,
            budget=budget,
            islands=_entries(islands),
        )
        for entry in made.islands:
            data = made.data(out, entry.index)
            config = share.replace(data=_exported(data, out, entry) if export else data)
            config = override(config, changes.get(entry.index, {}))
            build_source(config)  # an island whose model cannot read its data is refused here
            run = RunDir(out / entry.folder)
            run.write_config(run.stored_form(config))
        _write_once(out / FILE, made)
    return made


def shared_budget(base: RunConfig, islands: int, budget: Budget) -> RunConfig:
    """What one island trains when all together see as many samples as ``base`` does."""
    if budget == "each":
        return base
    value = getattr(base.train, budget)
    if value % islands:
        hint = "or share it another way: --budget steps | batch | each"
        allowed = f"a multiple of {islands} islands"
        raise ConfigError(describe(f"train.{budget}", value, allowed, hint))
    return base.replace(train=base.train.replace(**{budget: value // islands}))


def read_plan(folder: str | Path) -> IslandPlan:
    """ConfigError if there is none."""
    path = Path(folder) / FILE
    if not path.is_file():
        hint = "make one: coterie island plan RECIPE --out FOLDER"
        raise ConfigError(describe("PLAN", str(folder), f"a folder with {FILE}", hint))
    return IslandPlan.load(path)


def preview(base: RunConfig, partition: PartitionConfig, budget: Budget) -> dict[str, Any]:
    """Sizes and cost of a plan before anything is trained; the partition is drawn (and kept)."""
    islands = partition_of(base.data, partition)
    share = shared_budget(base, partition.islands, budget)
    one, monolith = plan(share), plan(base)
    return {
        "islands": partition.islands,
        "samples": islands.counts.tolist(),
        "share": [round(float(value), 4) for value in islands.prior],
        "steps": share.train.steps,
        "batch": share.train.batch,
        "parameters_per_island": one["parameters_total"],
        "projected_minutes_per_island": one["projected_minutes"],
        "projected_minutes_of_one_model": monolith["projected_minutes"],
    }


def _exported(data: IslandConfig, out: Path, entry: IslandEntry) -> ShardConfig:
    """The island's samples in a folder of their own."""
    target = out / entry.folder / "shard"
    if not target.exists():
        write_shard({split: data.build(split) for split in SPLITS}, target)
    return ShardConfig(path=str(target), sha256=entry.sha256)


def _entries(islands: Islands) -> Sequence[IslandEntry]:
    counts, hashes = islands.counts, islands.sha256
    return tuple(
        IslandEntry(
            index=index, folder=f"island-{index}", samples=int(counts[index]), sha256=hashes[index]
        )
        for index in range(islands.config.islands)
    )


def _write_once(path: Path, made: IslandPlan) -> None:
    with beside(path.parent):
        text = made.to_json()
    if path.is_file() and read_json(path) != parse_json(text):
        raise ConfigError(f"{path}: holds another plan; use another folder")
    write_text(path, text + "\n")
