"""How a Context reaches expert slots inside a network whose code knows nothing of it.

    with scope(ctx) as call:
        out = network(x, t)
    call.routings

A slot reads the scope around it. A scope is local to its thread and task, and what it holds ends
with the block: nothing is left in the network, and nothing depends on a flag.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from coterie.core.context import Context
from coterie.core.routing import Routing


@dataclass(eq=False)
class Call:
    """One call of a network with slots: what they are told (None: not known yet), what they
    answered, the state of recurrent routers by slot, the scope around this one, who opened it."""

    ctx: Context | None
    routings: list[Routing] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    outer: Call | None = None
    owner: object = None


_CALL: ContextVar[Call | None] = ContextVar("coterie_call", default=None)


def current() -> Call | None:
    return _CALL.get()


def enter(ctx: Context | None, routings: list[Routing] | None = None, owner: object = None) -> Call:
    """Open a scope; its routings go to a new list, or to a given one. Close it by :func:`leave`."""
    call = Call(ctx, [] if routings is None else routings, outer=_CALL.get(), owner=owner)
    _CALL.set(call)
    return call


def leave(call: Call) -> None:
    """Back to what was before ``call``."""
    _CALL.set(call.outer)


@contextmanager
def scope(ctx: Context | None) -> Iterator[Call]:
    """Inside the block every slot that is called sees ``ctx``."""
    call = enter(ctx)
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
