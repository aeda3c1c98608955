"""Both ways to learn text against cross entropy and a bound with a known value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.core.batch import Batch
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import generator
from coterie.train.objectives import MaskedTokenConfig, NextTokenConfig
from coterie.train.objectives.text import token_nats
from small_models import TEXTS, small, woken, words

VOCABULARY = 11


class Stub:
    """Knows one distribution of tokens and answers it everywhere; notes what it was shown."""

    mask_token = VOCABULARY

    def __init__(self, probs: Tensor) -> None:
        self.logits = probs.log()
        self.shown: dict[str, Any] = {}

    def __call__(self, ids: Tensor, t: Tensor, cond: Condition, **facts: Any) -> Prediction:
        self.shown = {"ids": ids, "t": t, **facts}
        return Prediction(self.logits.expand(*ids.shape, -1), "logits")

    def aux_losses(self, routings: Any, rng: Any = None) -> tuple:
        return ()


def draw(probs: Tensor, batch: int, length: int) -> Batch:
    rng = torch.Generator().manual_seed(0)
    ids = torch.multinomial(probs, batch * length, replacement=True, generator=rng)
    return Batch(ids.view(batch, length), Condition(), torch.arange(batch))


UNIFORM = torch.full((VOCABULARY,), 1 / VOCABULARY)
SKEWED = torch.arange(1.0, VOCABULARY + 1) / torch.arange(1.0, VOCABULARY + 1).sum()


@pytest.mark.parametrize("probs", [UNIFORM, SKEWED], ids=["uniform", "skewed"])
def test_the_masked_bound_of_the_true_distribution_is_its_entropy(probs: Tensor) -> None:
    stub, objective = Stub(probs), MaskedTokenConfig(lowest=1e-3).build(None)
    values, rng = [], generator(0, "t")
    for _ in range(40):
        losses = objective(stub, draw(probs, 64, 64), rng)
        values.append(losses.main["masked_token"].item())
    entropy = -(probs * probs.log()).sum().item()
    error = torch.tensor(values).std().item() / math.sqrt(len(values))
    assert sum(values) / len(values) == pytest.approx(entropy, abs=4 * error)
    assert error < 0.02 * entropy
    bits = losses.extras["bits_per_token"].item()
    assert bits == pytest.approx(losses.main["masked_token"].item() / math.log(2), rel=1e-5)


def test_the_masked_bound_is_written_out() -> None:
    stub, batch = Stub(SKEWED), draw(SKEWED, 8, 20)
    losses = MaskedTokenConfig().build(None)(stub, batch, generator(0, "t"))
    shown, t = stub.shown["ids"], stub.shown["t"]
    masked = shown == VOCABULARY
    assert torch.equal(shown[~masked], batch.x[~masked])
    nats = -SKEWED.log()[batch.x]
    expected = (nats * masked).sum(1) / (t * 20)
    torch.testing.assert_close(losses.per_sample, expected)
    torch.testing.assert_close(losses.main["masked_token"], expected.mean())
    assert torch.equal(losses.noise, t)


def test_mask_shares_are_stratified_and_obeyed() -> None:
    stub, batch = Stub(UNIFORM), draw(UNIFORM, 50, 4000)
    MaskedTokenConfig(lowest=0.1).build(None)(stub, batch, generator(3, "t"))
    t = stub.shown["t"]
    gaps = t.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((49,), 0.9 / 50))
    assert t.min() >= 0.1 and t.max() <= 1.0
    share = (stub.shown["ids"] == VOCABULARY).float().mean(1)
    assert (share - t).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_masking_follows_the_generator() -> None:
    stub, objective = Stub(UNIFORM), MaskedTokenConfig().build(None)
    shown = []
    for seed in (0, 0, 1):
        objective(stub, draw(UNIFORM, 8, 20), generator(seed, "t"))
        shown.append(stub.shown["ids"])
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])


@pytest.mark.parametrize("name", TEXTS)
def test_next_token_is_cross_entropy_of_the_shifted_text(name: str) -> None:
    model, batch = woken(small(name)), words(3)
    losses = NextTokenConfig().build(model)(model, batch, generator(0, "t"))
    whole = model(batch.x[:, :-1], torch.zeros(3), Condition()).value
    expected = F.cross_entropy(whole.flatten(0, 1), batch.x[:, 1:].flatten())
    torch.testing.assert_close(losses.main["next_token"], expected)
    assert losses.extras["bits_per_token"].item() == pytest.approx(expected.item() / math.log(2))
    assert {aux.layer for aux in losses.aux} == {0, 1, 2}


def test_the_last_token_is_predicted_and_never_read() -> None:
    stub, batch = Stub(UNIFORM), draw(UNIFORM, 4, 9)
    losses = NextTokenConfig().build(None)(stub, batch, generator(0, "t"))
    assert torch.equal(stub.shown["ids"], batch.x[:, :-1])
    assert losses.main["next_token"].item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert losses.per_sample.shape == (4,)


def test_nats_of_low_precision_logits_are_computed_in_float32() -> None:
    ids = torch.tensor([[0, 1]])
    logits = torch.tensor([[[80.0, 0.0], [0.0, -0.1]]], dtype=torch.bfloat16)
    nats = token_nats(logits, ids)
    assert nats.dtype == torch.float32
    expected = math.log(1 + math.exp(float(-logits[0, 1, 1].float())))
    assert nats[0].tolist() == pytest.approx([0.0, expected], abs=1e-6)


def test_padding_is_neither_read_nor_predicted_nor_counted() -> None:
    model, objective = woken(small(TEXTS[0])), NextTokenConfig().build(None)
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[0, 10:] = False
    mask[1] = False
    batch = words(3)
    padded = Batch(batch.x, Condition(tokens_mask=mask), batch.ids)
    losses = objective(model, padded, generator(0))
    short = objective(model, Batch(batch.x[:1, :10], Condition(), batch.ids[:1]), generator(0))
    whole = objective(model, Batch(batch.x[2:], Condition(), batch.ids[2:]), generator(0))
    expected = (short.per_sample[0], torch.zeros(()), whole.per_sample[0])
    torch.testing.assert_close(losses.per_sample, torch.stack(expected), rtol=1e-4, atol=1e-5)
    mean = (9 * expected[0] + 23 * expected[2]) / 32
    torch.testing.assert_close(losses.main["next_token"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [NextTokenConfig(), MaskedTokenConfig()])
def test_a_batch_of_padding_costs_nothing(config: Any) -> None:
    batch = draw(SKEWED, 4, 6)
    cond = Condition(tokens_mask=torch.zeros(4, 6, dtype=torch.bool))
    losses = config.build(None)(Stub(SKEWED), Batch(batch.x, cond, batch.ids), generator(0))
    assert losses.total == 0 and (losses.per_sample == 0).all()
    assert losses.extras["bits_per_token"] == 0


def test_the_masked_bound_counts_real_tokens_only() -> None:
    batch, objective = draw(SKEWED, 6, 64), MaskedTokenConfig(lowest=0.5).build(None)
    mask = torch.arange(64).expand(6, 64) < 40
    padded = Batch(batch.x, Condition(tokens_mask=mask), batch.ids)
    stub = Stub(SKEWED)
    losses = objective(stub, padded, generator(0))
    hidden = stub.shown["ids"] == stub.mask_token
    assert not (hidden & ~mask).any()
    nats = -SKEWED.log()[batch.x] * hidden
    torch.testing.assert_close(losses.per_sample, nats.sum(1) / (stub.shown["t"] * 40))
