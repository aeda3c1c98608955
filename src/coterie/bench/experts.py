"""Time the dispatch backends against each other and a dense layer of equal active cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.bench.timing import Place, Times, interleaved, milliseconds, ratio
from coterie.core.errors import ConfigError, unknown
from coterie.core.routing import Routing
from coterie.experts.dispatch import available, choose, dispatch, plan
from coterie.experts.kinds import ExpertPool, SwiGLU


@dataclass(frozen=True)
class Case:
    """SwiGLU experts of inner size ``hidden``; ``train`` False: forward only (decoding)."""

    name: str
    tokens: int
    width: int
    hidden: int
    num_experts: int
    top_k: int
    train: bool = True


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("S2", 2048, 384, 1536, 8, 2),
        Case("B2", 1024, 768, 3072, 16, 2),
        Case("fine64", 2048, 384, 256, 64, 6),
        Case("small", 2048, 192, 384, 16, 2),
        Case("decode8", 8, 768, 3072, 16, 2, train=False),
        Case("fine-decode16", 16, 384, 256, 64, 6, train=False),
    )
}
DENSE_LAYER = "dense_layer"


def run_benchmark(
    cases: Sequence[str] = tuple(CASES),
    threads: int = 1,
    rounds: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int | None = None,
) -> list[dict]:
    """Rows ``{case, backend, choice, forward_ms, train_ms, vs_dense, ...}``, one per backend.

    ``vs_dense``, ``vs_loop``, ``vs_best``: time of the forward over that of the dense layer of
    equal active cost, the plain loop, the fastest other backend; ``train_vs_*``: forward and
    backward; None where not timed. ``auto`` is one of the backends, ``choice`` what it picked.
    ``tokens`` replaces the number of tokens of every case.
    """
    for name in cases:
        if name not in CASES:
            raise ConfigError(unknown("cases", name, CASES))
    chosen = [CASES[name] for name in cases]
    if tokens is not None:
        chosen = [replace(case, tokens=tokens) for case in chosen]
    with Place(device, dtype, threads).entered() as place:
        return [row for case in chosen for row in _run_case(case, place, rounds)]


def make_routing(case: Case, device: str = "cpu") -> Routing:
    """Random choices with a mildly skewed load, gates that ask for a gradient."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(case.tokens, case.num_experts, generator=rng)
    logits += torch.linspace(0.0, 0.5, case.num_experts)
    probs = logits.softmax(dim=1)
    gates, ids = (value.to(device) for value in probs.topk(case.top_k, dim=1))
    gates.requires_grad_()
    probs, logits = probs.to(device), logits.to(device)
    return Routing("token", case.num_experts, ids, gates, probs, logits, (1, case.tokens))


def _run_case(case: Case, place: Place, rounds: int) -> list[dict]:
    pool = ExpertPool(SwiGLU(hidden=case.hidden), case.num_experts, case.width)
    pool = pool.to(place.device, place.dtype)
    wide = SwiGLU(hidden=case.hidden * case.top_k).module(case.width).to(place.device, place.dtype)
    routing = make_routing(case, place.device)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(case.tokens, case.width, generator=rng).to(place.device, place.dtype)
    x.requires_grad_()
    made = plan(routing)
    names = [name for name in available(x, made, pool) if name != "dense"]
    if case.num_experts <= 2 * case.top_k:
        names.append("dense")
    calls: dict[str, Callable[[], Tensor]] = {DENSE_LAYER: lambda: wide(x)}
    for name in [*names, "auto"]:
        calls[name] = lambda name=name: dispatch(x, plan(routing), pool, name)  # type: ignore[misc]
    forward = interleaved({n: _forward(f) for n, f in calls.items()}, place, rounds)
    train: Times = {}
    if case.train:
        grad = torch.randn(x.shape, generator=rng).to(x)
        sparse = [x, routing.gates, *pool.parameters()]
        steps = {n: _train(f, sparse, grad) for n, f in calls.items() if n != DENSE_LAYER}
        steps[DENSE_LAYER] = _train(calls[DENSE_LAYER], [x, *wide.parameters()], grad)
        train = interleaved(steps, place, rounds)
    with torch.no_grad():
        choices = {"forward": choose(x, made, pool)}
    choices["train"] = choose(x, made, pool)
    return [_row(case, name, forward, train, choices) for name in calls]


def _forward(call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def _train(
    call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> Callable[[], None]:
    """Forward and backward; gradients are made anew, as after ``zero_grad(set_to_none=True)``."""

    def run() -> None:
        torch.autograd.grad(call(), leaves, grad)

    return run


def _row(
    case: Case,
    name: str,
    forward: Times,
    train: Times,
    choices: dict[str, str],
) -> dict:
    rivals = [other for other in forward if other not in (DENSE_LAYER, "auto", name)]
    row: dict = {"case": case.name, "backend": name}
    if name == "auto":
        row["choice"] = choices
    for prefix, times in (("", forward), ("train_", train)):
        column = "forward_ms" if not prefix else "train_ms"
        row[column] = milliseconds(times, name)
        row[f"{prefix}vs_dense"] = ratio(times, name, [DENSE_LAYER])
        row[f"{prefix}vs_loop"] = ratio(times, name, ["loop"])
        row[f"{prefix}vs_best"] = ratio(times, name, rivals)
    return row
