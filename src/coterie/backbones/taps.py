"""Running networks layer by layer, with access to the features in between.

    run = network.layers(x, ctx, cond)     # a generator; its value is that of forward
    tap = next(run)                        # after the first layer
    tap = run.send(tap.feature)            # continue with its output, or another tensor

``topology()`` lists the points at which a network can be tapped. :func:`lockstep` runs several
networks of one topology together: at every point a function gets the features of all, and decides
what each continues with (Adaptive Feature Aggregation). A residual or skip connection that begins
at a point carries the tensor that was sent in there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from coterie.backbones.scope import Call, again
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError, describe

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A point after a layer. Its feature is [B, ``channels``, H, W]; or [B, N, ``channels``] where
    the tokens lie on a ``grid`` (row-major)."""

    name: str
    channels: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Topology:
    """The points of a network in running order; the last one is its output.

    ``time_width``: size of the time embedding in its taps; ``condition_width``: size of the tokens
    of the condition (0: none).
    """

    points: tuple[Point, ...]
    time_width: int
    condition_width: int = 0


@dataclass(frozen=True, eq=False)
class Tap:
    """The feature at a point, with its Context.

    ``ctx.time_embedding`` is [B, T]; ``tokens`` [B, M, C] is the condition.
    """

    name: str
    feature: Tensor
    ctx: Context
    tokens: Tensor | None = None
    mask: Tensor | None = None  # bool [B, M], False = nothing there


Layers = Generator[Tap, Tensor, T]
"""A network on its way; what is sent goes on in the place of the feature that was shown."""


@runtime_checkable
class Layered(Protocol):
    """A backbone or a denoiser that can run layer by layer."""

    def topology(self) -> Topology: ...

    def layers(self, *args: Any, **kwargs: Any) -> Layers[Any]: ...


def as_layered(network: Any, field: str) -> Layered:
    """``network``, checked; ConfigError if it cannot run layer by layer."""
    if isinstance(network, Layered):
        return network
    hint = "transformers of image patches and U-Nets do"
    raise ConfigError(describe(field, type(network).__name__, "one that runs by layers", hint))


def finish(run: Layers[T]) -> T:
    """Run to the end without changing any feature."""
    return lockstep([run], lambda taps: [tap.feature for tap in taps])[0]


def lockstep(
    runs: Sequence[Layers[T]], join: Callable[[Sequence[Tap]], Sequence[Tensor]]
) -> list[T]:
    """Run networks together, point by point, to their ends.

    ``join(taps)`` gets one tap of each and returns what each continues with. DataError if they are
    not at the same point, or their features differ in shape.
    """
    taps = [next(run) for run in runs]
    while True:
        _check_same(taps)
        after: list[Tap] = []
        values: list[T] = []
        for run, tap, feature in zip(runs, taps, join(taps), strict=True):
            try:
                after.append(run.send(feature.to(tap.feature)))
            except StopIteration as end:
                values.append(end.value)
        if len(values) == len(runs):
            return values
        if values:
            raise DataError(f"lockstep: some networks end after {taps[0].name}, others go on")
        taps = after


def scoped(call: Call, run: Layers[T]) -> Layers[T]:
    """``run`` with a scope of its own that is closed while it waits, so that expert slots of
    interleaved networks each read theirs."""
    with again(call):
        tap = next(run)
    while True:
        feature = yield tap
        with again(call):
            try:
                tap = run.send(feature)
            except StopIteration as end:
                value: T = end.value
                return value


def check_same_topology(topologies: Sequence[Topology], names: Sequence[str]) -> None:
    """ConfigError unless all topologies are equal; it names the first point that differs."""
    first = topologies[0]
    for name, other in zip(names[1:], topologies[1:], strict=True):
        hint = f"experts have one topology; {names[0]!r} differs"
        for here, there in zip(first.points, other.points):
            if here != there:
                where = f"members.{name}: point {there.name}"
                raise ConfigError(describe(where, _shape(there), _shape(here), hint))
        counts = len(other.points), len(first.points)
        if counts[0] != counts[1]:
            where = f"members.{name}: points"
            raise ConfigError(describe(where, counts[0], str(counts[1]), hint))
        for field in ("time_width", "condition_width"):
            value, wanted = getattr(other, field), getattr(first, field)
            if value != wanted:
                raise ConfigError(describe(f"members.{name}: {field}", value, str(wanted), hint))


def _shape(point: Point) -> str:
    grid = "" if point.grid is None else f" on {point.grid[0]} x {point.grid[1]} tokens"
    return f"{point.name} of {point.channels} channels{grid}"


def _check_same(taps: Sequence[Tap]) -> None:
    first = taps[0]
    for number, tap in enumerate(taps):
        seen = f"{tap.name} {tuple(tap.feature.shape)}"
        wanted = f"{first.name} {tuple(first.feature.shape)}"
        if seen != wanted:
            raise DataError(describe(f"lockstep: network {number}", seen, wanted))
