"""How much a perfect choice among experts would gain, measured before a router is trained.

All experts denoise the same noisy input. The *oracle* takes, at each pixel, the expert with the
least squared error: no router can do better, but part of its gain is chance. So the winners under
one noise are evaluated under a second noise of the same picture and level; the gain that remains is
*predictable*, and only that can be learned. Similar experts have an oracle gain but no predictable
one.

Shapes: B batch, N experts, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.errors import ConfigError, describe
from coterie.core.rng import generator
from coterie.ensembles.members import Members, check_alike
from coterie.process import Process, as_view, target_of

GO = 0.02
"""Below this predictable gain over the best single expert, aggregators have little to learn."""
NOISES = (0, 1)  # seeds; who wins under the one is asked under the other
LEVELS = 10


@dataclass(frozen=True)
class Level:
    """Mean squared errors of eps at one noise level."""

    noise: float  # t in [0, 1]
    alone: tuple[float, ...]  # of each expert
    oracle: float  # of the winners per pixel, under the same noise
    predictable: float  # of the winners per pixel, under the second noise
    per_sample: float  # of the winners per sample, under the second noise
    agreement: float  # share of pixels with the same winner under both noises
    chance: float  # that share for independent winners


@dataclass(frozen=True)
class Headroom:
    """Errors per noise level. Gains are relative to ``best``, the best single expert."""

    names: tuple[str, ...]
    levels: tuple[Level, ...]
    samples: int

    @property
    def alone(self) -> tuple[float, ...]:
        """Mean error of each expert."""
        return tuple(_mean(column) for column in zip(*[level.alone for level in self.levels]))

    @property
    def best(self) -> str:
        """Number of the expert with the least error over all levels."""
        return self.names[self.alone.index(min(self.alone))]

    def gain(self, of: str) -> float:
        """1 - error / error of the best; ``of``: oracle, predictable or per_sample."""
        return 1.0 - _mean([getattr(level, of) for level in self.levels]) / min(self.alone)

    @property
    def go(self) -> bool:
        """Whether training is worth its cost."""
        return max(self.gain("predictable"), self.gain("per_sample")) >= GO


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def headroom(members: Members, batches: Iterable[Batch], levels: int = LEVELS) -> Headroom:
    """Errors of members in memory on ``batches``, at ``levels`` evenly spaced noise levels.

    ConfigError unless there are two or more, with the same process and sample shape.
    """
    check_alike(members)
    if len(members) < 2 or len(members.modules) < len(members):
        raise ConfigError(describe("members", list(members.names), "two or more, in memory"))
    process: Process = members.get(0).process
    for facts in members.facts:
        if facts.process != process:
            hint = "errors are compared on the same noisy input"
            kinds = type(facts.process).__name__, type(process).__name__
            raise ConfigError(describe(f"members.{facts.name}.process", *kinds, hint))
    sums = torch.zeros(levels, len(members) + 5, dtype=torch.float64)
    samples = 0
    for batch in batches:
        samples += len(batch.ids)
        for level in range(levels):
            errors = [_errors(members, batch, (level + 0.5) / levels, seed) for seed in NOISES]
            sums[level] += _compared(*errors) * len(batch.ids)
    if not samples:
        raise ConfigError(describe("samples", 0, "1 or more"))
    rows = [
        Level((index + 0.5) / levels, tuple(row[:-5]), *row[-5:])
        for index, row in enumerate((sums / samples).tolist())
    ]
    return Headroom(members.names, tuple(rows), samples)


def _errors(members: Members, batch: Batch, unit: float, seed: int) -> Tensor:
    """Squared error of eps per pixel, mean over channels, f64 [B, N, HW]."""
    process: Process = members.get(0).process
    rng = generator(seed, "headroom", int(batch.ids[0]), round(1000 * unit))
    t = process.time_of_unit(torch.full((len(batch.ids),), unit))
    eps = torch.randn(batch.x.shape, generator=rng)
    x_t = process.diffuse(batch.x, eps, t)
    target = target_of(process, batch.x, eps, "eps", t)
    out = []
    for index in range(len(members)):
        answer = as_view(process, members.get(index)(x_t, t, batch.cond), "eps", x_t, t)
        gap = (answer.value - target).double().square()
        out.append(gap.mean(1).flatten(1) if gap.dim() > 2 else gap)
    return torch.stack(out, dim=1)


def _compared(first: Tensor, second: Tensor) -> Tensor:
    """Errors under two noises, [B, N, P] each -> f64 [N + 5], in the order of :class:`Level`."""
    winners = [errors.argmin(1, keepdim=True) for errors in (first, second)]
    pairs = [(first, winners[1]), (second, winners[0])]
    alone = (first + second).mean((0, 2)) / 2
    oracle = (first.amin(1).mean() + second.amin(1).mean()) / 2
    predictable = sum(errors.gather(1, other).mean() for errors, other in pairs) / 2
    means = [first.mean(2), second.mean(2)]
    per_sample = (
        sum(
            here.gather(1, there.argmin(1, keepdim=True)).mean()
            for here, there in (means, means[::-1])
        )
        / 2
    )
    agreement = (winners[0] == winners[1]).double().mean()
    shares = [
        torch.bincount(winner.flatten(), minlength=first.shape[1]).double() / winner.numel()
        for winner in winners
    ]
    chance = (shares[0] * shares[1]).sum()
    rest = torch.stack(
        [torch.as_tensor(v) for v in (oracle, predictable, per_sample, agreement, chance)]
    )
    return torch.cat([alone, rest.double()])
