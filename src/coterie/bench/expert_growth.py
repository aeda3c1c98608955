"""How an expert layer's cost grows with experts and tokens: exponents fitted over five sizes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coterie.bench.expert_cases import Case, Setup
from coterie.bench.expert_peers import Sorted
from coterie.bench.goals import exponent, goal
from coterie.bench.timing import Place, interleaved

BASE = Case("growth", 4096, 192, 192, 8, 2)
EXPERTS = (8, 16, 32, 64, 128)
TOKENS = (1024, 2048, 4096, 8192, 16384)


def growth(
    rounds: int, threads: int, experts: Sequence[int] = EXPERTS, tokens: Sequence[int] = TOKENS
) -> dict[str, Any]:
    """``rows`` {experts, tokens, forward_ms, train_ms, floor_ms, saved_bytes} and their ``laws``.

    Tokens and active width are fixed while experts grow (64 rows each at 128 experts), and experts
    are fixed while tokens grow.
    """
    with Place(threads=threads).entered() as place:
        by_experts = [_measure(replace(BASE, num_experts=e), place, rounds) for e in experts]
        by_tokens = [_measure(replace(BASE, tokens=t), place, rounds) for t in tokens]
    laws = [*_expert_laws(experts, by_experts), *_token_laws(tokens, by_tokens)]
    return {"rows": [*by_experts, *by_tokens], "laws": laws}


def _measure(case: Case, place: Place, rounds: int) -> dict[str, Any]:
    setup = Setup(case, place)
    call, bare = setup.backends()["auto"], Sorted(setup)
    train = partial(call.train, setup.grad)
    candidates: dict[str, Callable[[], Any]] = {
        "forward": call.forward,
        "train": train,
        "floor": bare.forward,
    }
    timed = interleaved(candidates, place, rounds)
    row = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in timed.items()}
    weights = sum(stack.numel() * stack.itemsize for stack in setup.pool.stacks().values())
    saved = saved_bytes(setup)
    sizes = {"experts": case.num_experts, "tokens": case.tokens}
    return {**sizes, **row, "saved_bytes": saved, "weight_bytes": weights}


def saved_bytes(setup: Setup) -> int:
    """Bytes kept between forward and backward besides weights, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in setup.pool.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = setup.backends()["auto"].run()  # held until the sum, so that no storage is reused
        total = sum(kept.values())
    del answer
    return total


def _expert_laws(sizes: Sequence[int], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    forward, train = column("forward_ms"), column("train_ms")
    by = f"experts {sizes[0]} to {sizes[-1]}, equal active cost"
    made = [
        goal("experts", f"{by}: growth of the forward", forward[-1] / forward[0], 1.25, True),
        goal("experts", f"{by}: exponent of the forward", exponent(sizes, forward), 0.1, True),
        goal("experts", f"{by}: exponent of training", exponent(sizes, train), 0.5, True),
        goal(
            "experts",
            f"{by}: exponent of saved rows",
            exponent(sizes, column("saved_bytes")),
            0.1,
            True,
        ),
    ]
    if 64 in sizes and 8 in sizes:
        figure = train[sizes.index(64)] / train[sizes.index(8)]
        made.append(goal("experts", "training, 64 experts over 8", figure, 2.0, True))
    return made


def _token_laws(sizes: Sequence[int], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by = f"tokens {sizes[0]} to {sizes[-1]}"
    made = []
    for column, what in (
        ("forward_ms", "forward"),
        ("train_ms", "training"),
        ("saved_bytes", "saved rows"),
    ):
        figure = exponent(sizes, [row[column] for row in rows])
        made.append(goal("tokens", f"{by}: exponent of {what}", figure, 1.05, True))
    shares = [1 - row["floor_ms"] / row["forward_ms"] for row in rows]
    what = f"{by}: share of the forward that is not experts, median"
    made.append(goal("tokens", what, statistics.median(shares), 0.1, True))
    largest = rows[-1]
    case = replace(BASE, tokens=largest["tokens"])
    rows_counted = case.tokens * case.top_k * (case.width + 2 * case.hidden) * 4
    what = f"{largest['tokens']} tokens: saved bytes over T k (D + 2F) floats"
    made.append(goal("memory", what, largest["saved_bytes"] / rows_counted, 1.15, True))
    return made
