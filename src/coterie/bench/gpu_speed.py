"""Speed and memory of our expert layers beside those of others on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coterie.bench.expert_cases import CASES, Call, Case, Setup
from coterie.bench.expert_peers import DENSE_LAYER
from coterie.bench.gpu_clock import Clock
from coterie.bench.gpu_peers import CUBLAS, PEERS, Balanced, candidates, reason
from coterie.bench.timing import Place, Times, milliseconds, ratio, ratios, spread
from coterie.experts import ExpertPool, dispatch, plan

TOKENS = (8_192, 32_768, 131_072)
WIDE = Case("wide128", 32_768, 4096, 1024, 128, 8)  # the size in SonicMoE's own benchmark
SIZES: dict[str, Case] = {
    f"{name}-{tokens}": replace(CASES[name], tokens=tokens)
    for tokens in TOKENS
    for name in ("S2", "B2", "fine64")
} | {f"{WIDE.name}-{WIDE.tokens}": WIDE}
QUICK = Case("quick", 48, 16, 8, 4, 2)
OURS, GRAPH = "triton", "triton-graph"
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-3}


def expected(setup: Setup) -> list[Tensor]:
    """The answer and the gradients of x and gates, in float32, from plain products."""
    pool = ExpertPool(setup.pool.kind, setup.case.num_experts, setup.case.width)
    pool = pool.to(setup.x.device)
    pool.load_state_dict(setup.pool.state_dict())
    x = setup.x.detach().float().requires_grad_()
    y = dispatch(x, plan(setup.routing), pool, "sorted")
    grads = torch.autograd.grad(y, [x, setup.routing.gates], setup.grad.float())
    return [y.detach(), *grads]


def error(call: Call, setup: Setup, true: list[Tensor]) -> float:
    """Largest relative error, by norms, of the answer and the gradients of x and gates."""
    y = call.run()
    grads = torch.autograd.grad(y, call.leaves, setup.grad)
    pairs = zip([y.detach(), *grads[:2]], true)
    return max(float((ours.float() - one).norm() / one.norm()) for ours, one in pairs)


def checked(
    calls: dict[str, Call], setup: Setup, missing: dict[str, str]
) -> tuple[dict[str, Call], dict[str, float]]:
    """The candidates whose answers are right, and their errors; the others go to ``missing``."""
    true, limit = expected(setup), _TOLERANCE[setup.x.dtype]
    right, errors = {}, {}
    for name, call in calls.items():
        if name == DENSE_LAYER:
            right[name] = call
            continue
        try:
            found = error(call, setup, true)
        except Exception as problem:  # an unsupported size or version: named, not hidden
            missing[name] = reason(problem)
            continue
        if not found <= limit:  # NaN is wrong as well
            missing[name] = f"answers otherwise than plain products: {found:.1e}"
            continue
        right[name], errors[name] = call, found
    return right, errors


def speed(case: Case, device: str, dtype: torch.dtype, clock: Clock) -> dict[str, Any]:
    """Rows of every candidate: milliseconds of forward, and of forward and backward; ratios to the
    dense layer of equal active cost, to ``cublas`` and to the best peer; memory; who is missing.

    ``triton-graph``: ours replayed from a CUDA graph, without the work of the host.
    """
    setup = Setup(case, Place(device, dtype))
    calls, missing = candidates(setup)
    calls, errors = checked(calls, setup, missing)
    bare = Balanced(setup)
    forward: dict[str, Callable[[], Any]] = {CUBLAS: bare.forward}
    train: dict[str, Callable[[], Any]] = {CUBLAS: bare.train}
    memory = {}
    for name, call in calls.items():
        forward[name] = torch.no_grad()(call.run)
        train[name] = _step(call, setup)
        memory[name] = clock.memory(call.run, _backward(call, setup))
    if device != "cpu" and OURS in calls:
        try:
            forward[GRAPH], train[GRAPH] = captured(forward[OURS]), captured(train[OURS])
        except Exception as problem:
            missing[GRAPH] = reason(problem)
    timed = {"forward": clock.times(forward), "train": clock.times(train)}
    rows = [
        {
            "case": case.name,
            "tokens": case.tokens,
            "candidate": name,
            "relative_error": errors.get(name),
            **memory.get(name, {}),
            **_figures(name, timed),
        }
        for name in forward
    ]
    rounds = {mode: len(times[CUBLAS]) for mode, times in timed.items()}
    return {"rows": rows, "missing": missing, "rounds": rounds, "dtype": str(dtype)}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a call from a CUDA graph; it must not wait for the device."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _backward(call: Call, setup: Setup) -> Callable[[Tensor], Any]:
    return lambda y: torch.autograd.grad(y, call.leaves, setup.grad)


def _step(call: Call, setup: Setup) -> Callable[[], Any]:
    backward = _backward(call, setup)
    return lambda: backward(call.run())


def _figures(name: str, timed: dict[str, Times]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for mode, times in timed.items():
        peers = [peer for peer in PEERS if peer != name]
        made[f"{mode}_ms"] = milliseconds(times, name)
        made[f"{mode}_vs_dense"] = ratio(times, name, [DENSE_LAYER])
        made[f"{mode}_vs_cublas"] = ratio(times, name, [CUBLAS])
        made[f"{mode}_vs_peer"] = ratio(times, name, peers)
        made[f"{mode}_vs_grouped"] = ratio(times, name, ["grouped", "transformers-grouped_mm"])
        made[f"{mode}_spread"] = spread(ratios(times, name, [CUBLAS]))
    return made
