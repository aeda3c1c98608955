"""Expert choice whose gates are a softmax over the tokens of a sample (ProMoE's released form)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_cases import BATCH, context, inputs, router
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayerConfig, RouterConfig
from coterie.recipes import promoe

OVER_TOKENS: dict[str, Any] = {
    "score": "cosine",
    "probability": "softmax_tokens",
    "select": {"kind": "expert_choice", "k": 1.0},
}


def by_hand(cosines: Tensor, k: float) -> Tensor:
    """[B, N, E] -> gates [B, N, E]: as the released code computes them."""
    tokens, experts = cosines.shape[1:]
    weights = cosines.transpose(1, 2).softmax(dim=-1)  # [B, E, N]
    capacity = max(1, min(int(tokens / experts * k), tokens))
    best = weights.topk(capacity, dim=-1)
    return torch.zeros_like(weights).scatter(2, best.indices, best.values).transpose(1, 2)


def test_C12_gates_are_those_of_the_released_expert_choice() -> None:
    made = router(4, **OVER_TOKENS)
    h = inputs(8)
    routing = made(h, context(8))
    full = torch.zeros(BATCH * 8, 5).scatter_add(1, routing.ids, routing.gates)[:, :4]
    prototypes = torch.nn.functional.normalize(made.score.prototypes, dim=-1)
    cosines = torch.nn.functional.normalize(h, dim=-1) @ prototypes.T
    torch.testing.assert_close(full.view(BATCH, 8, 4), by_hand(cosines, 1.0))
    torch.testing.assert_close(routing.probs.view(BATCH, 8, 4).sum(1), torch.ones(BATCH, 4))
    other = router(4, **{**OVER_TOKENS, "probability": "softmax"})(h, context(8))
    assert (other.probs - routing.probs).abs().max() > 0.05, "that over experts is another"
    full.square().sum().backward()
    assert made.score.prototypes.grad.abs().min(dim=1).values.max() > 0


def test_C12_padding_and_null_samples_have_no_share() -> None:
    mask = torch.ones(BATCH, 8, dtype=torch.bool)
    mask[0, 5:] = False
    made = router(4, partition="null_label", **OVER_TOKENS)
    routing = made(inputs(8), context(8, null=(1,), mask=mask))
    probs = routing.probs.view(BATCH, 8, 5)
    assert (probs[0, 5:] == 0).all() and (probs[1] == 0).all()
    torch.testing.assert_close(probs[0, :5, :4].sum(0), torch.ones(4))
    alone = made(inputs(8)[:1, :5], context(5, batch=1, null=()))
    torch.testing.assert_close(probs[0, :5], alone.probs)
    routing.gates.sum().backward()
    assert made.score.prototypes.grad.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "top_k"}, r"probability: 'softmax_tokens' .*no row knows"),
        ({"select": {"kind": "expert_choice"}, "when": "after"}, r"when: 'after'"),
    ],
)
def test_C12_it_needs_experts_that_choose(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig.from_dict({"probability": "softmax_tokens", **fields})


def test_C12_the_recipe_names_its_default_and_offers_the_other() -> None:
    def gates(**fields: Any) -> str:
        return promoe.slot(64, choice="expert", **fields).expert.router.probability

    assert gates() == "identity", "the cosines themselves, as published"
    assert gates(probability="softmax_tokens") == "softmax_tokens"


def test_C12_shares_of_tokens_are_no_shares_of_experts() -> None:
    for balance in ("switch", "entropy"):
        with pytest.raises(ConfigError, match=rf"balance\.0\.kind: '{balance}'"):
            ExpertLayerConfig.from_dict({"router": OVER_TOKENS, "balance": [balance]})
    ExpertLayerConfig.from_dict({"router": OVER_TOKENS, "balance": ["contrastive", "z_loss"]})
