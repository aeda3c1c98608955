"""Experts in several places answer what experts in one place do, whoever is asked how often."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from together import Threads, in_threads
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayerConfig, ExpertPool
from coterie.experts.dispatch import dispatch, plan_choices
from coterie.experts.kinds import GeluMLP, SwiGLU
from coterie.train.batch_parts import routed_pools
from coterie.train.parallel.exchange import split_experts

EXPERTS, WIDTH, ROWS = 8, 6, 24
NOBODY = EXPERTS


def choices(kind: str) -> Tensor:
    """ids i64 [R, 2] of all rows."""
    rng = torch.Generator().manual_seed(4)
    some = torch.rand(ROWS, EXPERTS, generator=rng).argsort(1)[:, :2]
    return {
        "mixed": some,
        "one expert for all": torch.full((ROWS, 2), NOBODY).index_fill(1, torch.tensor([0]), 5),
        "half of the experts": some % 4,
        "nobody": torch.full((ROWS, 2), NOBODY),
        "first rows only": some.masked_fill(torch.arange(ROWS)[:, None] >= 5, NOBODY),
        "every expert once": torch.arange(ROWS * 2).view(ROWS, 2) % EXPERTS,
    }[kind]


def pooled(kind: Any = None, experts: int = EXPERTS) -> ExpertPool:
    pool = ExpertPool(kind or GeluMLP(hidden=5), experts, WIDTH)
    pool.reset_parameters(torch.Generator().manual_seed(1))
    return pool


def answered(
    pool: ExpertPool, x: Tensor, ids: Tensor, gates: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, and gradients of x and of the gates; those of the pool are left in it."""
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    serve = pool.exchange or dispatch
    unit = "token" if x.dim() == 2 else "sample"
    made = plan_choices(ids, gates, pool.num_experts, unit=unit)
    y = serve(x, made, pool, "auto" if pool.exchange else "loop")
    (y * weight).sum().backward()
    grad = torch.zeros_like(x) if x.grad is None else x.grad  # one process need not ask nobody
    return y.detach(), grad, gates.grad


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])  # 3: 3, 3 and 2 experts; 8: one each
@pytest.mark.parametrize(
    "kind",
    ["mixed", "one expert for all", "half of the experts", "nobody", "first rows only",
     "every expert once"],
)  # fmt: skip
def test_rows_find_their_experts_and_come_back(kind, parts):
    rng = torch.Generator().manual_seed(7)
    x, weight = torch.randn(2, ROWS, WIDTH, generator=rng)
    gates = torch.rand(ROWS, 2, generator=rng)
    ids = choices(kind)
    alone = pooled()
    expected = answered(alone, x, ids, gates, weight)

    def part(thread: Threads) -> tuple[tuple[Tensor, ...], ExpertPool]:
        pool = torch.nn.Sequential(pooled())
        assert split_experts(pool, thread) == {f"0.{name}": EXPERTS for name in alone.names}
        here = slice(*(ROWS // parts * (thread.rank + i) for i in (0, 1)))
        found = answered(pool[0], x[here], ids[here], gates[here], weight[here])
        return found, pool[0]

    found = in_threads(parts, part)
    for whole, *own in zip(expected, *(answers for answers, _ in found)):
        torch.testing.assert_close(torch.cat(own), whole, rtol=1e-6, atol=1e-6)
    for name in alone.names:
        grads = [pool.get_parameter(name).grad for _, pool in found]
        assert all(grad is not None for grad in grads)  # zeros where nobody asked
        whole = alone.get_parameter(name).grad
        torch.testing.assert_close(torch.cat(grads), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 4, 6])  # 6: more than choices, so that rows are sorted
def test_rows_with_many_choices_travel_to_all(parts):
    rng = torch.Generator().manual_seed(7)
    x, weight = torch.randn(2, ROWS, WIDTH, generator=rng)
    ids, gates = (
        torch.randint(EXPERTS + 1, (ROWS, 4), generator=rng),
        torch.rand(ROWS, 4, generator=rng),
    )
    alone, types = pooled(), set()
    expected = answered(alone, x, ids, gates, weight)

    def part(thread: Threads) -> tuple[tuple[Tensor, ...], ExpertPool]:
        exchanging = thread.exchanging

        def seen(rows: Tensor, *splits: Any) -> Any:
            types.add(rows.dtype)
            return exchanging(rows, *splits)

        thread.exchanging = seen
        pool = torch.nn.Sequential(pooled())
        split_experts(pool, thread)
        here = slice(*(ROWS // parts * (thread.rank + i) for i in (0, 1)))
        return answered(pool[0], x[here], ids[here], gates[here], weight[here]), pool[0]

    found = in_threads(parts, part)
    assert (torch.int64 in types) == (parts > 4)  # nothing is counted
    for whole, *own in zip(expected, *(answers for answers, _ in found)):
        torch.testing.assert_close(torch.cat(own), whole, rtol=1e-6, atol=2e-6)
    for name in alone.names:
        grads = torch.cat([pool.get_parameter(name).grad for _, pool in found])
        torch.testing.assert_close(grads, alone.get_parameter(name).grad, rtol=1e-5, atol=2e-6)


def test_whole_samples_travel_too():
    rng = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 8, 3, WIDTH, generator=rng)
    ids, gates = torch.arange(16).view(8, 2) % EXPERTS, torch.rand(8, 2, generator=rng)
    expected = answered(pooled(SwiGLU(hidden=4)), x, ids, gates, weight)

    def part(thread: Threads) -> tuple[Tensor, ...]:
        pool = torch.nn.Sequential(pooled(SwiGLU(hidden=4)))
        split_experts(pool, thread)
        here = slice(4 * thread.rank, 4 * thread.rank + 4)
        return answered(pool[0], x[here], ids[here], gates[here], weight[here])

    for whole, *own in zip(expected, *in_threads(2, part)):
        torch.testing.assert_close(torch.cat(own), whole, rtol=1e-6, atol=1e-6)


def test_lower_precision_travels_as_such():
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, WIDTH, generator=rng)
    made = plan_choices(choices("mixed"), torch.rand(ROWS, 2, generator=rng), EXPERTS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = dispatch(x, made, pooled(), "sorted")
    types = []

    def part(thread: Threads) -> Tensor:
        exchanging = thread.exchanging

        def seen(rows: Tensor, *splits: Any) -> Any:
            types.append(rows.dtype)
            return exchanging(rows, *splits)

        thread.exchanging = seen
        pool = torch.nn.Sequential(pooled())
        split_experts(pool, thread)
        here = slice(12 * thread.rank, 12 * thread.rank + 12)
        own = plan_choices(made.ids[here], made.gates[here], EXPERTS)
        with torch.autocast("cpu", torch.bfloat16):
            return pool[0].exchange(x[here], own, pool[0], "sorted")

    found = torch.cat(in_threads(2, part))
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert set(types) == {torch.int64, torch.bfloat16}


def test_fewer_experts_than_processes_are_refused_by_path():
    layer = torch.nn.ModuleDict({"layer": ExpertLayerConfig(num_experts=3).build(8)})
    with pytest.raises(ConfigError, match=r"layer\.pool has 3 experts, fewer than 4 processes"):
        in_threads(4, lambda thread: split_experts(copy.deepcopy(layer), thread))


def test_shared_experts_stay_with_everybody():
    config = ExpertLayerConfig(num_experts=4, shared={"hidden": 5})
    assert list(routed_pools(config.build(8))) == ["pool"]
