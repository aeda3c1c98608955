"""The two losses with structure of their own: routing contrast (ProMoE), diffusion prior."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from expert_cases import BATCH, STEPS, WIDTH, build, context, inputs

from coterie.core.context import Context
from coterie.core.routing import Routing
from coterie.experts.balance import (
    ContrastiveBalance,
    DiffusionPrior,
    jensen_shannon,
    match_columns,
    usage_map,
)
from coterie.experts.windows import sliding_windows

LOSS = ContrastiveBalance()


def cosine_routing(
    rows: torch.Tensor, prototypes: torch.Tensor, ids: torch.Tensor, batch: int = 1, mask=None
) -> Routing:
    logits = F.normalize(rows, dim=1) @ F.normalize(prototypes, dim=1).T
    return Routing(
        "token", len(prototypes), ids, logits.gather(1, ids.clamp_max(len(prototypes) - 1)), logits,
        logits, (batch, len(rows) // batch), mask, inputs=rows, prototypes=prototypes,
    )  # fmt: skip


def contrast_by_hand(rows, prototypes, assignments: dict[int, list[int]], tau: float) -> float:
    """Prototypes are the rows of the logits, means of assigned tokens the columns."""
    valid = [e for e, own in assignments.items() if own]
    means = {e: rows[assignments[e]].mean(0) for e in valid}
    total = 0.0
    for i in valid:
        logits = [F.cosine_similarity(prototypes[i], means[j], dim=0).item() / tau for j in valid]
        total += math.log(sum(math.exp(v) for v in logits)) - logits[valid.index(i)]
    return total / len(valid)


def test_contrastive_loss_equals_the_formula_with_an_empty_expert() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, prototypes = torch.randn(6, 8, generator=rng), torch.randn(4, 8, generator=rng)
    ids = torch.tensor([[0], [1], [1], [3], [0], [3]])
    assigned = {0: [0, 4], 1: [1, 2], 2: [], 3: [3, 5]}
    value = LOSS.value(cosine_routing(rows, prototypes, ids)).item()
    assert value == pytest.approx(contrast_by_hand(rows, prototypes, assigned, 0.07), rel=1e-4)
    both = torch.tensor([[0, 1], [1, 4], [1, 2], [3, 4], [0, 4], [3, 1]])
    assigned = {0: [0, 4], 1: [0, 1, 2, 5], 2: [2], 3: [3, 5]}
    value = LOSS.value(cosine_routing(rows, prototypes, both)).item()
    assert value == pytest.approx(contrast_by_hand(rows, prototypes, assigned, 0.07), rel=1e-4)


def test_contrastive_loss_is_log_v_for_equal_similarities_and_falls_when_aligned() -> None:
    same = torch.ones(6, 4)
    ids = torch.tensor([[0], [1], [2], [0], [1], [2]])
    equal = LOSS.value(cosine_routing(same, torch.ones(3, 4), ids))
    assert equal.item() == pytest.approx(math.log(3), rel=1e-5)
    means = torch.eye(3, 4)[[0, 1, 2, 0, 1, 2]]
    aligned = LOSS.value(cosine_routing(means, torch.eye(3, 4), ids))
    swapped = LOSS.value(cosine_routing(means, torch.eye(3, 4)[[1, 2, 0]], ids))
    assert aligned.item() < 1e-4 < math.log(3) < swapped.item()


def test_contrastive_loss_reaches_prototypes_and_tokens() -> None:
    layer = build("promoe", balance=["contrastive"])
    h = inputs(16)
    out = layer(h, context(16, null=(1,)))
    (aux,) = layer.config.balance[0].losses(out.routings)
    aux.value.backward()
    assert layer.routers[0].score.prototypes.grad.abs().max() > 0
    assert h.grad is not None and h.grad[0].abs().max() > 0 and h.grad[1].abs().max() == 0
    assert layer.pool.up.grad is None


def test_only_unconditional_samples_give_zero_loss_and_zero_gradient() -> None:
    layer = build("promoe", balance=["contrastive"])
    out = layer(inputs(16), context(16, null=(0, 1)))
    (aux,) = layer.config.balance[0].losses(out.routings)
    assert aux.value.item() == 0.0
    (out.y.square().sum() + aux.value).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.routers[0].score.prototypes.grad.abs().max() == 0
    assert layer.pool.up.grad[:-1].abs().max() == 0 < layer.pool.up.grad[-1].abs().max()


def test_only_conditional_samples_leave_the_reserved_expert_alone() -> None:
    layer = build("promoe", balance=["contrastive"])
    out = layer(inputs(16), context(16, null=()))
    out.y.square().sum().backward()
    assert layer.pool.up.grad[-1].abs().max() == 0 < layer.pool.up.grad[:-1].abs().max()


def test_one_valid_expert_gives_zero() -> None:
    rows = torch.randn(4, 8, requires_grad=True)
    value = LOSS.value(cosine_routing(rows, torch.randn(3, 8), torch.full((4, 1), 1)))
    value.backward()
    assert value.item() == 0.0 and rows.grad is not None and rows.grad.abs().max() == 0


def test_expert_choice_contrast_is_per_sample() -> None:
    part = ContrastiveBalance(statistics="sequence")
    layer = build("promoe_expert_choice", balance=[part.model_dump()])
    ctx = context(12, null=())
    routing = layer(inputs(12), ctx).routings[0]
    rows = routing.inputs.view(BATCH, 12, WIDTH)
    ids = routing.ids.view(BATCH, 12, -1)
    expected = 0.0
    for sample in range(BATCH):
        assigned = {e: [t for t in range(12) if e in ids[sample, t].tolist()] for e in range(6)}
        assert all(len(own) == 2 for own in assigned.values())
        expected += contrast_by_hand(rows[sample], routing.prototypes, assigned, 0.07) / BATCH
    assert part.value(routing).item() == pytest.approx(expected, rel=1e-4)


def test_training_on_the_contrast_separates_experts() -> None:
    layer = build("promoe", balance=["contrastive"])
    h, ctx = inputs(64).detach(), context(64, null=())
    optimiser = torch.optim.Adam(layer.routers.parameters(), lr=0.02)
    values = []
    for _ in range(40):
        (aux,) = layer.config.balance[0].losses(layer(h, ctx).routings)
        optimiser.zero_grad()
        aux.value.backward()
        optimiser.step()
        values.append(aux.value.item())
    assert values[-1] < 0.5 * values[0]


# Diffusion prior


def prior_routings(layers: int = 3, num_experts: int = 3, seed: int = 0) -> list[Routing]:
    ctx = context(4)
    routings = []
    for layer in range(layers):
        made = build("switch_dit", num_experts=num_experts)
        made.reset_parameters(torch.Generator().manual_seed(seed + layer))
        routings.append(made.routers[0](inputs(4), ctx.replace(layer=layer)))
    return routings


def test_always_on_units_of_the_prior() -> None:
    """Units that are open at every step: L * max(2k - E, 0); with E = 3, k = 2 one per layer."""
    for layers, num_experts, k in ((4, 3, 2), (6, 4, 3), (5, 4, 2), (3, 5, 1)):
        size = layers * k
        prior = sliding_windows(1000, layers * num_experts, size, 4.0)
        assert (prior.sum(1) == size).all()
        assert prior.all(0).sum() == layers * max(2 * k - num_experts, 0)


def test_prior_loss_equals_its_steps_written_out() -> None:
    routings = prior_routings()
    usage = usage_map(routings)
    for step, layer in itertools.product(range(0, STEPS, 7), range(3)):
        best = sorted(range(3), key=lambda e: -routings[layer].table[step, e].item())[:2]
        assert usage[step, layer * 3 : layer * 3 + 3].nonzero().flatten().tolist() == sorted(best)
    prior = sliding_windows(STEPS, 9, 6, 4.0)
    column = match_columns(usage, prior, None)
    assert sorted(column.tolist()) == list(range(9))
    total = 0.0
    for sample, step in enumerate(routings[0].step_index.tolist()):
        share = torch.cat([r.probs[sample] for r in routings]) / 3
        target = prior[step, column].float()
        assert share.sum().item() == pytest.approx(1.0, abs=1e-5)
        total += jensen_shannon(share, target / target.sum(), 1e-6).item() / BATCH
    assert DiffusionPrior().value(routings).item() == pytest.approx(total, rel=1e-5)


def test_matching_is_the_best_of_all_permutations() -> None:
    rng = torch.Generator().manual_seed(0)
    usage = torch.rand(20, 5, generator=rng) > 0.5
    prior = sliding_windows(20, 5, 3, 2.0)

    def cost(columns) -> int:
        return int((usage ^ prior[:, list(columns)]).sum())

    best = min(cost(p) for p in itertools.permutations(range(5)))
    for seed in (None, 1, 2):
        made = None if seed is None else torch.Generator().manual_seed(seed)
        assert cost(match_columns(usage, prior, made).tolist()) == best


def test_matching_breaks_ties_at_random_and_repeats_under_a_seed() -> None:
    usage, prior = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)
    drawn = [
        tuple(match_columns(usage, prior, torch.Generator().manual_seed(seed)).tolist())
        for seed in (0, 1, 2, 0)
    ]
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


def test_divergence_is_zero_when_equal_and_at_most_log_two() -> None:
    p = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert jensen_shannon(p, p, 1e-6).abs().max() < 1e-6
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert jensen_shannon(left, right, 1e-6).item() == pytest.approx(math.log(2), rel=1e-4)
    q = p.flip(0)
    assert (jensen_shannon(p, q, 1e-6) >= -1e-7).all()
    torch.testing.assert_close(jensen_shannon(p, q, 1e-6), jensen_shannon(q, p, 1e-6))


def test_prior_gradient_reaches_every_gate_through_probabilities_only() -> None:
    layers = [build("switch_dit", balance=["diffusion_prior"]) for _ in range(3)]
    ctx = context(4)
    embedding = ctx.time_embedding.clone().requires_grad_()
    ctx = ctx.replace(time_embedding=embedding)
    routings = [
        layer(inputs(4), ctx.replace(layer=i)).routings[0] for i, layer in enumerate(layers)
    ]
    (aux,) = layers[0].config.balance[0].losses(routings, torch.Generator().manual_seed(0))
    assert aux.layer is None and aux.key == "diffusion_prior"
    aux.value.backward()
    assert embedding.grad is not None and embedding.grad.abs().max() > 0
    for layer in layers:
        assert layer.routers[0].score.proj.weight.grad.abs().max() > 0
        assert layer.pool.weight.grad is None


def test_prior_pulls_neighbouring_steps_to_the_same_experts() -> None:
    layers = [build("switch_dit", balance=["diffusion_prior"]) for _ in range(2)]
    optimiser = torch.optim.Adam([p for x in layers for p in x.routers.parameters()], lr=0.05)
    values = []
    for _ in range(60):
        routings = [x(inputs(1), context(1).replace(layer=i)).routings[0]
                    for i, x in enumerate(layers)]  # fmt: skip
        (aux,) = layers[0].config.balance[0].losses(routings)
        optimiser.zero_grad()
        aux.value.backward()
        optimiser.step()
        values.append(aux.value.item())
    assert values[-1] < 0.6 * values[0]


def test_without_tables_there_is_no_prior_term() -> None:
    layer = build("switch_dit", balance=["diffusion_prior"])
    out = layer(inputs(4), context(4).replace(time_table=None))
    assert layer.config.balance[0].losses(out.routings) == ()
    assert Context(1, 1).time_table is None
