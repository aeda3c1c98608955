"""Multi-task mixtures: embedded fields, levels of experts, and a small network (tower) per task.

One configuration covers shared-bottom (one expert for all tasks), MMoE (Ma et al., KDD 2018:
several), CGC and PLE (Tang et al., RecSys 2020: shared ones and each task's own, on one level or
several) and HoME (arXiv:2408.05430: a level of groups of tasks below one of tasks, normalised
experts, feature gates, self gates). A level is an expert layer with one row per task (or group) of
a sample; each expert runs once per sample.

Legend: B samples, C columns, D width of the features, T tasks, R readers of a level, S streams (the
readers of the level below), O outputs of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, SerializeAsAny, model_validator
from torch import Tensor, nn

from coterie.backbones.base import BACKBONES, BackboneOutput, BackbonePart
from coterie.backbones.levels import Level, LevelPlan, lay_out
from coterie.backbones.slots import ExpertHost, System
from coterie.core.config import Config
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.numbers import Few
from coterie.core.prediction import Condition
from coterie.core.registry import Part
from coterie.experts import BALANCES, ExpertLayer
from coterie.experts.kinds import NormMLP
from coterie.nn.fields import FieldEmbedding
from coterie.nn.towers import Towers

SLOT = "level"


class FieldConfig(Config):
    """A categorical input field."""

    name: str  # of the field in the data
    size: PositiveInt  # number of ids, 0..size-1
    columns: Few = 1  # most ids per sample (a set); -1 marks unused columns


class LevelConfig(Config):
    """Numbers of experts on one level, and who reads their outputs."""

    shared: int = Field(0, ge=0, le=4096)  # experts for all tasks
    group: int = Field(0, ge=0, le=4096)  # experts for each group of tasks
    task: int = Field(0, ge=0, le=4096)  # experts for each task
    width: PositiveInt = 32  # of an expert's output
    readers: Literal["tasks", "groups"] = "tasks"
    """Gates per task or per group. Below the last level one more gate, over all experts, feeds the
    shared experts above."""


@BACKBONES.register
class MultiTaskConfig(BackbonePart):
    """Several tasks on one input, by levels of experts; MMoE, PLE and HoME are settings of it."""

    kind: Literal["multitask"] = "multitask"
    answers: ClassVar[Literal["sample", "logits", "tasks"]] = "tasks"
    told: ClassVar[frozenset[str]] = frozenset({"task"})
    fields: tuple[FieldConfig, ...] = Field(min_length=1)  # the input columns
    tasks: tuple[str, ...] = Field(min_length=1)  # names; one logit each
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """group -> names of its tasks; {}: one group of all"""
    embedding: PositiveInt = 12  # width of a field's embedding
    levels: tuple[LevelConfig, ...] = Field(default=(LevelConfig(shared=1),), min_length=1)
    """from the input to the towers"""
    expert: NormMLP = NormMLP(norm="none", activation="relu")
    """kind of expert; out, streams and reads are set by the level"""
    mask: bool = True  # False: every gate weighs all experts of its level
    gates: Literal["features", "own", "shared_own"] = "features"
    """Input of the gates above the first level: the features, the reader's ``own`` stream, or that
    and the shared one (``shared_own``)."""
    self_gate: bool = False  # second gates for a task's own experts (HoME)
    tower: PositiveInt | None = None  # inner size of a task's last network; null: a linear map
    balance: tuple[Annotated[SerializeAsAny[Part], BALANCES.validator], ...] = ()
    """load-balance losses"""

    @model_validator(mode="after")
    def _check(self) -> MultiTaskConfig:
        for what, names in (("fields", [f.name for f in self.fields]), ("tasks", self.tasks)):
            if len(set(names)) < len(names):
                raise ConfigError(describe(what, list(names), "different names"))
        grouped = [task for tasks in self.groups.values() for task in tasks]
        if self.groups and sorted(grouped) != sorted(self.tasks):
            hint = "each task is in one group"
            raise ConfigError(describe("groups", self.groups, ", ".join(self.tasks), hint))
        if self.levels[-1].readers != "tasks":
            hint = "the towers of the tasks read the last level"
            raise ConfigError(describe("levels.readers", self.levels[-1].readers, "tasks", hint))
        for field in ("out", "reads"):
            if getattr(self.expert, field) is not None:
                hint = "a level says it"
                raise ConfigError(
                    describe(f"expert.{field}", getattr(self.expert, field), "null", hint)
                )
        self.plans()
        return self

    @property
    def group_of(self) -> tuple[int, ...]:
        """The group of each task. Groups are numbered by their first task, as JSON keeps no order
        of names."""
        found: dict[frozenset[str], int] = {}
        out = []
        for task in self.tasks:
            group = next((frozenset(g) for g in self.groups.values() if task in g), frozenset())
            out.append(found.setdefault(group, len(found)))
        return tuple(out)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (sum(field.columns for field in self.fields),)

    @property
    def width(self) -> int:
        """D of the embedded fields."""
        return len(self.fields) * self.embedding

    def plans(self) -> list[LevelPlan]:
        """The layout of each level."""
        sizes = [(one.shared, one.group, one.task, one.readers) for one in self.levels]
        return lay_out(sizes, self.group_of, self.mask)

    def check_source(self, source: Any) -> None:
        """ConfigError if a data source has other fields or tasks."""
        own = [(field.name, field.size, field.columns) for field in self.fields]
        theirs = [(field.name, field.size, field.columns) for field in source.fields]
        for name, mine, found in (
            ("fields", own, theirs),
            ("tasks", list(self.tasks), list(source.task_names)),
        ):
            if mine != found:
                raise ConfigError(describe(name, mine, f"those of the source: {found}"))

    def build(self) -> MultiTask:
        return MultiTask(self)


class MultiTask(ExpertHost):
    """``forward(x i64 [B, C], ctx, cond) -> BackboneOutput`` with logits f32 [B, T]."""

    def __init__(self, config: MultiTaskConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [(field.size, field.columns) for field in config.fields]
        self.embedding = FieldEmbedding(sizes, config.embedding)
        made, width, streams = [], config.width, 1
        for number, (level, plan) in enumerate(zip(config.levels, config.plans())):
            expert = config.expert.replace(out=level.width)
            layer = plan.layer(expert, config.self_gate, number > 0, config.balance)
            made.append(Level(plan, layer, width, streams, config.width, config.gates))
            balances = [part.build() for part in config.balance]
            self._systems.append(System(SLOT, (number,), balances))
            width, streams = level.width, len(plan.readers)
            made[-1].experts.owner = self.owner
        self.levels = nn.ModuleList(made)
        self.towers = Towers(len(config.tasks), width, config.tower)
        self.reset_experts()

    def expert_layer(self, slot: str, layer: int) -> ExpertLayer:
        found: ExpertLayer = self.levels[layer].experts  # type: ignore[assignment]
        return found

    def forward(
        self, x: Tensor, ctx: Context, cond: Condition, tasks: Sequence[int] | None = None
    ) -> BackboneOutput:
        """Logits [B, T]; with ``tasks`` only those, [B, len(tasks)], at the cost of these tasks
        alone."""
        if x.shape[1:] != self.config.sample_shape:
            raise DataError(describe("x", tuple(x.shape), f"[B, {self.config.sample_shape[0]}]"))
        asked = list(range(len(self.config.tasks)) if tasks is None else tasks)
        ctx = ctx.replace(batch=len(x), slot=SLOT)
        features = self.embedding(x)
        z, routings = features[:, None], []
        for number, (level, readers) in enumerate(zip(self.levels, self._readers(asked))):
            z, made = level(z, features, readers, ctx.replace(layer=number))
            routings.extend(made)
        return BackboneOutput(self.towers(z, asked).float(), tuple(routings))

    def _readers(self, asked: list[int]) -> list[list[int]]:
        """Who must be answered on each level, so that the tasks ``asked`` can be on the last."""
        needed = [asked]
        for plan in reversed(self.config.plans()[1:]):
            needed.append(plan.streams_for(needed[-1], self.config.gates))
        return needed[::-1]
