"""Several tasks on one input: embedded fields, levels of experts, a tower per task.

Every multi-task mixture is a configuration of the same levels: shared-bottom (one expert for all),
MMoE (Ma et al., KDD 2018: several), CGC and PLE (Tang et al., RecSys 2020: shared ones and each
task's own, on one level or several), HoME (arXiv:2408.05430: a level of groups of tasks below one
of tasks, normalised experts, feature gates, self gates). A level is an expert layer whose rows are
what is asked of a sample: one routing per task, or per group, over experts that answer once.

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
    """A categorical field: ids 0..size-1, up to ``columns`` of them (a set; -1 fills it up)."""

    name: str
    size: PositiveInt
    columns: Few = 1


class LevelConfig(Config):
    """Experts for everybody (``shared``), for each group of tasks (``group``), for each task
    (``task``): how many. ``width``: of their answers. Who reads them: the ``tasks``, or the
    ``groups``; below the last level one reader more, who sees all, feeds the shared experts above.
    """

    shared: int = Field(0, ge=0, le=4096)
    group: int = Field(0, ge=0, le=4096)
    task: int = Field(0, ge=0, le=4096)
    width: PositiveInt = 32
    readers: Literal["tasks", "groups"] = "tasks"


@BACKBONES.register
class MultiTaskConfig(BackbonePart):
    """``groups``: names of tasks under the name of their group; {}: one group of all.

    ``mask`` False lets every reader see all experts. ``gates``: what the gates of later levels
    read: the features, the reader's ``own`` stream, or ``shared_own``, that and the shared one.
    ``expert``: what an expert is; ``out``, ``streams`` and ``reads`` are the level's business.
    ``self_gate``: second gates for a reader's own experts. ``tower``: inner size of a task's tower;
    None: one linear map.
    """

    kind: Literal["multitask"] = "multitask"
    answers: ClassVar[Literal["sample", "logits", "tasks"]] = "tasks"
    told: ClassVar[frozenset[str]] = frozenset({"task"})
    fields: tuple[FieldConfig, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1)
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    embedding: PositiveInt = 12
    levels: tuple[LevelConfig, ...] = Field(default=(LevelConfig(shared=1),), min_length=1)
    expert: NormMLP = NormMLP(norm="none", activation="relu")
    mask: bool = True
    gates: Literal["features", "own", "shared_own"] = "features"
    self_gate: bool = False
    tower: PositiveInt | None = None
    balance: tuple[Annotated[SerializeAsAny[Part], BALANCES.validator], ...] = ()

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
        """The group of each task; groups are numbered by their first task, as JSON has its own
        order of names."""
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
        """Who reads and sees whom on each level."""
        sizes = [(one.shared, one.group, one.task, one.readers) for one in self.levels]
        return lay_out(sizes, self.group_of, self.mask)

    def check_source(self, source: Any) -> None:
        """ConfigError where a source of ratings has other fields or tasks."""
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
        """``tasks``: answer these alone, [B, len(tasks)]; what only others read is not computed."""
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
