"""Time the dispatch backends against each other, other libraries and a dense layer of equal active
cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from coterie.bench.expert_cases import CASES, Case, Setup, make_routing
from coterie.bench.expert_goals import expert_goals
from coterie.bench.expert_peers import (
    DENSE_LAYER,
    FLOOR,
    ONE_THREAD,
    PRODUCTS,
    Sorted,
    dense_layer,
    is_limit,
    is_peer,
    transformers_calls,
)
from coterie.bench.machine import readers
from coterie.bench.timing import Place, Times, interleaved, milliseconds, ratio, ratios, spread
from coterie.core.errors import ConfigError, unknown
from coterie.experts.dispatch import choose

__all__ = ["CASES", "Case", "make_routing", "run_benchmark"]

_NO_RIVAL = (DENSE_LAYER, FLOOR, PRODUCTS, "auto", ONE_THREAD)


def run_benchmark(
    cases: Sequence[str] = tuple(CASES),
    threads: int = 1,
    rounds: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
) -> dict[str, Any]:
    """``rows`` {case, backend, choice, forward_ms, train_ms, vs_dense, ...}, one per candidate, and
    ``goals``.

    ``vs_dense``, ``vs_floor``, ``vs_loop``, ``vs_best``, ``vs_peer``: time of the forward over that
    of the dense layer of equal active cost, the bare experts, the plain loop, the fastest other
    candidate, the fastest that is not ours; ``train_vs_*``: forward and backward; None where not
    timed. ``spread``: half the distance between the quartiles of ``vs_floor``. ``auto`` is what a
    model uses, ``choice`` what it picked. With several threads ``auto, one thread`` is the same on
    one, by the same clock. ``tokens`` replaces the number of tokens of every case.
    """
    for name in cases:
        if name not in CASES:
            raise ConfigError(unknown("cases", name, CASES))
    chosen = [CASES[name] for name in cases]
    if tokens is not None:
        chosen = [replace(case, tokens=tokens) for case in chosen]
    with Place(device, dtype, threads).entered() as place:
        made = [_run_case(case, place, rounds) for case in chosen]
    rows, goals = ([row for rows in parts for row in rows] for parts in zip(*made))
    return {"rows": rows, "goals": goals}


def _run_case(
    case: Case, place: Place, rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    setup = Setup(case, place)
    calls = {DENSE_LAYER: dense_layer(setup), **setup.backends(), **transformers_calls(setup)}
    bare = Sorted(setup)
    forward: dict[str, Callable[[], Any]] = {FLOOR: bare.forward, PRODUCTS: bare.products}
    train: dict[str, Callable[[], Any]] = {FLOOR: bare.train, PRODUCTS: bare.products_train}
    for name, call in calls.items():
        forward[name] = call.forward
        train[name] = partial(call.train, setup.grad)
    if place.threads > 1:
        forward[ONE_THREAD] = _on_one_thread(forward["auto"], place)
        train[ONE_THREAD] = _on_one_thread(train["auto"], place)
    touched = _touched_bytes(setup)
    limits = {} if case.train else readers(touched, place.device)
    times = {"": interleaved({**forward, **limits}, place, rounds)}
    if case.train:
        times["train_"] = interleaved(train, place, rounds)
    with torch.no_grad():
        choices = {"forward": choose(setup.x, setup.plan, setup.pool)}
    choices["train"] = choose(setup.x, setup.plan, setup.pool)
    rows = [_row(case, name, times) for name in forward]
    for row in rows:
        if row["backend"] == "auto":
            row.update(choice=choices, touched_bytes=touched)
    return rows, expert_goals(case.name, times[""], times.get("train_", {}))


def _touched_bytes(setup: Setup) -> int:
    """Bytes of the weights of the experts that any row chose: the least a forward must read."""
    distinct = sum(count > 0 for count in setup.plan.counts)
    return distinct * sum(s[0].numel() * s.itemsize for s in setup.pool.stacks().values())


def _on_one_thread(run: Callable[[], Any], place: Place) -> Callable[[], None]:
    def alone() -> None:
        torch.set_num_threads(1)
        run()
        torch.set_num_threads(place.threads)

    return alone


def _row(case: Case, name: str, timed: dict[str, Times]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "backend": name}
    for prefix in ("", "train_"):
        times = timed.get(prefix, {})
        rivals = [n for n in times if n not in (*_NO_RIVAL, name) and not is_limit(n)]
        row[f"{prefix or 'forward_'}ms"] = milliseconds(times, name)
        row[f"{prefix}vs_dense"] = ratio(times, name, [DENSE_LAYER])
        row[f"{prefix}vs_floor"] = ratio(times, name, [FLOOR])
        row[f"{prefix}vs_loop"] = ratio(times, name, ["loop"])
        row[f"{prefix}vs_best"] = ratio(times, name, rivals)
        row[f"{prefix}vs_peer"] = ratio(times, name, [n for n in rivals if is_peer(n)])
        row[f"{prefix}spread"] = spread(ratios(times, name, [FLOOR]))
    return row
