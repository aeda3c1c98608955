"""Scores of routers: what reads rows, noise level, state, task or a fixed key."""

from __future__ import annotations

import pytest
import torch
from expert_cases import BATCH, STEPS, TIME_WIDTH, WIDTH, context, inputs, router

from coterie.core.context import Context
from coterie.core.errors import ConfigError
from coterie.experts import share_cells
from coterie.experts.windows import sliding_windows, window_starts

# Scores


def test_cosine_score_ignores_lengths() -> None:
    made = router(score="cosine", probability="identity")
    h, ctx = inputs(7).detach(), context(7)
    first = made(h, ctx)
    with torch.no_grad():
        made.score.prototypes.mul_(torch.rand(6, 1) + 0.5)
    second = made(3.0 * h, ctx)
    assert torch.equal(first.ids, second.ids)
    torch.testing.assert_close(first.gates, second.gates)
    assert first.probs.abs().max() <= 1 + 1e-6 and (first.probs < 0).any()
    assert first.prototypes is not None and first.inputs is not None


def test_noise_level_routing_reads_the_time_embedding_only() -> None:
    made = router(3, score={"kind": "noise_level", "table": True})
    ctx = context(7)
    first = made(inputs(7), ctx)
    other = made(
        torch.randn(BATCH, 7, WIDTH),
        ctx.replace(label=torch.zeros(BATCH, dtype=torch.int64), embedding=torch.randn(BATCH, 4)),
    )
    assert first.unit == "sample" and torch.equal(first.probs, other.probs)
    assert first.table is not None and first.table.shape == (STEPS, 3)
    torch.testing.assert_close(first.table[ctx.step_index], first.probs)
    assert made(inputs(7), ctx.replace(time_table=None)).table is None
    same = made(inputs(7), ctx.replace(time_embedding=ctx.time_embedding[:1].expand(BATCH, -1)))
    assert torch.equal(same.ids[0], same.ids[1])


def test_two_layer_noise_router_equals_its_formula() -> None:
    made = router(4, score={"kind": "noise_level", "hidden": 10, "silu": False, "init_std": 0.3})
    ctx = context(3)
    inner = torch.nn.functional.gelu(made.score.inner(ctx.time_embedding))
    torch.testing.assert_close(made(inputs(3), ctx).logits, made.score.proj(inner))


def test_window_schedule_equals_published_values() -> None:
    """DTR with C = 384, share 0.8, alpha 4: starts 0, 0, 5, 24, 77; 230 channels always open."""
    span = 384 - int(384 * 0.8)
    steps = torch.tensor([0, 250, 500, 750, 999])
    assert window_starts(steps, 1000, span, 4.0).tolist() == [0, 0, 5, 24, 77]
    masks = sliding_windows(1000, 384, 307, 4.0)
    assert (masks.sum(1) == 307).all() and masks.all(0).sum() == 230
    starts = window_starts(torch.arange(1000), 1000, span, 4.0)
    assert (starts.diff() >= 0).all() and starts[-1] == span
    assert window_starts(torch.tensor([0]), 1, span, 4.0).tolist() == [0]
    assert torch.round(torch.tensor(2.5)) == 2  # ties to even, as the schedule needs


def test_noise_window_routes_by_original_step() -> None:
    made = router(
        78, score="noise_window", probability="identity", select={"kind": "top_k", "k": 1}
    )
    ctx = Context(3, 2, step_index=torch.tensor([0, 750, 999]), num_steps=1000)
    routing = made(torch.zeros(3, 2, WIDTH), ctx)
    assert routing.ids.tolist() == [[0], [24], [77]] and not list(made.parameters())


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_recurrent_router_equals_torch_cells_across_layers(cell: str) -> None:
    config = {"kind": "recurrent", "state": 5, "cell": cell, "init_std": 0.5}
    layers = [router(score=config, seed=seed) for seed in (1, 2)]
    share_cells(layers)
    assert layers[0].score.memory.cell is layers[1].score.memory.cell
    h, ctx = inputs(3), context(3)
    first = layers[0](h, ctx)
    second = layers[1](h, ctx.replace(state=first.state))
    x = h.flatten(0, 1)
    state = layers[0].score.memory.cell(layers[0].score.inner(x), torch.zeros(x.shape[0], 5))
    state = layers[1].score.memory.cell(layers[1].score.inner(x), state)
    torch.testing.assert_close(second.state, state)
    torch.testing.assert_close(second.logits, layers[1].score.proj(state))


def test_detached_state_stops_the_gradient_to_earlier_layers() -> None:
    for detach in (True, False):
        config = {"kind": "recurrent", "state": 5, "detach": detach, "init_std": 0.5}
        layers = [router(score=config, seed=seed) for seed in (1, 2)]
        first = layers[0](inputs(3), context(3))
        layers[1](inputs(3), context(3).replace(state=first.state)).logits.square().sum().backward()
        grad = layers[0].score.inner.weight.grad
        assert (grad is None) == detach


def test_task_router_picks_its_rows_by_task() -> None:
    made = router(4, score={"kind": "task_linear", "num_tasks": 3})
    h = inputs(2, batch=3)
    task = torch.tensor([2, 0, 1])
    routing = made(h, Context(3, 2, task=task))
    weight = made.score.proj.weight.view(3, 4, WIDTH)
    for sample in range(3):
        expected = h[sample] @ weight[task[sample]].T
        torch.testing.assert_close(routing.logits.view(3, 2, 4)[sample], expected)


@pytest.mark.parametrize("hashed", [False, True])
def test_fixed_routing_is_a_pure_function_of_its_key(hashed: bool) -> None:
    fields = {"probability": "identity", "select": {"kind": "top_k", "k": 1}}
    made = router(5, score={"kind": "fixed", "by": "sample", "hashed": hashed}, **fields)
    ids = torch.arange(200)
    routing = made(torch.zeros(200, 3, WIDTH), Context(200, 3, sample_ids=ids))
    per_sample = routing.ids.view(200, 3)
    assert (per_sample == per_sample[:, :1]).all()
    if hashed:
        loads = torch.bincount(per_sample[:, 0], minlength=5)
        assert (loads > 20).all() and per_sample[:, 0].tolist() != (ids % 5).tolist()
    else:
        assert per_sample[:, 0].tolist() == (ids % 5).tolist()


def test_a_recurrent_router_may_start_from_the_noise_level() -> None:
    score = {"kind": "recurrent", "state": 5, "start": "time", "head": "cosine"}
    made = router(4, score=score)
    ctx = context(7)
    time = torch.randn(BATCH, TIME_WIDTH, requires_grad=True)
    routing = made(inputs(7), ctx.replace(time_embedding=time))
    assert routing.logits.abs().max() <= 1 + 1e-6 and routing.prototypes.shape == (4, 5)
    routing.logits.square().sum().backward()
    assert (time.grad.abs().sum(1) > 0).all()
    with pytest.raises(ConfigError, match=r"score\.start: 'time' .*noise level"):
        made(inputs(7), ctx.replace(time_embedding=None))
