"""The timing command: what it compares is equal, and its rows say what they promise."""

from __future__ import annotations

import pytest
import torch

from coterie.bench import expert_cases, timing
from coterie.bench import experts as benchmark
from coterie.core.errors import ConfigError
from coterie.core.routing import Routing
from coterie.experts import ExpertPool, plan
from coterie.experts.dispatch import choose, native
from coterie.experts.kinds import Affine, ChannelWindow, SwiGLU

TINY = benchmark.Case("tiny", 12, 16, 8, 4, 2)
DECODE = benchmark.Case("tiny-decode", 2, 16, 8, 8, 2, train=False)


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CASES", {"tiny": TINY, "tiny-decode": DECODE})
    monkeypatch.setattr(timing, "CHUNK", 1e-3)


def test_rows_hold_every_backend_with_finite_figures() -> None:
    before = torch.get_num_threads()
    found = benchmark.run_benchmark(("tiny", "tiny-decode"), threads=1, rounds=2)
    rows = found["rows"]
    assert torch.get_num_threads() == before
    tiny = {row["backend"]: row for row in rows if row["case"] == "tiny"}
    assert set(tiny) >= {"dense_layer", "floor", "loop", "sorted", "grouped", "dense", "auto"}
    for row in tiny.values():
        assert row["forward_ms"] > 0 and row["train_ms"] > row["forward_ms"] / 10
        assert row["vs_dense"] > 0 and row["train_vs_loop"] > 0 and row["vs_best"] > 0
    assert tiny["dense_layer"]["vs_dense"] == tiny["loop"]["vs_loop"] == 1.0
    assert tiny["auto"]["choice"]["forward"] in tiny
    decode = [row for row in rows if row["case"] == "tiny-decode"]
    assert decode and all(row["train_ms"] is None for row in decode)
    goals = {row["what"]: row for row in found["goals"]}
    assert goals["tiny: forward, over the fastest peer"]["peer"] in {"loop", "grouped"} | {
        name for name in tiny if name.startswith("transformers")
    }
    assert goals["tiny-decode: over the plain loop"]["peer"] == "loop"
    share = goals["tiny-decode: bytes of touched experts per second, of what the machine reads"]
    assert share["peer"].startswith("read: ") and share["figure"] > 0
    assert not any(row["backend"].startswith("read: ") for row in rows)


def test_the_dense_layer_has_the_same_active_cost() -> None:
    for case in (TINY, *benchmark.CASES.values()):
        pool = ExpertPool(SwiGLU(hidden=case.hidden), case.num_experts, case.width)
        wide = SwiGLU(hidden=case.hidden * case.top_k).module(case.width)
        per_expert = sum(stack[0].numel() for stack in pool.stacks().values())
        assert sum(p.numel() for p in wide.parameters()) == case.top_k * per_expert


def test_ratio_is_the_median_of_ratios_within_rounds() -> None:
    times = {"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 3.0], "slow": [9.0, 90.0, 9.0]}
    assert timing.ratio(times, "b", ["a", "slow"]) == 2.0
    assert timing.ratio(times, "b", ["missing"]) is None


def test_unknown_case_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cases: 'tinny' .* did you mean 'tiny'"):
        benchmark.run_benchmark(("tinny",))


def test_the_published_sizes() -> None:
    sizes = {
        n: (c.tokens, c.width, c.hidden, c.num_experts, c.top_k)
        for n, c in expert_cases.CASES.items()
    }
    assert sizes == {
        "S2": (2048, 384, 1536, 8, 2),
        "S2-b32": (8192, 384, 1536, 8, 2),
        "B2": (1024, 768, 3072, 16, 2),
        "fine64": (2048, 384, 256, 64, 6),
        "small": (2048, 192, 384, 16, 2),
        "decode8": (8, 768, 3072, 16, 2),
        "fine-decode16": (16, 384, 256, 64, 6),
    }


def choice(rows: int, num_experts: int, k: int, pool: ExpertPool, tokens: int | None = None) -> str:
    """What ``auto`` picks for even loads; ``tokens``: rows are samples of that many."""
    ids = torch.arange(rows * k).remainder(num_experts).view(rows, k)
    flat = torch.zeros(rows, num_experts)
    unit = "token" if tokens is None else "sample"
    gates = torch.ones(rows, k)
    routing = Routing(unit, num_experts, ids, gates, flat, flat, (rows, tokens or 1))
    shape = (rows, pool.width) if tokens is None else (rows, tokens, pool.width)
    return choose(torch.zeros(shape), plan(routing), pool)


def test_auto_follows_rows_per_expert_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "serves", lambda *call: False)  # as without a compiler
    wide, narrow = (ExpertPool(SwiGLU(hidden=h), 8, h) for h in (128, 16))
    assert choice(64, 8, 2, wide) == "grouped"
    assert choice(2048, 8, 2, wide) == "sorted"
    assert choice(2048, 8, 2, narrow) == "grouped"
    assert choice(64, 1, 1, ExpertPool(SwiGLU(hidden=8), 1, 16)) == "dense"
    assert choice(64, 4, 4, ExpertPool(SwiGLU(hidden=8), 4, 16)) == "dense"
    assert choice(64, 4, 2, ExpertPool(SwiGLU(hidden=7), 4, 16)) == "sorted"  # odd strides


def test_auto_folds_small_maps_over_many_tokens_only() -> None:
    pool = ExpertPool(Affine(), 3, 64)
    assert choice(8, 3, 2, pool, tokens=16) == "fold"
    assert choice(8, 3, 2, pool, tokens=4) != "fold"
    big = ExpertPool(Affine(), 3, 384)
    assert choice(64, 3, 2, big, tokens=16) != "fold"
    assert choice(64, 3, 2, big, tokens=256) == "fold"
    windows = ExpertPool(ChannelWindow(share=0.75), 5, 16)
    assert choice(4, 5, 1, windows, tokens=16) == "table"
