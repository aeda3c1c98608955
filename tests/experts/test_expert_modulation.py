"""Modulation experts and the uncertainty-aware router (MoFME): the card's invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_cases import BATCH, WIDTH, build, context, inputs
from torch.nn import functional as F

from coterie.core.errors import ConfigError
from coterie.experts import ExpertLayer, ExpertLayerConfig, Router, RouterConfig
from coterie.experts.routers.uncertain import EPS, UncertainScore, whiten

MOFME: dict[str, Any] = {
    "num_experts": 4,
    "experts": "modulation",
    "stem": "star",
    "adaptor": 4.0,
    "router": {"when": "after"},
}


def layer(**changes: Any) -> ExpertLayer:
    torch.manual_seed(0)
    return ExpertLayerConfig.from_dict({**MOFME, **changes}).build(WIDTH)


def test_neutral_modulations_are_the_shared_block_whatever_the_router_says() -> None:
    for form in ("linear", "vector"):
        made = layer(experts={"kind": "modulation", "form": form})
        with torch.no_grad():
            for name, stack in made.pool.stacks().items():
                stack.fill_(1.0 if name == "gamma_bias" else 0.0)
        h = inputs(5)
        want = made.adaptor(made.stem(h))
        torch.testing.assert_close(made(h, context(5)).y, want, atol=1e-5, rtol=1e-5)


def test_the_layer_is_the_equation() -> None:
    made = layer()
    h, ctx = inputs(5), context(5)
    y, (routing,) = made(h, ctx).y, made(h, ctx).routings
    u = F.gelu(F.linear(h, made.stem.gate.weight, made.stem.gate.bias))
    u = u * F.linear(h, made.stem.value.weight, made.stem.value.bias)
    mixed = torch.zeros_like(u)
    pool = made.pool
    for row in range(BATCH * 5):
        b, n = divmod(row, 5)
        for e, gate in zip(routing.ids[row].tolist(), routing.gates[row]):
            gamma = pool.gamma[e] @ u[b, n] + pool.gamma_bias[e]
            beta = pool.beta[e] @ u[b, n] + pool.beta_bias[e]
            mixed[b, n] += gate * (gamma * u[b, n] + beta)
    torch.testing.assert_close(y, made.adaptor(mixed), atol=1e-5, rtol=1e-5)
    assert (routing.gates > 0).sum(1).tolist() == [2] * len(routing.gates)
    torch.testing.assert_close(routing.gates.sum(1), torch.ones(BATCH * 5))


@pytest.mark.filterwarnings("ignore:.*one expert per row")
def test_one_expert_is_one_modulated_block() -> None:
    for score in ("linear", "uncertain"):
        router = {"when": "after", "score": score, "select": {"kind": "top_k", "k": 1}}
        made = layer(num_experts=1, router=router)
        h = inputs(5)
        u = made.stem(h)
        gamma = F.linear(u, made.pool.gamma[0], made.pool.gamma_bias[0])
        beta = F.linear(u, made.pool.beta[0], made.pool.beta_bias[0])
        for ctx in (context(5), training(5)):
            y, (routing,) = made(h, ctx).y, made(h, ctx).routings
            assert (routing.gates == 1).all()
            torch.testing.assert_close(y, made.adaptor(gamma * u + beta), atol=1e-5, rtol=1e-5)


def test_ties_choose_exactly_k_and_weights_sum_to_one() -> None:
    """Equal logits everywhere: a threshold at the k-th value would keep all experts."""
    for score in ("linear", "uncertain"):
        made = layer(router={"when": "after", "score": score, "select": {"kind": "top_k", "k": 2}})
        with torch.no_grad():
            for parameter in made.router(0).parameters():
                parameter.zero_()
        for ctx in (context(5), training(5)):
            (routing,) = made(inputs(5), ctx).routings
            assert (routing.one_hot().sum(1) == 2).all() and (routing.one_hot() <= 1).all()
            torch.testing.assert_close(routing.gates, torch.full_like(routing.gates, 0.5))


@pytest.mark.parametrize(("form", "per_expert"), [("linear", 2 * WIDTH**2), ("vector", 0)])
def test_parameters_are_counted_as_published(form: str, per_expert: int) -> None:
    """2 d^2 (shared) + E * 2 d^2 + 8 d^2 + d E; vectors instead of maps: 2 d E. Biases apart."""
    made = layer(experts={"kind": "modulation", "form": form})
    matrices = sum(p.numel() for n, p in made.named_parameters() if "bias" not in n)
    assert matrices == 2 * WIDTH**2 + 4 * per_expert + 8 * WIDTH**2 + 4 * WIDTH
    assert sum(p.numel() for n, p in made.pool.named_parameters() if "bias" in n) == 2 * 4 * WIDTH


def test_the_router_may_read_the_stream_before_its_norm() -> None:
    made = layer(router_reads="stream")
    h = inputs(5)
    stream = 7 * h.flip(1)
    routing = made(h, context(5).replace(stream=stream)).routings[0]
    want = F.linear(stream.flatten(0, 1), made.router(0).score.proj.weight)
    torch.testing.assert_close(routing.logits, want)
    with pytest.raises(ConfigError, match=r"router_reads: 'stream'.*only slots of a trunk"):
        made(h, context(5))
    with pytest.raises(ConfigError, match=r"router_reads.*later rounds"):
        layer(router_reads="stream", rounds=2)


def router(num_experts: int = 5, **score: Any) -> Router:
    torch.manual_seed(1)
    config = RouterConfig.from_dict({"score": {"kind": "uncertain", **score}})
    return config.build(WIDTH, num_experts)


def training(tokens: int = 6, seed: int = 0) -> Any:
    ctx = context(tokens)
    return ctx.replace(training=True, rng=torch.Generator().manual_seed(seed))


def test_without_dropout_it_is_the_plain_router() -> None:
    made = router(dropout=0.0)
    plain = RouterConfig().build(WIDTH, 5)
    plain.load_state_dict({"score.proj.weight": made.score.inner.proj.weight})
    h = inputs(6)
    for ctx in (training(), context(6)):
        assert torch.equal(made(h, ctx).logits, plain(h, ctx).logits)


def test_a_score_that_wavers_counts_less() -> None:
    """Two experts with the same mean logit; one rests on a single channel, so dropout shakes it."""
    made = router(2, passes=200, dropout=0.5)
    with torch.no_grad():
        made.score.inner.proj.weight.zero_()
        made.score.inner.proj.weight[0] = 1.0 / WIDTH
        made.score.inner.proj.weight[1, 3] = 1.0
    logits = made(torch.ones(1, 50, WIDTH), training(50)).logits
    assert (logits[:, 0] > 2 * logits[:, 1]).all()


def test_full_whitening_of_independent_scores_is_the_diagonal_one() -> None:
    passes = torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]], [[1.0, 8.0]], [[3.0, 8.0]]])
    spread = passes.var(dim=0).add(0.5 * EPS).sqrt()
    torch.testing.assert_close(whiten(passes), passes.mean(0) / spread, atol=1e-4, rtol=1e-4)


def test_whitening_is_not_invariant_to_a_constant() -> None:
    """Unlike a softmax: mu / s is not shifted by adding the same number to all logits."""
    passes = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    ours, moved = whiten(passes).softmax(1), whiten(passes + 5.0).softmax(1)
    assert (ours - moved).abs().max() > 0.01


@pytest.mark.parametrize("whitening", ["diagonal", "full"])
def test_experts_may_be_renamed(whitening: str) -> None:
    made, other = (router(5, whiten=whitening) for _ in range(2))
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        other.score.inner.proj.weight.copy_(made.score.inner.proj.weight[order])
    h = inputs(6)
    ours, theirs = made(h, training()), other(h, training())
    torch.testing.assert_close(ours.logits[:, order], theirs.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whitening", ["diagonal", "full"])
def test_the_gradient_reaches_the_router_through_the_uncertainty(whitening: str) -> None:
    made = router(5, whiten=whitening)
    made(inputs(6), training()).probs[:, 0].sum().backward()
    grad = made.score.inner.proj.weight.grad
    assert grad.isfinite().all() and (grad.abs().sum(1) > 0).all()


def test_deviations_are_remembered_in_training_only() -> None:
    made = router(evaluate="running")
    h = inputs(6)
    made(h, context(6))
    assert (made.score.deviation == 1).all()
    for seed in range(400):
        made(h, training(seed=seed))
        made.after_step()
    known = made.score.deviation.clone()
    passes = [made.score.inner(F.dropout(h.flatten(0, 1), 0.1), context(6)) for _ in range(300)]
    spread = torch.stack([scored.logits for scored in passes]).std(0).mean(0)
    torch.testing.assert_close(known, spread, atol=0.05, rtol=0.25)
    plain = made.score.inner(h.flatten(0, 1), context(6)).logits
    torch.testing.assert_close(made(h, context(6)).logits, plain * known.mean() / known)
    assert torch.equal(made.score.deviation, known)


def test_passes_outside_training_are_fixed_and_rows_independent() -> None:
    made = router(evaluate="passes")
    h = inputs(6)
    whole, again = made(h, context(6)).logits, made(h, context(6)).logits
    assert torch.equal(whole, again)
    alone = made(h[:1], context(6).replace(batch=1)).logits
    torch.testing.assert_close(whole[:6], alone)


@pytest.mark.parametrize("name", ["noise_level", "recurrent", "uncertain"])
def test_only_scores_of_rows_can_be_shaken(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"of: '{name}' is not allowed"):
        UncertainScore.from_dict({"of": name})


def test_the_cases_run_everywhere() -> None:
    for name in ("mofme", "mofme_vector"):
        assert build(name).stem is not None
