"""Guided sampling beside diffusers: whole runs, the solver's share, growth with steps, memory.

``coterie``: the network as it is. ``cached``: with every exact cache. ``compiled``: cached, and the
network compiled. ``products``: its linear products alone; ``products+attention``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coterie.bench.goals import exponent, goal, timed
from coterie.bench.live_memory import LiveBytes
from coterie.bench.sampling_cases import CASES, Case, Setup, products
from coterie.bench.sampling_peers import DDIM, DPM, diffusers_runs
from coterie.bench.timing import Place, Times, interleaved, milliseconds, ratio
from coterie.cache import CachedDenoiser, cached, compile_network
from coterie.core.prediction import Condition, Prediction
from coterie.experts.dispatch.native import library

STEPS = (5, 10, 20, 40)
"""At which growth with the number of steps is fitted."""


def run_benchmark(
    cases: tuple[str, ...] = tuple(CASES),
    rounds: int = 5,
    threads: int = 1,
    compiled: bool = False,
) -> dict[str, Any]:
    """``rows``, one per case and candidate, and ``goals``; ``compiled``: with torch.compile."""
    rows: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    with Place(threads=threads).entered() as place, torch.no_grad():
        for name in cases:
            setup = Setup(CASES[name])
            found = _Case(setup, place, rounds, compiled and name == "tiny")
            rows += found.rows()
            goals += found.goals()
            if name == "tiny":
                goals += growth(setup, place, rounds)
                goals += memory(setup)
    return {"rows": rows, "goals": goals}


class _Case:
    """Every candidate of one case, timed."""

    def __init__(self, setup: Setup, place: Place, rounds: int, compiled: bool) -> None:
        self.setup, self.case = setup, setup.case
        self.compile_seconds: float | None = None
        model, steps = setup.model, setup.case.steps
        kept = cached(model, setup.times())
        calls: dict[str, Callable[[], Any]] = {
            "coterie": lambda: setup.run(model),
            "cached": lambda: setup.run(kept),
            "cached-dpmpp": lambda: setup.run(kept, "dpmpp_2m"),
        }
        if compiled:
            calls["compiled"] = self._compiled()
        peers = diffusers_runs(setup)
        calls |= {name: partial(run, steps) for name, run in peers.items()}
        linear, both = products(setup)
        calls["products"] = lambda: [linear() for _ in range(steps)]
        calls["products+attention"] = lambda: [both() for _ in range(steps)]
        ours = setup.run(model)
        scale = float(ours.abs().max())
        self.differences = {"cached": float((setup.run(kept) - ours).abs().max()) / scale}
        if peers:
            self.differences[DDIM] = float((peers[DDIM](steps) - ours).abs().max()) / scale
        self.times: Times = interleaved(calls, place, rounds)
        self.solver_ms = {s: solver_step(setup, place, s) for s in ("ddim", "dpmpp_2m")}

    def _compiled(self) -> Callable[[], Any]:
        kept = cached(self.setup.model, self.setup.times())
        compile_network(kept)
        start = time.perf_counter()
        self.setup.run(kept)
        self.compile_seconds = round(time.perf_counter() - start, 1)
        return lambda: self.setup.run(kept)

    def rows(self) -> list[dict[str, Any]]:
        steps = self.case.steps
        return [
            {
                "case": self.case.name,
                "steps": steps,
                "candidate": name,
                "step_ms": round((milliseconds(self.times, name) or 0.0) / steps, 3),
                "vs_ddim": ratio(self.times, name, [DDIM]),
                "vs_products": ratio(self.times, name, ["products+attention"]),
                "difference": self.differences.get(name),
                "compile_seconds": self.compile_seconds if name == "compiled" else None,
            }
            for name in self.times
        ]

    def goals(self) -> list[dict[str, Any]]:
        return self._small() if self.case.name == "tiny" else self._large()

    def _small(self) -> list[dict[str, Any]]:
        where = f"{self.case.name}, {self.case.steps} guided steps"
        faster = (
            ("exact caches", "cached", DDIM, 2.0),
            ("exact caches, DPM-Solver++", "cached-dpmpp", DPM, 2.0),
            ("compiled", "compiled", DDIM, 2.3),
        )
        rows = [
            timed("P7", f"{where}: diffusers / {what}", self.times, name, [peer], bound, False)
            for what, name, peer, bound in faster
        ]
        for name, spent in self.solver_ms.items():
            rows.append(goal("P7", f"{where}: ms of a step of {name}", spent, 0.1, at_most=True))
        return rows

    def _large(self) -> list[dict[str, Any]]:
        where = f"{self.case.name}, {self.case.steps} guided steps"
        beside = (
            ("diffusers (5 % is noise)", DDIM, 1.05),
            ("products + attention", "products+attention", 1.15),
        )
        rows = [
            timed("P8", f"{where}: coterie / {what}", self.times, "cached", [peer], bound)
            for what, peer, bound in beside
        ]
        each = (milliseconds(self.times, "cached") or 0.0) / self.case.steps
        share = self.solver_ms["ddim"] / each
        return [*rows, goal("steps", f"{where}: share of the solver", share, 0.01, at_most=True)]


class _Silent:
    """A denoiser that costs nothing."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(x, "eps")


def solver_step(setup: Setup, place: Place, solver: str) -> float:
    """Milliseconds of a step of the loop without its network."""
    from coterie.solvers import SOLVERS, sample

    silent, steps = _Silent(setup.model.process), 20
    config, cond = SOLVERS.parse(solver), Condition(label=setup.label)
    times = interleaved(
        {
            "loop": lambda: sample(
                silent, setup.x, cond, solver=config, grid=setup.grid, steps=steps
            )
        },
        place,
        rounds=5,
    )
    return (milliseconds(times, "loop") or 0.0) / steps


def growth(setup: Setup, place: Place, rounds: int) -> list[dict[str, Any]]:
    """Time over steps, and what building the cache costs."""
    model = setup.model
    made: dict[int, CachedDenoiser] = {n: cached(model, setup.times(n)) for n in STEPS}
    times = interleaved(
        {str(n): partial(setup.run, c, steps=n) for n, c in made.items()}, place, rounds
    )
    builds = interleaved(
        {str(n): partial(_build, setup, n) for n in STEPS} | {"call": _call(setup)},
        place,
        rounds,
    )
    each = {n: milliseconds(times, str(n)) or 0.0 for n in STEPS}
    power = exponent(STEPS, [each[n] for n in STEPS])
    in_calls = ratio(builds, str(STEPS[-1]), ["call"])
    spread = exponent(STEPS, [milliseconds(builds, str(n)) or 0.0 for n in STEPS])
    return [
        goal("steps", "exponent of time over steps, from below", power, 0.9, at_most=False),
        goal("steps", "exponent of time over steps, from above", power, 1.1, at_most=True),
        goal("steps", f"cache of {STEPS[-1]} steps, in calls", in_calls, 10.0, at_most=True),
        goal("steps", "exponent of building the cache over steps", spread, 0.5, at_most=True),
    ]


def _build(setup: Setup, steps: int) -> None:
    """The cache with the tables of both labels of a guided call."""
    kept = cached(setup.model, setup.times(steps))
    assert kept.tables is not None
    for label in (int(setup.label), -1):
        t = kept.schedule.times[:1].float()
        kept.tables.context(kept.schedule.steps(t), torch.tensor([label]))


def _call(setup: Setup) -> Callable[[], Any]:
    asked = setup.call()
    return lambda: setup.model(*asked)


def memory(setup: Setup) -> list[dict[str, Any]]:
    """Peak of a run beside the count from shapes."""
    setup.run(setup.model, steps=2)  # what is kept from run to run is no part of it
    with LiveBytes() as live:
        setup.run(setup.model, steps=2)
    counted = activation_bytes(setup.case)
    value = live.peak / counted
    more = {"bytes": live.peak, "counted": counted}
    return [
        goal("memory", "peak of activations / count, from below", value, 0.85, False, **more),
        goal("memory", "peak of activations / count, from above", value, 1.15, True, **more),
    ]


def activation_bytes(case: Case, rows: int = 2) -> int:
    """Most numbers alive at once, times 4. In a block's attention the stream, what is read,
    queries, keys and values, and what was attended, again in order, and mapped: 8 times the width.
    Where the native operator does not serve, more in its feed-forward network: the stream with and
    without attention, what is read, and the inner layer before and after its activation, 4 times
    the width each. Beside them the state, its copy for guidance, and the adaptive parts."""
    from coterie.bench.sampling_cases import CHANNELS, PATCH

    tokens = (case.image_size // PATCH) ** 2
    stream = rows * tokens * case.width
    state = CHANNELS * case.image_size**2 * (1 + 2 * rows)
    adaptive = rows * case.width * (6 + 2 + 3)
    return 4 * ((8 if library().ready else 11) * stream + state + adaptive)
