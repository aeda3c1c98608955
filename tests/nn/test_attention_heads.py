"""Attention with heads of any width, dropout, and feed-forward networks with either GELU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coterie.backbones.trunk import TrunkConfig
from coterie.core.errors import ConfigError
from coterie.experts import dense
from coterie.nn.attention import Memory, SelfAttention
from coterie.nn.mlp import GeluMLP


def test_C11_heads_wider_than_their_share_by_hand() -> None:
    torch.manual_seed(0)
    made, x = SelfAttention(6, heads=2, head_width=5, qkv_bias=False), torch.randn(3, 4, 6)
    assert made.qkv.weight.shape == (30, 6) and made.out.weight.shape == (6, 10)
    q, k, v = (x @ part.T for part in made.qkv.weight.chunk(3))
    heads = []
    for head in (slice(0, 5), slice(5, 10)):
        weights = (q[..., head] @ k[..., head].mT / 5**0.5).softmax(-1)
        heads.append(weights @ v[..., head])
    torch.testing.assert_close(made(x), made.out(torch.cat(heads, dim=-1)))
    kept = made.keys_values(x)  # tokens that are kept are attended to as those of x are
    assert kept.shape == (3, 2, 4, 10)
    twice = made(x, None, Memory(kept))
    torch.testing.assert_close(twice, made(x))


def test_C11_dropout_falls_on_the_answer_in_training_only() -> None:
    made, x = SelfAttention(64, heads=2, dropout=0.5), torch.randn(2, 4, 64)
    plain = made.eval()(x)
    torch.manual_seed(0)
    shaken = made.train()(x)
    dropped = shaken == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(shaken[~dropped], 2 * plain[~dropped])


@pytest.mark.parametrize("kind", [GeluMLP, dense.GeluMLP])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_C11_either_gelu(kind: type[GeluMLP], activation: str) -> None:
    torch.manual_seed(0)
    made, x = kind(8, 16, activation), 3 * torch.randn(5, 8)
    approximate = "none" if activation == "gelu" else "tanh"
    wanted = made.down(F.gelu(made.up(x), approximate=approximate))
    torch.testing.assert_close(made(x), wanted, atol=1e-6, rtol=1e-6)
    other = made.down(F.gelu(made.up(x), approximate="tanh" if approximate == "none" else "none"))
    assert (other - wanted).abs().max() > 2e-5


def test_C11_a_trunk_with_heads_that_do_not_divide_its_width() -> None:
    config = TrunkConfig(width=6, heads=4, head_width=2)
    assert config.head_width == 2
    with pytest.raises(ConfigError, match="heads: 4"):
        TrunkConfig.from_dict({"width": 6, "heads": 4})
    with pytest.raises(ConfigError, match="even head width"):
        TrunkConfig.from_dict({"width": 6, "heads": 2, "head_width": 3, "rotary": True})
