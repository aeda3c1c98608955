"""Sampling text: no mask is left, samples follow their own seeds, cold sampling is greedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from coterie.core.config import override
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import SampleNoise
from coterie.solvers.text import generate_text
from small_models import small, woken

EOS = 258


def model_of(masking: str):
    changes = {
        "model.masking": masking,
        "model.backbone.trunk.causal": masking == "next_token",
    }
    config = small("deepseekmoe/text")
    part = override(config.model, {k.removeprefix("model."): v for k, v in changes.items()})
    return woken(config.replace(model=part), std=0.3)


def texts(model, seeds: list[int], length: int = 12, steps: int = 6, temperature: float = 1.0):
    noise = SampleNoise(seeds)
    return generate_text(
        model, len(seeds), length, steps, noise, start=EOS, temperature=temperature
    )


@pytest.mark.parametrize("masking", ["next_token", "masked"])
def test_sample_depends_on_its_own_seed_only(masking: str) -> None:
    model = model_of(masking)
    together = texts(model, [3, 4, 5])
    assert together.shape == (3, 12) and together.dtype == torch.int64
    assert torch.equal(texts(model, [5, 3]), together[[2, 0]])
    assert torch.equal(texts(model, [4]), together[[1]])
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("masking", ["next_token", "masked"])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 50.0])
def test_the_mask_token_is_never_in_a_sample(masking: str, temperature: float) -> None:
    model = model_of(masking)
    ids = texts(model, list(range(8)), temperature=temperature)
    assert model.mask_token == 259
    assert ((ids >= 0) & (ids < 259)).all()


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_unmasking_ends_in_any_number_of_steps(steps: int) -> None:
    assert (texts(model_of("masked"), [1, 2], steps=steps) != 259).all()


def test_cold_autoregressive_sampling_is_greedy() -> None:
    model = model_of("next_token")
    ids = [EOS]
    with torch.no_grad():
        while len(ids) < 10:
            logits = model(torch.tensor([ids]), torch.zeros(1), Condition()).value[0, -1]
            ids.append(int(logits[:259].argmax()))
    cold = texts(model, [1, 2], length=10, temperature=1e-5)
    assert cold.tolist() == [ids, ids]


class Fixed:
    """Answers the same logits everywhere, and notes how much of its input was masked."""

    mask_token = 3

    def __init__(self, masking: str, probs: list[float]) -> None:
        self.config = SimpleNamespace(masking=masking)
        self.logits = torch.tensor(probs).log()
        self.masked: list[float] = []
        self.times: list[float] = []

    def __call__(self, ids: Tensor, t: Tensor, cond: Condition) -> Prediction:
        self.masked.append((ids == self.mask_token).float().mean().item())
        self.times.append(float(t[0]))
        return Prediction(self.logits.expand(*ids.shape, -1).clone(), "logits")


@pytest.mark.parametrize("masking", ["next_token", "masked"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_tempered_distribution(masking: str, temperature: float) -> None:
    stub = Fixed(masking, [0.5, 0.2, 0.1, 0.2])
    noise = SampleNoise(range(60))
    ids = generate_text(stub, 60, 101, 4, noise, start=0, temperature=temperature)[:, 1:]
    weights = torch.tensor([0.5, 0.2, 0.1]) ** (1 / temperature)
    found = torch.bincount(ids.flatten(), minlength=4).float() / ids.numel()
    torch.testing.assert_close(found[:3], weights / weights.sum(), atol=0.025, rtol=0)


def test_unmasking_leaves_the_share_that_the_time_says() -> None:
    stub = Fixed("masked", [0.5, 0.3, 0.2, 0.0])
    generate_text(stub, 50, 80, 5, SampleNoise(range(50)), start=0)
    assert stub.times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert stub.masked == pytest.approx(stub.times, abs=0.03)


def test_a_revealed_token_stays() -> None:
    stub = Fixed("masked", [0.4, 0.3, 0.3, 0.0])
    seen: list[Tensor] = []
    call = stub.__call__

    class Watching(Fixed):
        def __call__(self, ids: Tensor, t: Tensor, cond: Condition) -> Prediction:
            seen.append(ids.clone())
            return call(ids, t, cond)

    final = generate_text(Watching("masked", [1.0]), 10, 30, 6, SampleNoise(range(10)), start=0)
    for ids in seen:
        revealed = ids != 3
        assert torch.equal(ids[revealed], final[revealed])
