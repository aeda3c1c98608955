"""Layout of multi-task experts: levels, owners of experts, and which experts each task reads.

Each expert of a level belongs to all tasks (``shared``), to a group of tasks or to one task. Each
*reader* (a task or a group) has a gate over the experts that it may use. The outputs for the
readers of one level are the *streams* that experts of the next level read. An expert reads the
stream of its owner; if its owner is no reader below, that of the owner's group, or the shared one.

Legend: B samples, D features, R readers, S streams, O outputs of a level, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.registry import Part
from coterie.core.routing import Routing
from coterie.experts import ExpertLayer, ExpertLayerConfig, RouterConfig
from coterie.experts.kinds import NormMLP
from coterie.experts.routers import CandidateMask, Dense, TaskLinearScore
from coterie.experts.self_gate import SelfGateConfig

Gates = Literal["features", "own", "shared_own"]
Readers = Literal["tasks", "groups"]


class Party(NamedTuple):
    """An owner of experts or a reader: all tasks, a group, or a task."""

    kind: Literal["shared", "group", "task"]
    number: int = 0


SHARED = Party("shared")


@dataclass(frozen=True)
class LevelPlan:
    """Layout of one level."""

    owners: tuple[Party, ...]  # [E]
    readers: tuple[Party, ...]  # [R]
    below: tuple[Party, ...]  # [S], readers of the level below; () on the first level
    group_of: tuple[int, ...]  # group of each task
    mask: bool  # readers use only their own and shared experts

    def own(self, reader: Party) -> tuple[int, ...]:
        """Experts that belong to this reader alone."""
        mine = reader != SHARED
        return tuple(e for e, owner in enumerate(self.owners) if mine and owner == reader)

    def sees(self, reader: Party) -> tuple[int, ...]:
        """Experts among which the reader's gate chooses."""
        if not self.mask or reader == SHARED:
            return tuple(range(len(self.owners)))
        line = (SHARED, reader, self._group(reader))
        return tuple(e for e, owner in enumerate(self.owners) if owner in line)

    def _group(self, party: Party) -> Party:
        return Party("group", self.group_of[party.number]) if party.kind == "task" else party

    def number(self, reader: Party) -> int:
        """A reader's number: tasks first, then groups, then the shared reader."""
        groups = max(self.group_of) + 1
        first = {"task": 0, "group": len(self.group_of), "shared": len(self.group_of) + groups}
        return first[reader.kind] + reader.number

    def stream(self, party: Party) -> int:
        """Number of the stream that an owner's experts or a reader's gate read."""
        for one in (party, self._group(party)):
            if one in self.below:
                return self.below.index(one)
        return self.below.index(SHARED) if self.below else 0

    def streams_for(self, readers: Sequence[int], gates: Gates) -> list[int]:
        """Numbers of the streams that these readers need."""
        parties = [self.readers[reader] for reader in readers]
        seen = {self.stream(self.owners[e]) for party in parties for e in self.sees(party)}
        if gates != "features":
            seen |= {self.stream(party) for party in parties}
        if gates == "shared_own":
            seen.add(self.stream(SHARED))
        return sorted(seen)

    def layer(
        self, expert: NormMLP, self_gate: bool, later: bool, balance: tuple[Part, ...]
    ) -> ExpertLayerConfig:
        """The expert layer of this level. ``later``: not the first level, so gates read
        ``gates``."""
        count, kind = len(self.owners), expert
        if len(self.below) > 1:
            reads = tuple(self.stream(owner) for owner in self.owners)
            kind = expert.replace(streams=len(self.below), reads=reads)
        sees = tuple(self.sees(reader) for reader in self.readers)
        closed = any(len(one) < count for one in sees)
        own = tuple(self.own(reader) for reader in self.readers)
        return ExpertLayerConfig(
            num_experts=count,
            experts=kind,
            router=RouterConfig(
                score=TaskLinearScore(num_tasks=len(self.readers)),
                edits=(CandidateMask(by_task=sees),) if closed else (),
                select=Dense(),
            ),
            router_reads="stream" if later else "input",
            self_gate=SelfGateConfig(by_task=own) if self_gate and any(own) else None,
            balance=balance,
        )


def lay_out(
    sizes: Sequence[tuple[int, int, int, Readers]], group_of: tuple[int, ...], mask: bool
) -> list[LevelPlan]:
    """One plan per level from its ``(shared, group, task, readers)``: numbers of experts for all
    tasks, for each group and for each task.

    ConfigError if a reader would have no expert.
    """
    tasks = [Party("task", number) for number in range(len(group_of))]
    groups = [Party("group", number) for number in range(max(group_of) + 1)]
    plans: list[LevelPlan] = []
    below: tuple[Party, ...] = ()
    for number, (shared, group, task, readers) in enumerate(sizes):
        owners = [SHARED] * shared
        owners += [party for party in groups for _ in range(group)]
        owners += [party for party in tasks for _ in range(task)]
        last = number == len(sizes) - 1
        who = (tasks if readers == "tasks" else groups) + ([] if last else [SHARED])
        plan = LevelPlan(tuple(owners), tuple(who), below, group_of, mask)
        if not all(plan.sees(reader) for reader in who):
            hint = "every reader needs an expert that it may see"
            raise ConfigError(describe(f"levels.{number}", (shared, group, task), "more", hint))
        plans.append(plan)
        below = plan.readers
    return plans


class Level(nn.Module):
    """One level: ``forward(z [B, S, D'], features [B, D], readers, ctx) -> (z [B, R, O],
    routings)``.

    ``readers``: numbers of the readers to compute; rows of others are 0, or left out on the last
    level. In the routings ``task`` counts tasks, then groups, then the shared reader.
    """

    def __init__(
        self,
        plan: LevelPlan,
        config: ExpertLayerConfig,
        width: int,
        streams: int,
        features: int,
        gates: Gates,
    ) -> None:
        super().__init__()
        self.plan, self.gates = plan, gates
        scored = {"features": features, "own": width, "shared_own": 2 * width}[gates]
        self.experts: ExpertLayer = config.build(streams * width, stream_width=scored)
        own = torch.tensor([plan.stream(reader) for reader in plan.readers])
        self.register_buffer("own", own, persistent=False)
        number = torch.tensor([plan.number(reader) for reader in plan.readers])
        self.register_buffer("number", number, persistent=False)

    def forward(
        self, z: Tensor, features: Tensor, readers: list[int], ctx: Context
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        batch, count = len(z), len(readers)
        task = torch.tensor(readers, device=z.device).expand(batch, count)
        ctx = ctx.replace(tokens=count, task=task, stream=self._read(z, features, readers))
        # One row that is asked several times: expanded, not copied.
        h = z.flatten(1)[:, None].expand(-1, count, -1)
        answer = self.experts(h, ctx)
        y: Tensor = answer.y
        asked = self.get_buffer("number")[task]
        routings = tuple(routing.replace(task=asked) for routing in answer.routings)
        last = all(reader.kind == "task" for reader in self.plan.readers)
        if last or count == len(self.plan.readers):
            return y, routings
        full = y.new_zeros(batch, len(self.plan.readers), y.shape[2])
        return full.index_copy(1, task[0], y), routings

    def _read(self, z: Tensor, features: Tensor, readers: list[int]) -> Tensor:
        """[B, R, ...]: what the gates of later levels read."""
        if self.gates == "features" or not self.plan.below:
            return features[:, None].expand(-1, len(readers), -1)
        own = z.index_select(1, self.get_buffer("own")[readers])
        if self.gates == "own":
            return own
        shared = z[:, [self.plan.stream(SHARED)]].expand_as(own)
        return torch.cat([shared, own], dim=2)
