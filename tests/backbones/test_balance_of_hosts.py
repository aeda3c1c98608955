"""Balance losses and updates of a host: whose routings they read, and what stands still."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie.backbones import DiTConfig
from coterie.core.batch import Batch, Losses
from coterie.core.context import Context
from coterie.core.errors import DataError
from coterie.core.prediction import Condition
from coterie.core.routing import Routing
from coterie.denoiser import DenoiserConfig
from coterie.experts import BALANCES, ExpertLayerConfig
from coterie.train import TrainConfig, Trainer
from coterie.train.objectives import OBJECTIVES

NEEDS: dict[str, dict[str, Any]] = {
    "contrastive": {"score": "cosine", "probability": "identity"},
    "diffusion_prior": {"score": {"kind": "noise_level", "table": True}},
    "selection_bias": {"selection_bias": True},
}
"""What a balance loss needs of a router, beyond the defaults."""
KINDS = [kind for kind in BALANCES.kinds() if kind != "none"]


def expert(kind: str, **router: Any) -> dict[str, Any]:
    return {
        "num_experts": 4,
        "experts": {"kind": "swiglu", "hidden": 6},
        "router": {**NEEDS.get(kind, {}), **router},
        "balance": [kind],
    }


def denoiser(kind: str, seed: int = 0, depth: int = 2, **router: Any) -> Any:
    slots = [{"expert": expert(kind, **router)}]
    trunk = {"width": 8, "depth": depth, "heads": 2, "slots": slots}
    backbone = DiTConfig.from_dict({"image_size": 4, "patch": 2, "num_classes": 3, "trunk": trunk})
    torch.manual_seed(seed)
    return DenoiserConfig(backbone=backbone).build().train()


def routings_of(model: Any) -> tuple[Routing, ...]:
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    cond = Condition(label=torch.tensor([0, 1, 2, 0]))
    made: tuple[Routing, ...] = model(x, torch.linspace(0.1, 0.9, 4), cond).routings
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_C5_every_balance_loss_refuses_foreign_records(kind: str) -> None:
    model, other = denoiser(kind), copy.deepcopy(denoiser(kind))
    own, foreign = routings_of(model), routings_of(other)
    model.aux_losses(own), model.after_step([r.detach() for r in own])
    for use in (model.aux_losses, model.after_step):
        with pytest.raises(DataError, match=r"slot ffn, layer 0: 'foreign' .*own layers"):
            use(foreign)
        with pytest.raises(DataError, match="foreign"):
            use([own[0], foreign[1].detach()])
        with pytest.raises(DataError, match="slot elsewhere, layer 0: 'foreign'"):
            use([own[0].replace(slot="elsewhere", owner=None)])
    unsaid = [routing.replace(owner=None) for routing in own]  # read from a file, made by hand
    assert len(model.aux_losses(unsaid)) == len(model.aux_losses(own))


@pytest.mark.parametrize("kind", KINDS)
def test_C5_padding_counts_nothing_in_any_balance_loss(kind: str) -> None:
    """The same as without the padded tokens or samples, whatever these hold."""
    torch.manual_seed(3)
    config = ExpertLayerConfig.from_dict(expert(kind))
    layer = config.build(8, 8).train()
    sampled = config.router.routed_unit == "sample"
    h = torch.randn(4, 5, 8)
    kept_BN = torch.ones(4, 5, dtype=torch.bool)
    kept_BN[1] = False  # a whole sample of padding
    if not sampled:
        kept_BN[:, 3:] = False
    steps = torch.tensor([100, 400, 600, 900])

    def context(rows: Tensor, mask: Tensor | None) -> Context:
        time = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))[rows]
        return Context(
            batch=len(rows),
            tokens=5 if sampled or mask is not None else 3,
            time_embedding=time,
            time_table=lambda: torch.randn(1000, 8, generator=torch.Generator().manual_seed(4)),
            step_index=steps[rows],
            token_mask=mask,
            training=True,
        )

    real = torch.tensor([0, 2, 3])
    alone = layer(h[real] if sampled else h[real, :3], context(real, None)).routings
    for filling in (0.0, 1e4, float("nan")):
        filled = h.masked_fill(~kept_BN[:, :, None], filling)
        padded = layer(filled, context(torch.arange(4), kept_BN)).routings
        (balance,) = (part.build() for part in config.balance)
        for with_padding, without in zip(
            balance.losses(padded), balance.losses(alone), strict=True
        ):
            torch.testing.assert_close(with_padding.value, without.value)
        moved = []
        for routings in (padded, alone):
            router = copy.deepcopy(layer.router(0))
            balance.after_step([router], routings)
            moved.append(router.state_dict())
        assert all(torch.equal(moved[0][name], value) for name, value in moved[1].items())


class Points:
    name, modality, class_names, licence, num_classes = "tiny", "image", (), "none", 3

    def __len__(self) -> int:
        return 8

    def get(self, indices: Any) -> Batch:
        ids = torch.as_tensor(indices)
        x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        return Batch(x[ids], Condition(label=ids % 3), ids)


class Kept:
    """The objective; what routers drew comes with it."""

    def __init__(self, model: Any) -> None:
        self.objective = OBJECTIVES.parse("denoising").build(model)

    def __call__(self, model: Any, batch: Batch, rng: Any, progress: float) -> Losses:
        made: Losses = self.objective(model, batch, rng, progress)
        return made


MOVING: dict[str, tuple[dict[str, Any], str]] = {
    "selection bias": ({"selection_bias": True}, "selection_bias"),
    "opening candidates": (
        {"selection_bias": True, "edits": [{"kind": "opening", "steps": 10}]},
        "edits.0.share",
    ),
    "uncertain score": ({"selection_bias": True, "score": "uncertain"}, "score.deviation"),
}


def test_B4_a_frozen_trunk_takes_its_routers_along() -> None:
    """Also those without a parameter, in a host that is itself in eval mode."""
    router = {"selection_bias": True, "score": {"kind": "fixed", "by": "position"}}
    model = denoiser("selection_bias", **router)
    settings = {"threads": 1, "device": "cpu", "freeze": ("backbone.trunk",)}
    Trainer(TrainConfig(steps=2, batch=4, ema=(), **settings), model, Kept(model), Points()).fit(
        False
    )
    for layer in model.backbone.trunk.expert_layers():
        assert layer.router(0).selection_bias.abs().max() == 0


@pytest.mark.parametrize("name", MOVING)
def test_B4_a_frozen_router_does_not_move(name: str) -> None:
    router, tensor = MOVING[name]
    model = denoiser("selection_bias", **router)
    layers = model.backbone.trunk.expert_layers()
    for layer in layers:
        for edit in layer.router(0).edits:
            edit.share.fill_(0.5)
    before = [copy.deepcopy(layer.router(0).state_dict()) for layer in layers]
    frozen = "*.blocks.0.ffn.routers.*"
    config = TrainConfig(
        steps=3, batch=4, lr=0.05, ema=(), threads=1, device="cpu", freeze=(frozen,)
    )
    Trainer(config, model, Kept(model), Points()).fit(False)
    after = [layer.router(0).state_dict() for layer in layers]
    assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
    assert not torch.equal(after[1][tensor], before[1][tensor]), "the other one goes on moving"
    assert not torch.equal(after[1]["selection_bias"], before[1]["selection_bias"])


def test_B4_a_frozen_edit_of_a_router_that_trains_does_not_move() -> None:
    edits = [{"kind": "opening", "steps": 10}]
    model = denoiser("selection_bias", selection_bias=True, edits=edits)
    router = model.backbone.trunk.expert_layer("ffn", 0).router(0)
    router.edits[0].share.fill_(0.5)
    router.edits[0].eval()
    model.after_step([routing.detach() for routing in routings_of(model)])
    assert (router.edits[0].share == 0.5).all() and router.selection_bias.abs().max() > 0
