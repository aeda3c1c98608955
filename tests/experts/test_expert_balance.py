"""Balance losses: closed forms, who gets gradient, and the known bugs of public code by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expert_cases import BATCH, WIDTH, build, context, inputs

from coterie.core.batch import Losses
from coterie.core.context import Context
from coterie.core.routing import Routing
from coterie.experts import BALANCES, ExpertLayerConfig, RouterConfig, routers_of
from coterie.experts.balance import (
    ContrastiveBalance,
    EntropyLoss,
    SelectionBiasUpdate,
    SwitchBalance,
    ZLoss,
)


def routing_from(
    logits: torch.Tensor, k: int, batch: int = 1, mask: torch.Tensor | None = None, layer: int = 0
) -> Routing:
    probs = logits.softmax(1)
    gates, ids = probs.topk(k, dim=1)
    shape = (batch, logits.shape[0] // batch)
    return Routing("token", logits.shape[1], ids, gates, probs, logits, shape, mask, layer=layer)


def random_logits(rows: int, num_experts: int, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, num_experts, generator=rng)).requires_grad_()


def switch_by_hand(probs: torch.Tensor, ids: torch.Tensor, num_experts: int) -> float:
    """E / K * sum_e f_e P_e with plain loops; f_e = share of rows that chose e."""
    rows, k = ids.shape
    total = 0.0
    for e in range(num_experts):
        f = sum(int(e in row) for row in ids.tolist()) / rows
        total += f * probs[:, e].mean().item()
    return num_experts / k * total


# The Switch form


@pytest.mark.parametrize("num_experts, k", [(4, 1), (8, 2), (5, 5)])
def test_balance_loss_equals_the_formula(num_experts: int, k: int) -> None:
    # transformers #28255, #28021: the loss was not N/K * sum f P (counts per slot, wrong scale).
    routing = routing_from(random_logits(40, num_experts), k)
    expected = switch_by_hand(routing.probs, routing.ids, num_experts)
    assert SwitchBalance().value(routing).item() == pytest.approx(expected, rel=1e-5)


def test_balance_loss_is_one_when_uniform_and_e_when_one_expert_takes_all() -> None:
    num_experts = 6
    ids = torch.arange(12).remainder(num_experts)[:, None]
    flat = torch.zeros(12, num_experts)
    uniform = Routing("token", num_experts, ids, torch.ones(12, 1), flat.softmax(1), flat, (1, 12))
    assert SwitchBalance().value(uniform).item() == pytest.approx(1.0)
    for k in (2, 3):  # the uniform value does not depend on K
        many = torch.arange(12 * k).remainder(num_experts).view(12, k)
        again = uniform.replace(ids=many, gates=torch.ones(12, k))
        assert SwitchBalance().value(again).item() == pytest.approx(1.0)
    peak = torch.zeros(12, num_experts)
    peak[:, 2] = 60.0
    assert SwitchBalance().value(routing_from(peak, 1)).item() == pytest.approx(num_experts)


def test_balance_loss_is_added_per_layer_not_averaged_over_layers() -> None:
    # transformers #31464: statistics of all layers were pooled, so two layers with opposite
    # collapse looked balanced and alpha shrank with depth.
    peak = torch.zeros(2, 8, 2)
    peak[0, :, 0] = peak[1, :, 1] = 50.0
    layers = [routing_from(peak[i], 1, layer=i) for i in range(2)]
    aux = SwitchBalance(weight=0.5).losses(layers)
    assert [(item.name, item.layer, item.weight) for item in aux] == [
        ("switch", 0, 0.5),
        ("switch", 1, 0.5),
    ]
    total = Losses(main={}, aux=aux).total
    assert total.item() == pytest.approx(0.5 * 2 + 0.5 * 2)


def test_padding_never_enters_the_balance_loss() -> None:
    # transformers #29363: padding tokens were counted in f and P.
    logits = random_logits(20, 4)
    mask = torch.arange(20) % 3 != 0
    garbage = torch.where(mask[:, None], logits, torch.full_like(logits, float("nan")))
    masked = routing_from(logits, 2, mask=mask).replace(
        probs=garbage.softmax(1), logits=garbage, mask=mask
    )
    alone = routing_from(logits[mask], 2)
    for part in (SwitchBalance(), ZLoss(), EntropyLoss(), SwitchBalance(importance="gates")):
        expected = part.value(alone)
        assert part.value(masked).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_is_there_although_nobody_asked_for_logits() -> None:
    # transformers #44242 (PRs #44243, #44274, #44284): no loss unless logits were returned.
    layer = build("dit_moe", balance=["switch", "z_loss", "entropy"])
    out = layer(inputs(7), context(7))
    for part in layer.config.balance:
        (aux,) = part.losses(out.routings)
        assert aux.value.requires_grad and aux.value.isfinite()


def test_softmax_is_not_applied_again_inside_the_loss() -> None:
    # transformers PR #45111: the loss took a softmax of probabilities and read ~1 for any load.
    routing = routing_from(random_logits(64, 8) + torch.linspace(0, 30, 8), 1)
    assert SwitchBalance().value(routing).item() > 6.0
    twice = routing.replace(probs=routing.probs.softmax(1))
    assert SwitchBalance().value(twice).item() < 3.0


def test_loss_is_attached_to_the_graph_and_moves_the_router() -> None:
    # diffusers #11301 (HiDream): the loss was computed, then dropped.
    layer = build("dit_moe", balance=[{"kind": "switch", "weight": 0.1}])
    ctx, h = context(64), inputs(64)
    optimiser = torch.optim.SGD(layer.routers.parameters(), lr=2.0)
    with torch.no_grad():
        layer.routers[0].score.proj.weight[0].add_(h.detach().mean((0, 1)) * 20)
    values = []
    for _ in range(30):
        (aux,) = layer.config.balance[0].losses(layer(h, ctx).routings)
        optimiser.zero_grad()
        Losses(main={}, aux=(aux,)).total.backward()
        assert layer.routers[0].score.proj.weight.grad.abs().max() > 0
        optimiser.step()
        values.append(aux.value.item())
    assert values[-1] < values[0]


def test_losses_in_evaluation_mode_still_have_gradient() -> None:
    # diffusers #11301: the expert path outside training ran under no_grad.
    layer = build("dit_moe", balance=["switch"]).eval()
    out = layer(inputs(7), context(7).replace(training=False))
    (aux,) = layer.config.balance[0].losses(out.routings)
    (out.y.square().sum() + aux.value).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_counts_carry_no_gradient() -> None:
    logits = random_logits(20, 4)
    routing = routing_from(logits, 2)
    SwitchBalance().value(routing).backward()
    f = routing.counts() / routing.counts().sum() * 4
    expected = torch.autograd.grad(
        (f.detach() * routing_from(logits, 2).probs.mean(0)).sum(), logits
    )
    torch.testing.assert_close(logits.grad, expected[0])


def test_loss_reaches_the_router_only() -> None:
    layer = build("dit_moe", balance=["switch"])
    out = layer(inputs(7).detach(), context(7))
    layer.config.balance[0].losses(out.routings)[0].value.backward()
    assert layer.routers[0].score.proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for n, p in layer.named_parameters() if "routers" not in n)


def test_statistics_per_sequence_average_over_sequences_that_count() -> None:
    logits = random_logits(24, 4)
    part = SwitchBalance(statistics="sequence")
    apart = [SwitchBalance().value(routing_from(logits[i * 8 : i * 8 + 8], 2)) for i in range(3)]
    whole = routing_from(logits, 2, batch=3)
    assert part.value(whole).item() == pytest.approx(sum(a.item() for a in apart) / 3, rel=1e-5)
    mask = torch.arange(24) < 16
    masked = part.value(whole.replace(mask=mask)).item()
    assert masked == pytest.approx((apart[0] + apart[1]).item() / 2, rel=1e-5)


def test_device_groups_span_from_one_group_to_single_experts() -> None:
    routing = routing_from(random_logits(30, 6), 2)
    plain = SwitchBalance().value(routing).item()
    assert SwitchBalance(groups=6).value(routing).item() == pytest.approx(plain, rel=1e-5)
    assert SwitchBalance(groups=1).value(routing).item() == pytest.approx(1.0, rel=1e-5)
    f = routing.counts() / routing.counts().sum() * 6
    by_hand = (f.view(3, 2).mean(1) * routing.probs.mean(0).view(3, 2).sum(1)).sum()
    assert SwitchBalance(groups=3).value(routing).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_forms_not_divided_by_choices() -> None:
    routing = routing_from(random_logits(30, 6), 2)
    per_row = SwitchBalance(per_choice=False).value(routing).item()
    assert per_row == pytest.approx(2 * SwitchBalance().value(routing).item(), rel=1e-5)
    # MoDE: P from renormalised gates, f per row: K at a uniform routing.
    ids = torch.arange(24).remainder(6).view(12, 2)
    even = Routing("token", 6, ids, torch.full((12, 2), 0.5), torch.full((12, 6), 1 / 6),
                   torch.zeros(12, 6), (1, 12))  # fmt: skip
    mode = SwitchBalance(per_choice=False, importance="gates")
    assert mode.value(even).item() == pytest.approx(2.0)


def test_the_reserved_expert_is_no_part_of_the_statistics() -> None:
    layer = build("dit_moe", router={"partition": "null_label"}, balance=["switch", "z_loss"])
    h = inputs(9).detach()
    both = layer(h, context(9, null=(1,))).routings
    alone = build("dit_moe")(h[:1], Context(1, 9)).routings
    for part in layer.config.balance:
        (value,), (expected,) = part.losses(both), part.losses(alone)
        torch.testing.assert_close(value.value, expected.value)


def test_losses_of_nothing_are_zero_and_finite() -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    for routing in (
        routing_from(random_logits(10, 4), 2, mask=mask),
        routing_from(random_logits(0, 4), 2, batch=1),
    ):
        for part in (SwitchBalance(), SwitchBalance(statistics="sequence"), ZLoss(), EntropyLoss()):
            value = part.value(routing)
            value.backward(retain_graph=True)
            assert value.item() == 0.0


# Others


def test_z_loss_and_entropy_equal_their_formulas() -> None:
    logits = random_logits(30, 5)
    routing = routing_from(logits, 2)
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 30
    assert ZLoss().value(routing).item() == pytest.approx(z, rel=1e-5)
    rows = routing.probs.tolist()
    entropy = -sum(p * math.log(p) for row in rows for p in row) / 30
    assert EntropyLoss().value(routing).item() == pytest.approx(entropy, rel=1e-5)
    flat = routing_from(torch.zeros(3, 5), 2)
    assert EntropyLoss().value(flat).item() == pytest.approx(math.log(5), rel=1e-6)


def test_entropy_with_closed_candidates_has_finite_gradient() -> None:
    logits = random_logits(8, 4)
    closed = logits.masked_fill(torch.tensor([False, True, False, False]), float("-inf"))
    EntropyLoss().value(routing_from(closed, 2)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 0


def biased_layer(rounds: int = 1, shared: bool = False):
    torch.manual_seed(0)
    return ExpertLayerConfig.from_dict(
        {
            "num_experts": 4,
            "experts": {"kind": "swiglu", "hidden": 8},
            "router": {"selection_bias": True, "probability": "sigmoid"},
            "balance": [{"kind": "selection_bias", "rate": 0.25}],
            "rounds": rounds,
            "round_routing": "shared" if shared else "own",
        }
    ).build(WIDTH)


def test_selection_bias_moves_towards_the_mean_load() -> None:
    layer = biased_layer()
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    routing = layer(inputs(2), context(2)).routings[0].replace(ids=ids)
    part = layer.config.balance[0]
    part.after_step(routers_of([layer]), [routing])
    assert layer.routers[0].selection_bias.tolist() == [-0.25, 0.0, 0.0, 0.25]
    assert part.losses([routing]) == ()


def test_selection_bias_is_right_under_gradient_accumulation() -> None:
    """Two micro-batches give the update of their union, not two updates."""
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 1], [2, 0], [1, 0], [2, 1], [1, 3]])
    whole, split = biased_layer(), biased_layer()
    base = whole(inputs(4), context(4)).routings[0]
    part = SelectionBiasUpdate(rate=0.25)
    part.after_step(whole.routers, [base.replace(ids=ids)])
    half = [base.replace(ids=ids[:4], mask=None), base.replace(ids=ids[4:], mask=None)]
    part.after_step(split.routers, half)
    assert torch.equal(whole.routers[0].selection_bias, split.routers[0].selection_bias)


def test_evaluation_never_counts() -> None:
    layer = biased_layer()
    for training in (True, False):
        layer.train(training)
        layer(inputs(5), context(5).replace(training=training))
    assert (layer.routers[0].selection_bias == 0).all()
    assert set(layer.state_dict()) == {
        "routers.0.selection_bias", "routers.0.score.proj.weight", "pool.gate_up", "pool.down",
    }  # fmt: skip


def test_selection_bias_over_layers_and_rounds() -> None:
    for shared, routers in ((False, 2), (True, 1)):
        layers = [biased_layer(2, shared), biased_layer(2, shared)]
        out = [
            layer(inputs(5), context(5).replace(layer=2 * i)).routings
            for i, layer in enumerate(layers)
        ]
        flat = [routing for routings in out for routing in routings]
        layers[0].config.balance[0].after_step(routers_of(layers), flat)
        for layer, routings in zip(layers, out):
            assert len(layer.routers) == routers
            for place, router in enumerate(layer.routers):
                own = routings if shared else routings[place : place + 1]
                load = torch.stack([r.counts() for r in own]).sum(0)
                torch.testing.assert_close(
                    router.selection_bias, 0.25 * torch.sign(load.mean() - load)
                )
    with pytest.raises(ValueError, match="4 routers for 1"):
        SelectionBiasUpdate().after_step(routers_of(layers), flat[:1])


def test_selection_bias_evens_out_a_skewed_load() -> None:
    layer = biased_layer()
    h = inputs(128).detach() + 1.0
    part = SelectionBiasUpdate(rate=0.02)

    def spread() -> float:
        load = layer(h, context(128)).routings[0].counts()
        return float(load.max() / load.mean())

    before = spread()
    for _ in range(60):
        part.after_step(layer.routers, layer(h, context(128)).routings)
    assert before > 1.3 and spread() < 1.25


def test_rounds_are_named_apart_and_added() -> None:
    layer = build("chain", balance=["switch"])
    aux = layer.config.balance[0].losses(layer(inputs(7), context(7)).routings)
    assert [item.key for item in aux] == ["switch/layer0", "switch_round1/layer0"]


def test_every_balance_kind_answers_the_same_questions() -> None:
    assert set(BALANCES.kinds()) >= {
        "contrastive", "diffusion_prior", "entropy", "none", "selection_bias", "switch", "z_loss",
    }  # fmt: skip
    for kind in BALANCES.kinds():
        part = BALANCES.get(kind)()
        assert part.build() is part and part.losses([], None) == ()
    assert RouterConfig() == RouterConfig.from_json(RouterConfig().to_json())
    assert BATCH == 2


@pytest.mark.parametrize(("num_experts", "noise"), [(2, 0.0), (4, 0.0), (8, 0.1), (4, 1.0)])
def test_C9_contrastive_loss_near_0_is_right_in_float32(num_experts: int, noise: float) -> None:
    """At 1e-5 a difference of numbers near 14 has no more than three digits left."""
    rng = torch.Generator().manual_seed(0)
    prototypes = torch.randn(num_experts, 64, generator=rng)
    ids = torch.arange(16 * num_experts) % num_experts
    inputs = prototypes[ids] + noise * torch.randn(len(ids), 64, generator=rng)
    routing = routing_from(100.0 * F.one_hot(ids, num_experts).float(), 1)
    ours = routing.replace(prototypes=prototypes.clone().requires_grad_(), inputs=inputs)
    value = ContrastiveBalance().value(ours)
    exact = prototypes.double().requires_grad_()
    means = torch.stack([inputs.double()[ids == e].mean(0) for e in range(num_experts)])
    similarity = F.normalize(exact, dim=1) @ F.normalize(means, dim=1).T / 0.07
    loss = -similarity.log_softmax(1).diagonal().mean()
    assert 1e-9 < loss < 1e-2, "the case is near 0"
    torch.testing.assert_close(value.double(), loss, rtol=3e-6, atol=0)
    (grad,) = torch.autograd.grad(value, ours.prototypes)
    (wanted,) = torch.autograd.grad(loss, exact)
    assert (grad - wanted).norm() < 5e-6 * wanted.norm()
