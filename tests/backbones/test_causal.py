"""The text transformer: what a position may see, lengths, padding."""

from __future__ import annotations

import pytest
import torch

from coterie.core.config import override
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.denoiser import TokenDenoiserConfig
from small_models import TEXTS, small, woken, words

T0 = torch.zeros(3)


def bidirectional(name: str = TEXTS[0]):
    changes = {"model.masking": "masked", "model.backbone.trunk.causal": False}
    config = small(name)
    data = override(config.model, {k.removeprefix("model."): v for k, v in changes.items()})
    return config.replace(model=data, objective="masked_token")


@pytest.mark.parametrize("name", TEXTS)
def test_a_causal_model_does_not_peek_ahead(name: str) -> None:
    model = woken(small(name))
    ids = words(3).x
    before = model(ids, T0, Condition()).value
    for n in (0, 7, 22):
        changed = ids.clone()
        changed[:, n + 1 :] = (changed[:, n + 1 :] + 91) % 256
        after = model(changed, T0, Condition()).value
        torch.testing.assert_close(after[:, : n + 1], before[:, : n + 1], rtol=1e-4, atol=1e-5)
        assert (after[:, n + 1] - before[:, n + 1]).abs().max() > 1e-3
        torch.testing.assert_close(
            model(ids[:, : n + 1], T0, Condition()).value, before[:, : n + 1], rtol=1e-4, atol=1e-5
        )


def test_a_bidirectional_model_sees_both_sides() -> None:
    model = woken(bidirectional())
    ids = words(3).x
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 91) % 256
    gap = model(changed, T0, Condition()).value - model(ids, T0, Condition()).value
    assert (gap.abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", TEXTS)
def test_text_samples_do_not_depend_on_their_batch_mates(name: str) -> None:
    model = woken(small(name))
    ids = words(3).x
    whole = model(ids, T0, Condition()).value
    alone = model(ids[1:2], T0[:1], Condition()).value
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-4, atol=1e-5)


def test_padding_is_neither_read_nor_routed() -> None:
    model = woken(bidirectional())
    ids = words(3).x
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[0, 10:] = False
    mask[2] = False  # nothing but padding
    answer = model(ids, T0, Condition(tokens_mask=mask))
    short = model(ids[:1, :10], T0[:1], Condition())
    torch.testing.assert_close(answer.value[0, :10], short.value[0], rtol=1e-4, atol=1e-5)
    assert answer.value.isfinite().all()
    for routing in answer.routings:
        choices = routing.one_hot().view(3, 24, -1).sum(-1)
        assert (choices[~mask] == 0).all() and (choices[mask] == routing.top_k).all()


def test_lengths_and_shapes_out_of_range_are_named() -> None:
    model = woken(small(TEXTS[0]))
    assert model(words(2, length=24).x, T0[:2], Condition()).value.shape == (2, 24, 260)
    with pytest.raises(DataError, match=r"token ids: \(2, 25\).*N <= 24"):
        model(words(2, length=25).x, T0[:2], Condition())
    with pytest.raises(DataError, match=r"token ids: \(24,\)"):
        model(words(1).x[0], torch.zeros(24), Condition())


def test_the_trunk_must_suit_the_masking() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.trunk\.causal: True .*bidirectional"):
        TokenDenoiserConfig.from_dict({"masking": "masked"})
    with pytest.raises(ConfigError, match=r"backbone\.trunk\.causal: False"):
        override(TokenDenoiserConfig(), {"backbone.trunk.causal": False})
