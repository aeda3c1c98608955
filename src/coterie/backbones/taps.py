"""Networks that run layer by layer: a layer's answer goes out, what the next one reads comes in.

    run = network.layers(x, ctx, cond)     # a generator; its value is that of forward
    tap = next(run)                        # after the first layer
    tap = run.send(tap.feature)            # on with its answer, or with anything of its shape

A network says by ``topology()`` where it can be tapped, without being run. Several of one topology
run in :func:`lockstep`: at every point somebody sees the answers of all, and decides what each of
them goes on with (Adaptive Feature Aggregation). A residual or a skip connection that begins at a
point carries what came in there.
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
    """A place after a layer. Its feature is [B, ``channels``, H, W]; or, where the tokens of an
    image lie on a ``grid`` (row-major), [B, N, ``channels``]."""

    name: str
    channels: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Topology:
    """Where a network can be tapped, in running order; the last point is its answer.

    ``time_width``: of the embedding of the noise level that its taps carry; ``condition_width``: of
    the tokens of the condition (0: there are none).
    """

    points: tuple[Point, ...]
    time_width: int
    condition_width: int = 0


@dataclass(frozen=True, eq=False)
class Tap:
    """What a network shows at a point: the layer's answer, and the state it was made in.

    ``ctx.time_embedding`` [B, T] is its own; ``tokens`` [B, M, C] is the condition as it reads it.
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
    """ConfigError where a network cannot run layer by layer."""
    if isinstance(network, Layered):
        return network
    hint = "transformers of image patches and U-Nets do"
    raise ConfigError(describe(field, type(network).__name__, "one that runs by layers", hint))


def finish(run: Layers[T]) -> T:
    """Run to the end, each layer reading what the one before answered."""
    return lockstep([run], lambda taps: [tap.feature for tap in taps])[0]


def lockstep(
    runs: Sequence[Layers[T]], join: Callable[[Sequence[Tap]], Sequence[Tensor]]
) -> list[T]:
    """Run networks side by side to their ends.

    ``join(taps)`` sees one tap of each and answers what each goes on with. DataError where they are
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
    """``run`` inside a scope of its own, which it leaves while it waits: expert slots of networks
    that take turns each read theirs."""
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
    """ConfigError unless all are those of the first; it names the first point that differs."""
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
