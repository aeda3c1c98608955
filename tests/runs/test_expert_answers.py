"""What experts answer, summed up while a model runs, against the plain computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coterie.core.context import Context
from coterie.experts import ExpertLayer, ExpertLayerConfig
from coterie.inspect import Place
from coterie.inspect.statistics.expert_answers import zero_share
from coterie.runs.measure.expert_answers import watched_answers


def layer(**fields: object) -> ExpertLayer:
    torch.manual_seed(0)
    made = ExpertLayerConfig.from_dict({"num_experts": 3, "router": {"select": "dense"}, **fields})
    return made.build(8).eval()


def look(made: ExpertLayer, h: Tensor, mask: Tensor | None = None):
    with watched_answers(made) as meter:
        made(h, Context(h.shape[0], h.shape[1], token_mask=mask))
    return meter.answers()[Place("ffn", 0, 0)]


@pytest.mark.parametrize(
    ("activations", "share"),
    [([0.0] * 19 + [1.0], 0.95), ([1.0, -1.0], 0.0), ([0.0, 0.0], 1.0), ([1.0, 1e-6], 0.5)],
)
def test_zeros_are_what_is_small_beside_the_rest(activations: list[float], share: float) -> None:
    assert zero_share(torch.tensor(activations)) == pytest.approx(share)


def test_answers_are_those_of_the_plain_modules() -> None:
    made = layer(experts={"kind": "gelu_mlp", "hidden": 16})
    h = torch.randn(2, 10, 8)
    found = look(made, h)
    for expert, module in enumerate(made.pool.unpack()):
        answer = module(h.flatten(0, 1)).detach()
        assert found.mean[expert] == pytest.approx(float(answer.mean()), abs=1e-6)
        assert found.std[expert] == pytest.approx(float(answer.std(correction=0)), rel=1e-5)
        assert found.rows[expert] == 20


def test_an_expert_whose_inner_units_are_off_is_seen() -> None:
    """Biases of -50 switch GELU off in 15 of 16 units of expert 1."""
    made = layer(experts={"kind": "gelu_mlp", "hidden": 16})
    with torch.no_grad():
        made.pool.up_bias[1, 1:] = -50.0
    zeros = look(made, torch.randn(2, 10, 8)).zeros
    assert zeros[1] == pytest.approx(15 / 16, abs=0.01)
    assert max(zeros[0], zeros[2]) < 0.1


def test_an_expert_that_answers_nothing_is_seen() -> None:
    made = layer(experts={"kind": "swiglu", "hidden": 16})
    with torch.no_grad():
        made.pool.down[2] = 0.0
    found = look(made, torch.randn(2, 10, 8))
    assert (found.scale[2], found.zeros[2]) == (0.0, 1.0)


def test_only_rows_that_chose_an_expert_count_and_no_padding() -> None:
    made = layer(router={"select": {"kind": "fixed", "ids": [0]}})
    h = torch.randn(2, 4, 8)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    h[1, 2:] = float("nan")
    found = look(made, h, mask)
    assert found.rows.tolist() == [6, 0, 0]
    assert math.isfinite(found.mean[0])
    assert math.isnan(found.mean[1])


def test_calls_add_up_and_leave_no_hook() -> None:
    made = layer()
    h = torch.randn(2, 4, 8)
    with watched_answers(made) as meter:
        for _ in range(3):
            made(h, Context(2, 4))
    made(h, Context(2, 4))
    assert meter.answers()[Place("ffn", 0, 0)].rows.tolist() == [24, 24, 24]
    assert not made._forward_hooks
