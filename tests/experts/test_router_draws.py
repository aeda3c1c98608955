"""What a router draws is a function of the pass, the slot, the layer and the round.

So gradient checkpointing, which runs a layer again during the backward pass, draws the same; over
the registries, not for the parts that are there today.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from combination_parts import samples
from coterie.backbones import DiTConfig
from coterie.core.context import Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.core.rng import PassSeed
from coterie.core.routing import Routing
from coterie.denoiser import DenoiserConfig
from coterie.experts import EDITS, SCORES, SELECTS, ExpertLayer, ExpertLayerConfig, RouterConfig
from coterie.train.optimizer import freeze

WIDTH, EXPERTS, BATCH, TOKENS = 8, 4, 3, 5
REGISTRIES = {"score": SCORES, "edits": EDITS, "select": SELECTS}


def configured(field: str, sample: dict[str, Any]) -> RouterConfig | None:
    """A router with that part; None where the part needs another configuration around it."""
    value: Any = [sample] if field == "edits" else sample
    try:
        config = RouterConfig.from_dict({field: value})
        config.check(EXPERTS, WIDTH)
    except ConfigError:
        return None
    return config


@cache
def routers() -> dict[str, RouterConfig]:
    """Every registered part, in every sample of it that fits a plain router."""
    made = {}
    for field, registry in REGISTRIES.items():
        for kind in registry.kinds():
            for number, sample in enumerate(samples(registry, kind)):
                config = configured(field, sample)
                if config is not None:
                    made[f"{field}={kind} {number}"] = config
    return made


DRAWING = [name for name, config in routers().items() if config.draws]


def passing(seed: int = 0, **changes: Any) -> Context:
    rng = torch.Generator().manual_seed(seed)
    grid = torch.tensor([3, 500, 900])
    ctx = Context(
        BATCH,
        TOKENS,
        training=True,
        rng=rng,
        seed=PassSeed(rng),
        pool_layers=(0, 1),
        progress=0.6,
        step_index=grid,
    )
    time = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(9))
    task = torch.tensor([0, 1, 1])
    told = {"task": task, "label": task, "sample_ids": task, "modality": task}
    return ctx.replace(time_embedding=time, **told, **changes)


def rows(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def layer(config: RouterConfig, **fields: Any) -> ExpertLayer:
    torch.manual_seed(5)
    experts = {"kind": "swiglu", "hidden": 6}
    made = ExpertLayerConfig.from_dict({"num_experts": EXPERTS, "experts": experts, **fields})
    return made.replace(router=config).build(WIDTH)


def same(a: Routing, b: Routing) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.logits, b.logits)


def test_C3_every_registered_part_is_tried() -> None:
    tried = {name.split()[0] for name in routers()}
    every = {
        f"{field}={kind}" for field, registry in REGISTRIES.items() for kind in registry.kinds()
    }
    assert every - tried <= {"score=given"}, "its rows are the logits"
    assert {"edits=jitter", "edits=progressive", "select=random", "score=uncertain"} <= {
        name.split()[0] for name in DRAWING
    }


@pytest.mark.parametrize("name", routers())
def test_C3_a_router_that_runs_again_answers_the_same(name: str) -> None:
    made = routers()[name].build(WIDTH, EXPERTS).train()
    ctx = passing()
    first = made(rows(), ctx)
    before = ctx.rng.get_state()
    assert same(made(rows(), ctx), first)
    assert torch.equal(ctx.rng.get_state(), before), "the caller's stream is not the router's"


@pytest.mark.parametrize("name", DRAWING)
def test_C3_passes_layers_and_rounds_draw_apart(name: str) -> None:
    made = routers()[name].build(WIDTH, EXPERTS).train()

    def drawn(**place: Any) -> list[Routing]:
        """Sixteen passes: few candidates have few outcomes."""
        seeds = torch.Generator().manual_seed(0)
        contexts = [passing().replace(rng=seeds, seed=PassSeed(seeds), **place) for _ in range(16)]
        return [made(rows(), ctx) for ctx in contexts]

    first = drawn()
    assert not all(same(routing, first[0]) for routing in first)
    assert all(map(same, drawn(), first)), "the same stream of passes, the same draws"
    pooled = any(getattr(edit, "drawn", "layer") == "pool" for edit in routers()[name].edits)
    for place in ({"layer": 1}, {"round": 1}, {"slot": "pre_block"}):
        if not pooled:
            assert not all(map(same, drawn(**place), first)), place


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", DRAWING)
def test_C3_checkpointing_around_a_layer_gives_the_same_gradients(
    name: str, reentrant: bool
) -> None:
    made = layer(routers()[name], rounds=2, round_routing="shared").train()
    weights = torch.randn(BATCH, TOKENS, WIDTH)

    def gradients(run: Any) -> list[Tensor]:
        made.zero_grad()
        h, ctx = rows().requires_grad_(), passing()
        (run(h, ctx) * weights).sum().backward()
        return [h.grad, *(p.grad for p in made.parameters() if p.grad is not None)]

    plain = gradients(lambda h, ctx: made(h, ctx).y)
    again = gradients(
        lambda h, ctx: checkpoint(lambda x: made(x, ctx).y, h, use_reentrant=reentrant)
    )
    assert len(plain) == len(again)
    for one, other in zip(plain, again):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


def test_C3_a_moving_deviation_counts_each_pass_once_and_moves_after_the_step() -> None:
    config = RouterConfig.from_dict({"score": "uncertain"})
    plain, again = layer(config).train(), layer(config).train()
    for made, run in ((plain, False), (again, True)):
        h, ctx = rows().requires_grad_(), passing()
        y = checkpoint(lambda x: made(x, ctx).y, h, use_reentrant=False) if run else made(h, ctx).y  # noqa: B023
        y.sum().backward()
        assert (made.router(0).score.deviation == 1).all()
        made.router(0).after_step()
    ours, theirs = again.router(0).score.deviation, plain.router(0).score.deviation
    assert torch.equal(ours, theirs) and (ours != 1).all()


def denoiser(**router: Any) -> Any:
    expert = {
        "num_experts": EXPERTS,
        "experts": {"kind": "swiglu", "hidden": 6},
        "router": {"edits": [{"kind": "jitter", "scale": 1.0}], **router},
        "balance": [{"kind": "switch", "weight": 1.0}],
    }
    slots = [{"slot": slot, "expert": expert} for slot in ("ffn", "pre_block")]
    trunk = {"width": WIDTH, "depth": 3, "heads": 2, "slots": slots}
    backbone = DiTConfig.from_dict({"image_size": 4, "patch": 2, "num_classes": 3, "trunk": trunk})
    torch.manual_seed(2)
    made = DenoiserConfig(backbone=backbone).build()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def ask(model: Any, rng: torch.Generator) -> Any:
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    return model(x, torch.tensor([0.2, 0.7]), Condition(label=torch.tensor([1, 2])), rng=rng)


def test_C3_checkpointed_blocks_of_a_trunk_with_memory_and_balance_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recurrent routers hand their state from block to block, also to one that is run again."""
    model = denoiser(score={"kind": "recurrent", "state": 5}).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        prediction = ask(model, torch.Generator().manual_seed(7))
        aux = sum(one.weight * one.value for one in model.aux_losses(prediction.routings))
        (prediction.value.square().sum() + aux).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for block in model.backbone.trunk.blocks:
        run = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *given, run=run: checkpoint(run, *given, use_reentrant=False)
        )
    again = gradients()
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_C3_balance_losses_without_a_graph_are_refused_in_training() -> None:
    model = denoiser().train()
    with torch.no_grad():  # so does reentrant checkpointing
        routings = ask(model, torch.Generator().manual_seed(7)).routings
        assert model.aux_losses(routings)
    with pytest.raises(DataError, match=r"slot ffn: 'no graph' .*use_reentrant=False"):
        model.aux_losses(routings)
    assert model.eval().aux_losses(routings)
    freeze(model.train(), ["*.routers.*"])
    assert model.aux_losses(routings), "routers that do not learn need no gradient"


def test_C3_a_whole_model_that_is_run_again_cannot_draw_and_says_so() -> None:
    model, rng = denoiser().train(), torch.Generator().manual_seed(7)
    y = checkpoint(lambda: ask(model, rng).value, use_reentrant=False)
    with pytest.raises(DataError, match=r"rng: a pass that is run again .*parts of the network"):
        y.sum().backward()
    quiet = denoiser(edits=[]).train()
    checkpoint(lambda: ask(quiet, rng).value, use_reentrant=False).sum().backward()


def test_C3_each_pass_of_one_generator_draws_anew() -> None:
    model, rng = denoiser().train(), torch.Generator().manual_seed(7)
    first, second = ask(model, rng), ask(model, rng)
    assert not same(first.routings[0], second.routings[0])
    again = ask(model, torch.Generator().manual_seed(7))
    assert all(map(same, first.routings, again.routings))
