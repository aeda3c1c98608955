"""RMoE as a whole model: whose state a router reads, what learns through it, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.core.batch import Losses
from coterie.core.context import Context
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError
from coterie.core.prediction import Condition, Prediction
from coterie.core.rng import generator
from coterie.experts import ExpertLayer, Router
from coterie.recipes import get_recipe
from coterie.recipes.rmoe import paper, slot, text, tiny
from coterie.runs.build import build_model
from coterie.runs.config import RunConfig
from small_models import images, small, times, with_slots, woken, words

STATE = 5


def run_of(preset: str = "rmoe/text", **options: Any) -> RunConfig:
    return with_slots(small(preset), slot(4, 2, 8, **{"size": STATE, **options}))


def routers_of(model: nn.Module) -> list[Router]:
    return [layer.router(0) for layer in model.modules() if isinstance(layer, ExpertLayer)]


def predict(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Prediction:
    found: Prediction = model(ids, torch.zeros(len(ids)), Condition(tokens_mask=mask))
    return found


def losses_of(model: nn.Module) -> Losses:
    objective = small("rmoe/text").objective.build(model)
    return objective(model, words(8), generator(0, "train"), 0.5)


def test_one_layer_serves_text_and_images() -> None:
    assert with_slots(tiny(), *text().model.backbone.trunk.slots) == tiny()
    assert with_slots(text(), *tiny().model.backbone.trunk.slots) == text()
    assert text().model.backbone.kind != tiny().model.backbone.kind


@pytest.mark.parametrize("preset", ["rmoe", "rmoe/text"])
def test_the_model_equals_torchs_cell_from_layer_to_layer(preset: str) -> None:
    model = woken(run_of(preset), std=0.3)
    batch = images(2) if preset == "rmoe" else words(2)
    with torch.no_grad():
        routings = model(batch.x, times(2), batch.cond).routings
        cells = {id(router.score.memory.cell) for router in routers_of(model)}
        state = torch.zeros(len(routings[0].ids), STATE)
        for routing, router in zip(routings, routers_of(model), strict=True):
            cell = nn.GRUCell(STATE, STATE)
            cell.load_state_dict(router.score.memory.cell.state_dict())
            state = cell(routing.inputs @ router.score.inner.weight.T, state)
            logits = state @ router.score.proj.weight.T
            torch.testing.assert_close(routing.logits, logits, rtol=1e-5, atol=1e-6)
            gates = logits.softmax(1).topk(2).values
            torch.testing.assert_close(routing.gates, gates / gates.sum(1, keepdim=True))
    assert len(cells) == 1 and len(routings) > 1


@pytest.mark.parametrize("biases", [False, True])
def test_a_cell_without_weights_knows_no_token(biases: bool) -> None:
    model = woken(run_of(), std=0.3)
    for name, parameter in routers_of(model)[0].score.memory.named_parameters():
        if "weight" in name or not biases:
            parameter.data.zero_()
    for routing in predict(model, words(2).x).routings:
        torch.testing.assert_close(routing.logits, routing.logits[:1].expand_as(routing.logits))
        assert bool(routing.logits.any()) is biases


@pytest.mark.parametrize("detach", [False, True])
def test_late_choices_teach_early_routers_through_the_state(detach: bool) -> None:
    """With experts that answer nothing, the state is the only way back."""
    model = woken(run_of(detach=detach), std=0.3)
    for layer in model.backbone.trunk.expert_layers():
        layer.pool.down.data.zero_()
    routers = routers_of(model)
    predict(model, words(2).x).routings[-1].logits.square().sum().backward()
    for router in routers[:-1]:
        assert moved(router.score.inner.weight) is not detach
        assert not moved(router.score.proj.weight)
    assert moved(routers[-1].score.inner.weight) and moved(routers[0].score.memory.cell.weight_hh)


def moved(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def without_attention(model: nn.Module) -> nn.Module:
    for block in model.backbone.trunk.blocks:
        block.attention.out.weight.data.zero_()
    return model


def test_the_state_stays_with_its_token() -> None:
    model = without_attention(woken(run_of(), std=0.3))
    ids = words(2).x
    turned = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = predict(model, ids), predict(model, ids[:, turned])
        torch.testing.assert_close(after.value, before.value[:, turned])
        for old, new in zip(before.routings, after.routings, strict=True):
            rows = old.state.unflatten(0, (2, -1))[:, turned].flatten(0, 1)
            torch.testing.assert_close(new.state, rows)
        changed = ids.clone()
        changed[:, 7] = (changed[:, 7] + 91) % 256
        other = predict(model, changed)
    for old, new in zip(before.routings, other.routings, strict=True):
        # Experts with one row more or less may round a row's last bit otherwise.
        same = ((old.logits - new.logits).abs() < 1e-6).all(1).unflatten(0, (2, -1))
        assert not same[:, 7].any() and same[:, :7].all() and same[:, 8:].all()


def test_no_state_is_kept_from_call_to_call_or_token_to_token() -> None:
    model = woken(run_of(), std=0.3)
    ids = words(3).x
    with torch.no_grad():
        whole = predict(model, ids)
        assert torch.equal(predict(model, ids).value, whole.value)
        for length in (1, 9):  # one token after the other gives what all at once give
            part = predict(model, ids[:, :length])
            torch.testing.assert_close(part.value, whole.value[:, :length], rtol=1e-3, atol=1e-4)
            for short, long in zip(part.routings, whole.routings, strict=True):
                rows = long.logits.unflatten(0, (3, -1))[:, :length].flatten(0, 1)
                torch.testing.assert_close(short.logits, rows, rtol=1e-4, atol=1e-5)


def test_padding_moves_no_state_to_another_row() -> None:
    model = woken(run_of(), std=0.3)
    ids = words(2).x
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[0, 10:] = False
    with torch.no_grad():
        padded, alone = predict(model, ids, mask), predict(model, ids[:1, :10])
    for long, short in zip(padded.routings, alone.routings, strict=True):
        torch.testing.assert_close(long.logits[:10], short.logits, rtol=1e-4, atol=1e-5)
        assert long.counts().sum() == 2 * mask.sum()


def test_router_parameters_follow_their_formula() -> None:
    def found(config: RunConfig) -> tuple[int, int]:
        with torch.device("meta"):
            routers = routers_of(config.model.build())
        parameters = {p for router in routers for p in router.parameters()}
        return len(parameters), sum(p.numel() for p in parameters)

    for config, depth, d, p, num_experts in (
        (text(), 6, 64, 32, 8), (tiny(), 4, 64, 32, 8), (paper(), 24, 1024, 128, 16),
    ):  # fmt: skip
        tensors, size = found(config)
        assert tensors == 2 * depth + 4
        assert size == depth * (p * d + p * num_experts) + 6 * p**2 + 6 * p
    arms = get_recipe("rmoe").arms()
    sizes = {arm: count_parameters(build_model(config)).total for arm, config in arms.items()}
    assert sizes["text-mlp"] == pytest.approx(sizes["text-gru"], rel=1e-4)
    assert found(arms["text-mlp"])[1] == pytest.approx(found(arms["text-gru"])[1], rel=0.01)
    assert sizes["text-detached"] == sizes["text-gru"] > sizes["text-linear"]


def test_the_paper_preset_has_the_recalled_size() -> None:
    with torch.device("meta"):
        counted = count_parameters(paper().model.build())
    assert counted.total == pytest.approx(0.9e9, rel=0.03)


def test_balance_is_one_term_over_all_layers() -> None:
    """As published: all layers' logits concatenated; with uniform routers it would be k."""
    losses = losses_of(woken(run_of()).train())
    (aux,) = losses.aux
    probs = torch.cat([routing.logits for routing in losses.routings]).softmax(1)
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(2).indices, 1.0)
    torch.testing.assert_close(aux.value, 4 * (chosen.mean(0) * probs.mean(0)).sum())
    assert aux.weight == 1e-3 and aux.value.item() == pytest.approx(2.0, rel=0.2)


def test_routed_and_shared_experts_weigh_one_half_each() -> None:
    layer = slot(4, 2, 8, size=STATE, shared=8).expert.build(12)
    plain = slot(4, 2, 8, size=STATE).expert.build(12)
    plain.load_state_dict(layer.state_dict(), strict=False)
    h, ctx = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)), Context(2, 3)
    assert layer.shared.scale == 0.5
    torch.testing.assert_close(layer(h, ctx).y, 0.5 * plain(h, ctx).y + layer.shared(h))
    torch.testing.assert_close(layer.router(0)(h, ctx).gates.sum(1), torch.full((6,), 0.5))


@pytest.mark.parametrize(
    "options",
    [{"router": "rnn"}, {"head": "cosine"}, {"shared": 8}, {"router": "mlp"}, {"router": "linear"}],
    ids=str,
)
def test_variants_learn_in_every_tensor(options: dict[str, Any]) -> None:
    model = woken(run_of(**options)).train()
    losses_of(model).total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_denoiser_may_start_the_state_from_the_noise_level() -> None:
    model = woken(run_of("rmoe", start="time"), std=0.3)
    zeros = woken(run_of("rmoe"), std=0.3)
    batch = images(2)
    for each, differs in ((model, True), (zeros, False)):
        with torch.no_grad():
            routings = each(batch.x, times(2), batch.cond).routings
            again = each(batch.x, times(2), batch.cond).routings
        assert all(torch.equal(a.state, b.state) for a, b in zip(routings, again))
        score = routers_of(each)[0].score
        blank = nn.GRUCell(STATE, STATE)
        blank.load_state_dict(score.memory.cell.state_dict())
        with torch.no_grad():
            first = blank(routings[0].inputs @ score.inner.weight.T)
        assert torch.allclose(first, routings[0].state, atol=1e-6) is not differs
    with pytest.raises(ConfigError, match=r"score: 'recurrent' .*time_embedding"):
        run_of(start="time")
