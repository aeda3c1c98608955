"""Passing a Context to expert slots inside a network whose code does not know it.

    with scope(ctx) as call:
        out = network(x, t)
    call.routings

A slot reads the innermost scope. Scopes are local to their thread and task and end with the block,
so nothing is left in the network. A :func:`recording` collects the routings of one network's slots
over any number of scopes.
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
    """One call of a network with expert slots: its Context, and what the slots returned."""

    ctx: Context
    routings: list[Routing] = field(default_factory=list)  # of the slots that have run
    states: dict[str, Tensor] = field(default_factory=dict)  # state of recurrent routers, by slot
    outer: Call | None = None  # the scope around this one
    network: object = None  # the network that the scope is for
    opener: object = None  # whoever closes the scope


@dataclass(eq=False)
class Recording:
    """Routings of the slots of ``owner`` since the recording was opened."""

    owner: object
    routings: list[Routing] = field(default_factory=list)


_CALL: ContextVar[Call | None] = ContextVar("coterie_call", default=None)
_RECORDINGS: ContextVar[tuple[Recording, ...]] = ContextVar("coterie_recordings", default=())


def current() -> Call | None:
    """The innermost scope; None outside."""
    return _CALL.get()


def enter(ctx: Context, network: object = None) -> Call:
    """Open a scope; :func:`leave` closes it."""
    call = Call(ctx, outer=_CALL.get(), network=network)
    _CALL.set(call)
    return call


def leave(call: Call) -> None:
    """Close the scope ``call``."""
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
    """Inside the block the earlier scope ``call`` is active, for networks that run in parts."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


@contextmanager
def recording(owner: object) -> Iterator[list[Routing]]:
    """Inside the block, routings of the slots of ``owner`` are appended to the list.

    Several recordings of one owner may be open.
    """
    opened = Recording(owner)
    token = _RECORDINGS.set((*_RECORDINGS.get(), opened))
    try:
        yield opened.routings
    finally:
        _RECORDINGS.reset(token)


def record(call: Call, routings: Iterable[Routing]) -> None:
    """Add a slot's routings to its call and to the recordings of its owner."""
    made = tuple(routings)
    call.routings.extend(made)
    for opened in _RECORDINGS.get():
        opened.routings.extend(routing for routing in made if routing.owner is opened.owner)
