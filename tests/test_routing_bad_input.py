"""What routing does with padding, with nothing, with one token, and with what is not finite.

Each test runs over combinations that hold every level of every factor, or over all of a registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from combination_parts import Combination, factors
from combination_runs import Recorder, TinySource, build
from combinations import each_level, simplest, told
from coterie.backbones import Trunk
from coterie.core.errors import TrainingError
from coterie.core.rng import generator
from coterie.core.routing import Aux, Routing
from coterie.experts import SCORES, SELECTS, Router
from coterie.train import TrainConfig, Trainer


def step(model: Any, *given: Any) -> tuple[tuple[Routing, ...], tuple[Aux, ...]]:
    """One forward and backward pass in training and what follows an optimiser's step; all that
    comes out of it is finite."""
    model.train()
    rng = generator(0)
    prediction = model(*given, sample_ids=torch.arange(len(given[0])), rng=rng, progress=0.5)
    aux = model.aux_losses(prediction.routings, rng)
    weights = torch.randn(prediction.value.shape, generator=generator(1))
    total = (prediction.value * weights).sum() + sum(term.weight * term.value for term in aux)
    total.backward()
    model.after_step([routing.detach() for routing in prediction.routings])
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    named |= dict(model.named_buffers()) | {term.key: term.value for term in aux}
    named |= {f"gates {place}": r.gates for place, r in enumerate(prediction.routings)}
    named["answer"] = prediction.value
    assert [name for name, value in named.items() if not value.isfinite().all()] == []
    return prediction.routings, aux


def rows_with_a_trunk() -> Iterator[tuple[Combination, Any]]:
    """Without networks of other libraries, which know no padding and no empty batch."""
    for row in each_level():
        model = build(row)
        if hasattr(model.backbone, "trunk"):
            yield row, model


def pad(trunk: Trunk, samples: slice) -> None:
    """Let the trunk see no token of some samples."""

    def forward(z: Tensor, ctx: Any) -> Any:
        mask = torch.ones(z.shape[:2], dtype=torch.bool)
        mask[samples] = False
        if ctx.token_mask is not None:
            mask &= ctx.token_mask
        return Trunk.forward(trunk, z, ctx.replace(token_mask=mask))

    trunk.__dict__["forward"] = forward


@pytest.mark.parametrize("samples", [slice(1, 2), slice(None)], ids=["one sample", "all"])
def test_samples_of_padding_are_routed_nowhere_and_cost_nothing(samples: slice) -> None:
    for row, model in rows_with_a_trunk():
        pad(model.backbone.trunk, samples)
        routings, aux = step(model, *TinySource(model.config.backbone).call(model))
        for routing in routings:
            assert routing.one_hot().unflatten(0, (4, -1))[samples].sum() == 0, told(row)
            assert not routing.rows_mask().unflatten(0, (4, -1))[samples].any(), told(row)
        if samples == slice(None):
            assert all(term.value == 0 for term in aux), told(row)


def test_an_empty_batch_is_answered_by_an_empty_batch() -> None:
    for row, model in rows_with_a_trunk():
        routings, aux = step(model, *TinySource(model.config.backbone).call(model, samples=0))
        assert all(routing.counts().sum() == 0 for routing in routings), told(row)
        assert all(term.value == 0 for term in aux), told(row)
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in parameters), told(row)


def test_a_text_of_one_token() -> None:
    for _, model in rows_with_a_trunk():
        source = TinySource(model.config.backbone)
        if source.words:
            x, t, cond = source.call(model)
            routings, _ = step(model, x[:, :1], t, cond)
            assert all(routing.batch == (4, 1) for routing in routings)


QUICK = TrainConfig(
    steps=2, batch=4, ema=(), threads=1, device="cpu", nonfinite_limit=1, checkpoint_every=9
)


def why_stopped(model: Any) -> str:
    """What the guard of training says; all it may have changed is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(QUICK, model, Recorder(model), TinySource(model.config.backbone))
    with pytest.raises(TrainingError) as error:
        trainer.fit(False)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    return str(error.value)


def plain(factor: str, kind: str) -> Combination:
    """The simplest combination with this kind of part."""
    place = [f.name for f in factors()].index(factor)
    row = simplest(place, factors()[place].kinds.index(kind))
    assert row is not None
    return row


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", SELECTS.kinds())
def test_what_a_router_reads_is_named_where_it_is_not_finite(kind: str, poison: float) -> None:
    """Whatever the selection: none fails over NaN before the guard can say where it began."""
    model = build(plain("router.select", kind))
    block = model.backbone.trunk.blocks[0]
    nn.init.constant_(block.attention.out.bias, poison)
    assert "first in backbone.trunk.blocks.0.attention.out;" in why_stopped(model)


@pytest.mark.parametrize("kind", SCORES.kinds())
def test_a_router_that_is_not_finite_is_named(kind: str) -> None:
    model = build(plain("router.score", kind))
    routers = {n: m for n, m in model.named_modules() if isinstance(m, Router)}
    name, router = next(iter(routers.items()))
    parameters = list(router.parameters())
    if not parameters:
        assert not SCORES.get(kind).learned
        return
    nn.init.constant_(parameters[0], float("nan"))
    assert f"first in {name}." in why_stopped(model)
