"""Every recipe as a whole model: gradients everywhere, losses where they belong."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import nn

from coterie.core.batch import Losses
from coterie.core.config import override
from coterie.core.context import NULL_LABEL
from coterie.core.rng import generator
from coterie.experts import ExpertLayer
from coterie.runs.build import build_model
from small_models import IMAGES, TEXTS, images, small, woken, words


def losses_of(name: str, model: nn.Module, batch: int = 16, dropout: float = 0.25) -> Losses:
    config = small(name)
    objective = config.objective
    if config.model.kind == "denoiser":
        objective = objective.replace(label_dropout=dropout)
        data = images(batch, labels=[i % 10 for i in range(batch)])
    else:
        data = words(batch)
    return objective.build(model)(model, data, generator(0, "test"), 0.5)


@pytest.mark.parametrize("name", (*IMAGES, *TEXTS, "text:dense"))
def test_every_parameter_gets_a_gradient_once_awake(name: str) -> None:
    model = woken(small(name)).train()
    losses_of(name, model, batch=32).total.backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The row of digits that were not drawn, and of bytes that did not occur, may stay at zero;
    # whole tensors, every router's among them, may not.
    assert idle == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", IMAGES)
def test_every_expert_in_use_learns(name: str) -> None:
    model = woken(small(name)).train()
    losses = losses_of(name, model, batch=32)
    losses.total.backward()
    layers = [m for m in model.modules() if isinstance(m, ExpertLayer) and m.pool.names]
    routings = iter(losses.routings)
    used = {layer.pool: torch.zeros(layer.pool.num_experts + 1) for layer in layers}
    for layer in layers:  # several layers and rounds may use one pool
        for routing in islice(routings, layer.config.rounds):
            used[layer.pool][routing.ids.flatten()] = 1.0
    for pool, chosen in used.items():
        for stack in pool.parameters():
            learns = stack.grad.flatten(1).any(1)
            assert torch.equal(learns, chosen[:-1] > 0)


def test_balance_losses_of_dit_moe_enter_once_per_layer_with_their_weight() -> None:
    model = woken(small("dit-moe")).train()
    losses = losses_of("dit-moe", model)
    assert [(aux.key, aux.weight) for aux in losses.aux] == [
        ("switch/layer0", 0.01),
        ("switch/layer1", 0.01),
    ]
    assert all(1.0 <= aux.value.item() < 8.0 for aux in losses.aux)
    whole = losses.main["denoising"] + 0.01 * sum(aux.value for aux in losses.aux)
    torch.testing.assert_close(losses.total, whole)
    for routing, aux in zip(losses.routings, losses.aux, strict=True):
        f = routing.counts() / routing.counts().sum()
        by_hand = routing.num_experts * (f * routing.probs.mean(0)).sum()
        torch.testing.assert_close(aux.value, by_hand)


def test_arms_without_a_balance_loss_have_none() -> None:
    for name in ("dit-moe:no-balance", "dit", "promoe:no-contrastive", "dtr"):
        model = woken(small(name)).train()
        assert losses_of(name, model).aux == (), name


def test_balance_losses_exist_at_the_start_and_move_the_routers() -> None:
    """Output 0 gives the routers no gradient through the gates; the balance loss does."""
    for name in ("dit-moe", "promoe"):
        model = build_model(small(name)).train()
        losses_of(name, model, dropout=0.0).total.backward()
        routers = [p for key, p in model.named_parameters() if ".routers." in key]
        assert routers and all(p.grad is not None and p.grad.any() for p in routers), name


# DTR


def test_dtr_with_everything_shared_is_bitwise_the_dense_model() -> None:
    config = small("dtr")
    whole = override(config, {"model.backbone.trunk.slots.0.expert.experts.share": 1.0})
    masked, dense = woken(whole), woken(small("dense-ddpm"))
    batch, t = images(6), torch.linspace(0, 1, 6)
    expected = dense(batch.x, t, batch.cond).value
    assert torch.equal(masked(batch.x, t, batch.cond).value, expected)
    assert (woken(config)(batch.x, t, batch.cond).value - expected).abs().max() > 1e-3


def test_dtr_adds_no_parameter_and_loads_dense_weights() -> None:
    masked, dense = woken(small("dtr")), woken(small("dense-ddpm"), seed=1)
    assert masked.state_dict().keys() == dense.state_dict().keys()
    masked.load_state_dict(dense.state_dict())


def dtr_mask(t: float) -> torch.Tensor:
    """bool [D]: channels that the first block of the model reads at time t, found by probing."""
    model = woken(small("dtr"))
    read: list[torch.Tensor] = []
    block = model.backbone.trunk.blocks[0]
    block.norm1.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    batch = images(1)
    model(batch.x, torch.tensor([t]), batch.cond)
    return (read[0] != 0).all(dim=(0, 1))


def test_dtr_windows_slide_upwards_with_noise() -> None:
    """64 channels, 51 open: start round((i / 999)^4 * 13) of the ORIGINAL step i."""
    for index, start in ((0, 0), (500, 1), (750, 4), (999, 13)):
        kept = dtr_mask(index / 999).nonzero().flatten()
        assert kept.tolist() == list(range(start, start + 51)), index


# DeepSeekMoE, DiT-MoE: what the trunk hands to the losses


@pytest.mark.parametrize("name", TEXTS)
def test_text_routings_cover_every_token_of_every_layer(name: str) -> None:
    model = woken(small(name)).train()
    losses = losses_of(name, model, batch=4)
    assert [routing.layer for routing in losses.routings] == [0, 1, 2]
    for routing in losses.routings:
        assert routing.batch == (4, 23)
        assert routing.counts().sum() == 4 * 23 * routing.top_k
    assert [aux.layer for aux in losses.aux] == [0, 1, 2]


def test_all_samples_may_be_unconditional_in_every_model() -> None:
    for name in IMAGES:
        model = woken(small(name)).train()
        losses = losses_of(name, model, dropout=1.0)
        losses.total.backward()
        assert losses.total.isfinite(), name
        for routing in losses.routings:
            assert (routing.label == NULL_LABEL).all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
