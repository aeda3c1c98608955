"""How a Context reaches expert slots inside a network whose code knows nothing of it.

    with scope(ctx) as call:
        out = network(x, t)
    call.routings

A slot reads the scope around it. A scope is local to its thread and task, and what it holds ends
with the block: nothing is left in the network, and nothing depends on a flag. So is a recording,
which lists what the slots of one owner answer, in whatever scopes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from coterie.core.context import Context
from coterie.core.routing import Routing


@dataclass(eq=False)
class Call:
    """One call of a network with slots: what they are told, what they answered, the state of
    recurrent routers by slot, the scope around this one, the network it is of, who closes it."""

    ctx: Context
    routings: list[Routing] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    outer: Call | None = None
    network: object = None
    opener: object = None


@dataclass(eq=False)
class Recording:
    """What the slots of ``owner`` answered since it was opened."""

    owner: object
    routings: list[Routing] = field(default_factory=list)


_CALL: ContextVar[Call | None] = ContextVar("coterie_call", default=None)
_RECORDINGS: ContextVar[tuple[Recording, ...]] = ContextVar("coterie_recordings", default=())


def current() -> Call | None:
    return _CALL.get()


def enter(ctx: Context, network: object = None) -> Call:
    """Open a scope. Close it by :func:`leave`."""
    call = Call(ctx, outer=_CALL.get(), network=network)
    _CALL.set(call)
    return call


def leave(call: Call) -> None:
    """Back to what was before ``call``."""
    _CALL.set(call.outer)


@contextmanager
def scope(ctx: Context, network: object = None) -> Iterator[Call]:
    """Inside the block every slot that is called sees ``ctx``."""
    call = enter(ctx, network)
    try:
        yield call
    finally:
        leave(call)


@contextmanager
def again(call: Call) -> Iterator[None]:
    """Inside the block the scope is ``call``, made before: for networks that run in parts."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def recording(owner: object) -> Iterator[list[Routing]]:
    """Inside the block whatever the slots of ``owner`` answer is appended to the list; so it is to
    the lists of all other recordings of that owner that are open."""
    opened = Recording(owner)
    token = _RECORDINGS.set((*_RECORDINGS.get(), opened))
    try:
        yield opened.routings
    finally:
        _RECORDINGS.reset(token)


def record(call: Call, routings: Iterable[Routing]) -> None:
    """A slot's answer, to its call and to the recordings of its owner."""
    made = tuple(routings)
    call.routings.extend(made)
    for opened in _RECORDINGS.get():
        opened.routings.extend(routing for routing in made if routing.owner is opened.owner)
