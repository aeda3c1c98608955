"""What exact caches save: references and folded routers; tables: see :mod:`.sampling`.

``references``: whole runs, keys and values worked out at every step or once. ``folding``: one
expert layer whose router sees the noise level, routed at each call or folded, beside a dense layer
as wide as the experts that are used: by products of torch, and by the operator that serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.bench.goals import goal, timed
from coterie.bench.timing import Place, Times, interleaved, milliseconds, ratio
from coterie.cache import FoldedLayer, cached
from coterie.cache.schedule import Steps, at
from coterie.core.context import Context
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.denoiser import DenoiserConfig
from coterie.experts import ExpertLayer, ExpertLayerConfig, dense
from coterie.nn import mlp
from coterie.solvers import GRIDS, SOLVERS, initial_noise, sample

REFERENCES = (1, 3, 5)
STEPS = 10
TOKENS = (1, 10, 320)
WIDTH, HIDDEN, EXPERTS, CHOSEN = 256, 1024, 4, 2


def run_benchmark(
    rounds: int = 5, threads: int = 1, caches: tuple[str, ...] = ("references", "folding")
) -> dict[str, Any]:
    """``rows``, one per cache, size and candidate, and ``goals``; ``caches``: of ``CACHES``."""
    rows: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    with Place(threads=threads).entered() as place, torch.no_grad():
        for cache in caches:
            timed_at, sizes = CACHES[cache]
            for size in sizes:
                made = timed_at(size, place, rounds)
                rows += made["rows"]
                goals += made["goals"]
    return {"rows": rows, "goals": goals}


def _rows(cache: str, size: str, times: Times, other: str) -> list[dict[str, Any]]:
    return [
        {
            "cache": cache,
            "size": size,
            "candidate": name,
            "ms": milliseconds(times, name),
            "ratio": ratio(times, name, [other]),
        }
        for name in times
    ]


def references(count: int, place: Place, rounds: int) -> dict[str, Any]:
    """A sample of 144 tokens made after ``count`` references of as many, without guidance."""
    backbone = DiTConfig.from_dict(
        {
            "image_size": 24,
            "patch": 2,
            "channels": 4,
            "num_classes": 0,
            "references": {"kinds": 5},
            "trunk": TrunkConfig(width=256, depth=8, heads=4),
        }
    )
    model = DenoiserConfig(backbone=backbone).build().eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    grid, solver = GRIDS.parse("uniform"), SOLVERS.parse("euler")
    given = torch.randn(1, count, *backbone.sample_shape, generator=rng)
    kinds = torch.arange(count)[None] % 5
    x = initial_noise(model.process, backbone.sample_shape, SampleNoise([0]))
    kept = cached(model, grid.build(model.process, STEPS), caches=("references",))

    def run(denoiser: Any) -> Tensor:
        cond = Condition(references=given, reference_kinds=kinds)
        return sample(denoiser, x, cond, solver=solver, grid=grid, steps=STEPS)

    same = torch.equal(run(model), run(kept))
    times = interleaved({"each step": lambda: run(model), "once": lambda: run(kept)}, place, rounds)
    tokens = backbone.tokens
    size = f"{count} of {tokens} tokens, {STEPS} steps"
    goals = [goal("exact", f"references, {size}: bits that differ", float(not same), 0.0, True)]
    if count == 3:
        what = f"references, {size}: each step / once"
        goals.insert(0, timed("P9", what, times, "once", ["each step"], 2.8, at_most=False))
    return {"rows": _rows("references", size, times, "each step"), "goals": goals}


def folding(tokens: int, place: Place, rounds: int) -> dict[str, Any]:
    """One layer at one noise level."""
    routed, kept, ctx = _layers(tokens)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, WIDTH, generator=rng)
    products = mlp.SwiGLU(WIDTH, CHOSEN * HIDDEN).eval()
    served = dense.SwiGLU(WIDTH, CHOSEN * HIDDEN).eval()
    steps = Steps((0,))

    def folded() -> Any:
        with at(steps):
            return kept(x, ctx)

    difference = float((routed(x, ctx).y - folded().y).abs().max())
    every = routed.config.replace(dispatch="dense")
    plain: Callable[[], Any] = lambda: _with(routed, every, lambda: routed(x, ctx))  # noqa: E731
    calls = {
        "routed": lambda: routed(x, ctx),
        "every expert": plain,
        "folded": folded,
        "dense": lambda: products(x),
        "dense, served": lambda: served(x),
    }
    times = interleaved(calls, place, rounds)
    size = f"{tokens} tokens"
    what = f"folding, {size}"
    goals = [
        timed("P10", f"{what}: folded / {name} of {CHOSEN} F", times, "folded", [name], 1.02)
        for name in ("dense", "dense, served")
    ]
    goals.append(goal("exact", f"{what}: largest difference", difference, 1e-5, at_most=True))
    if tokens <= 10:
        goals.append(
            timed("P10", f"{what}: routed / folded", times, "folded", ["routed"], 1.5, False)
        )
    return {"rows": _rows("folding", size, times, "dense"), "goals": goals}


def _layers(tokens: int) -> tuple[ExpertLayer, FoldedLayer, Context]:
    """A layer that noise routes, the same folded at one noise level, and the context there, of one
    sample of so many tokens."""
    config = ExpertLayerConfig.from_dict(
        {
            "num_experts": EXPERTS,
            "experts": {"kind": "swiglu", "hidden": HIDDEN},
            "router": {
                "score": {"kind": "noise_level", "hidden": WIDTH, "init_std": 0.3},
                "select": {"kind": "top_k", "k": CHOSEN},
            },
        }
    )
    torch.manual_seed(0)
    layer = ExpertLayer(config, WIDTH).eval()
    layer.reset_parameters()
    for parameter in layer.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))
    embedding = torch.randn(1, WIDTH)
    ctx = Context(
        batch=1,
        tokens=tokens,
        noise=torch.tensor([0.5]),
        step_index=torch.tensor([500]),
        time_embedding=embedding,
        time_table=lambda: embedding.expand(1000, -1),
    )
    recorded = layer(torch.zeros(1, tokens, WIDTH), ctx).routings
    return layer, FoldedLayer(layer, recorded, "layer").eval(), ctx


def _with(layer: nn.Module, config: Any, run: Callable[[], Any]) -> Any:
    before = layer.config
    layer.config = config
    try:
        return run()
    finally:
        layer.config = before


CACHES: dict[str, tuple[Callable[[int, Place, int], dict[str, Any]], tuple[int, ...]]] = {
    "references": (references, REFERENCES),
    "folding": (folding, TOKENS),
}
"""What is timed, at which sizes."""
