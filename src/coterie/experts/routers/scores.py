"""Scores computed from the rows: linear, two layers, cosine similarity, one map per task."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Generator, Tensor, nn

from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.graphs import recorded
from coterie.core.tensors import effective
from coterie.experts.routers.base import SCORES, Scored, ScoreModule, ScorePart, per_row


def init_linear(linear: nn.Linear, std: float | None, rng: Generator | None) -> None:
    """N(0, std), or Kaiming uniform with a = sqrt(5) (bound 1/sqrt(fan_in)); bias 0."""
    with torch.no_grad():
        if std is None:
            bound = 1.0 / math.sqrt(linear.in_features)
            linear.weight.uniform_(-bound, bound, generator=rng)
        else:
            linear.weight.normal_(0.0, std, generator=rng)
        if linear.bias is not None:
            linear.bias.zero_()


def linear_f32(linear: nn.Linear, x: Tensor) -> Tensor:
    """The map in float32 whatever the parameters' storage type."""
    own = effective(linear)
    bias = None if linear.bias is None else own["bias"].float()
    return F.linear(x, own["weight"].float(), bias)


def linear_by_task(
    linear: nn.Linear, num_tasks: int, x: Tensor, task: Tensor, tokens: int
) -> Tensor:
    """f32 [R, E]: the map of each row's task on x f32 [R, D]; ``linear`` has E outputs for each of
    ``num_tasks``. ``tokens``: rows of a sample."""
    weight = effective(linear)["weight"].float().unflatten(0, (num_tasks, -1))  # [T, E, D]
    samples = x.shape[0] // max(1, tokens)
    x, task = x.view(samples, tokens, x.shape[1]), task.view(samples, tokens)
    if (
        not recorded() and len(x) and bool((task == task[:1]).all())
    ):  # every sample is asked the same
        return torch.bmm(x.transpose(0, 1), weight[task[0]].mT).transpose(0, 1).flatten(0, 1)
    every = torch.einsum("bnd,ted->bnte", x, weight)
    index = task[:, :, None, None].expand(-1, -1, 1, weight.shape[1])
    return every.gather(2, index).flatten(0, 2)


@SCORES.register
class LinearScore(ScorePart):
    """A linear map of the row: ``logits = x W^T (+ b)``."""

    kind: Literal["linear"] = "linear"
    bias: bool = False  # add a bias
    init_std: NonNegativeFloat | None = None
    """of the weights; null: Kaiming uniform (DiT-MoE), or the layer's rule"""

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _Linear(self, width, num_experts)


class _Linear(ScoreModule):
    def __init__(self, config: LinearScore, width: int, num_experts: int) -> None:
        super().__init__()
        self.std = config.init_std
        self.proj = nn.Linear(width, num_experts, bias=config.bias)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        return Scored(linear_f32(self.proj, x))

    def reset_parameters(self, rng: Generator | None) -> None:
        init_linear(self.proj, self.std, rng)


@SCORES.register
class GivenScore(ScorePart):
    """The rows are the logits, for scores computed elsewhere (recorded, edited, another library's).

    The router's width is then the number of experts.
    """

    kind: Literal["given"] = "given"
    learned: ClassVar[bool] = False

    def check(self, num_experts: int, width: int) -> None:
        if width != num_experts:
            hint = f"rows of width {width} are the logits of as many candidates"
            raise ConfigError(describe("kind", self.kind, f"given, with {width} experts", hint))

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _Given()


class _Given(ScoreModule):
    def forward(self, x: Tensor, ctx: Context) -> Scored:
        return Scored(x)


@SCORES.register
class MLPScore(ScorePart):
    """Two layers: ``W2 GELU(W1 x + b1) + b2``."""

    kind: Literal["mlp"] = "mlp"
    hidden: PositiveInt | None = None  # inner size; null: twice the width
    init_std: NonNegativeFloat | None = 0.02  # of the weights; null: Kaiming uniform

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return TwoLayer(width, self.hidden or 2 * width, num_experts, self.init_std)


class TwoLayer(ScoreModule):
    """The module of :class:`MLPScore`."""

    def __init__(self, width: int, hidden: int, num_experts: int, std: float | None) -> None:
        super().__init__()
        self.std = std
        self.inner = nn.Linear(width, hidden)
        self.proj = nn.Linear(hidden, num_experts)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        return Scored(linear_f32(self.proj, F.gelu(linear_f32(self.inner, x))))

    def reset_parameters(self, rng: Generator | None) -> None:
        init_linear(self.inner, self.std, rng)
        init_linear(self.proj, self.std, rng)


@SCORES.register
class CosineScore(ScorePart):
    """Cosine similarity of the row and a learned prototype per expert.

    As in ProMoE (arXiv:2510.24711).
    """

    kind: Literal["cosine"] = "cosine"
    init_std: NonNegativeFloat = 0.02  # of the prototypes

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _Cosine(self, width, num_experts)


class _Cosine(ScoreModule):
    def __init__(self, config: CosineScore, width: int, num_experts: int) -> None:
        super().__init__()
        self.std = config.init_std
        self.prototypes = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        prototypes = self.prototypes.float()
        logits = F.normalize(x, dim=-1) @ F.normalize(prototypes, dim=-1).T
        return Scored(logits, prototypes=prototypes)

    def reset_parameters(self, rng: Generator | None) -> None:
        with torch.no_grad():
            self.prototypes.normal_(0.0, self.std, generator=rng)


@SCORES.register
class TaskLinearScore(ScorePart):
    """One linear map per task, chosen by ``ctx.task`` (HoME, MMoE)."""

    kind: Literal["task_linear"] = "task_linear"
    num_tasks: int = Field(ge=1, le=65536)  # number of tasks
    init_std: NonNegativeFloat | None = None  # of the weights; null: Kaiming uniform

    @property
    def reads(self) -> tuple[str, ...]:
        return ("task",)

    def build(self, width: int, num_experts: int, time_width: int | None) -> ScoreModule:
        return _TaskLinear(self, width, num_experts)


class _TaskLinear(ScoreModule):
    def __init__(self, config: TaskLinearScore, width: int, num_experts: int) -> None:
        super().__init__()
        self.std = config.init_std
        self.num_tasks = config.num_tasks
        self.num_experts = num_experts
        self.proj = nn.Linear(width, config.num_tasks * num_experts, bias=False)

    def forward(self, x: Tensor, ctx: Context) -> Scored:
        if ctx.task is None:
            raise ConfigError("router.score: task_linear needs a task in the context")
        task = per_row(ctx.task, (ctx.batch, ctx.tokens), x.shape[0])
        tokens = ctx.tokens if x.shape[0] == ctx.batch * ctx.tokens else 1
        return Scored(linear_by_task(self.proj, self.num_tasks, x, task, tokens))

    def reset_parameters(self, rng: Generator | None) -> None:
        init_linear(self.proj, self.std, rng)
