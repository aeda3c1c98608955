"""Attention against softmax written out, and what masks may and may not let through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.nn.attention import SelfAttention
from coterie.nn.embed import rotate
from coterie.nn.mlp import GeluMLP, SwiGLU

WIDTH, HEADS, TOKENS = 16, 4, 6


def attention(**options: object) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(WIDTH, HEADS, **options).double()


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, WIDTH, generator=rng, dtype=torch.float64)


def by_hand(layer: SelfAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """Head by head; ``allowed`` bool [B, N, N]."""
    width = WIDTH // HEADS
    shared = (layer.qkv.out_features - WIDTH) // 2
    q, k, v = layer.qkv(x).split((WIDTH, shared, shared), dim=-1)
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        first = head * shared // WIDTH * width
        read = slice(first, first + width)  # what the run of heads shares
        one_q, one_k = layer.query_norm(q[..., part]), layer.key_norm(k[..., read])
        if layer.rotary_length:
            cos, sin = layer.rotary_cos[: x.shape[1]], layer.rotary_sin[: x.shape[1]]
            one_q, one_k = rotate(one_q, cos, sin), rotate(one_k, cos, sin)
        scores = one_q @ one_k.transpose(1, 2) / width**0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        heads.append(weights @ v[..., read])
    return layer.out(torch.cat(heads, dim=-1))


ALL = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"causal": True},
        {"rotary_length": 16},
        {"causal": True, "rotary_length": 6, "qk_norm": True},
        {"kv_heads": 2},
        {"kv_heads": 1, "causal": True, "rotary_length": 6, "qk_norm": True},
    ],
    ids=str,
)
def test_attention_equals_softmax_written_out(options: dict) -> None:
    layer = attention(**options)
    if options.get("qk_norm"):
        with torch.no_grad():
            layer.query_norm.weight.mul_(1.7)
    allowed = ALL.tril() if options.get("causal") else ALL
    torch.testing.assert_close(layer(tokens()), by_hand(layer, tokens(), allowed))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_never_read_and_may_hold_anything(causal: bool) -> None:
    layer = attention(causal=causal)
    mask = torch.tensor([[True, True, True, False, False, False], [True] * 6])
    x = tokens()
    answer = layer(x, mask)
    allowed = mask[:, None, :] | torch.eye(TOKENS, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    torch.testing.assert_close(answer, by_hand(layer, x, allowed))
    other = x.clone()
    other[0, 3:] = 1e3
    torch.testing.assert_close(layer(other, mask)[0, :3], answer[0, :3])
    torch.testing.assert_close(answer[0, :3], layer(x[:1, :3])[0])


@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_of_padding_only_stays_finite_with_finite_gradient(causal: bool) -> None:
    layer = attention(causal=causal)
    x = tokens().requires_grad_(True)
    mask = torch.tensor([[False] * TOKENS, [True] * TOKENS])
    answer = layer(x, mask)
    answer.square().sum().backward()
    assert answer.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


def test_a_causal_token_reads_nothing_after_it() -> None:
    layer = attention(causal=True, rotary_length=TOKENS)
    x = tokens().requires_grad_(True)
    (gradient,) = torch.autograd.grad(layer(x)[:, 2].square().sum(), x)
    assert gradient[:, 3:].abs().max() == 0
    assert (gradient[:, :3].abs().amax(dim=-1) > 0).all()


def test_normalised_queries_do_not_feel_their_scale() -> None:
    layer, plain = attention(qk_norm=True, qkv_bias=False), attention(qkv_bias=False)
    x = tokens()
    for one, same in ((layer, True), (plain, False)):
        before = one(x)
        with torch.no_grad():
            one.qkv.weight[: 2 * WIDTH] *= 50.0
        assert torch.allclose(one(x), before, rtol=1e-3) is same


def test_feed_forward_networks_equal_their_formulas() -> None:
    torch.manual_seed(0)
    x = tokens()
    gelu = GeluMLP(WIDTH, 7).double()
    h = x @ gelu.up.weight.T + gelu.up.bias
    tanh = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(gelu(x), tanh @ gelu.down.weight.T + gelu.down.bias)
    swiglu = SwiGLU(WIDTH, 7).double()
    gate, up = x @ swiglu.gate_up.weight[:7].T, x @ swiglu.gate_up.weight[7:].T
    torch.testing.assert_close(swiglu(x), (F.silu(gate) * up) @ swiglu.down.weight.T)
    assert [name for name, _ in swiglu.named_parameters()] == ["gate_up.weight", "down.weight"]
