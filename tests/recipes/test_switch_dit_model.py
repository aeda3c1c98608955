"""Switch-DiT as a whole model: a dense DiT at first, gates by noise level alone."""

from __future__ import annotations

import torch
from torch import nn

from coterie.core.context import NULL_LABEL
from coterie.core.prediction import Condition
from coterie.core.rng import generator
from small_models import images, small, times, woken


def switch(experts: bool = True) -> nn.Module:
    """Everything awake; ``experts`` False puts the experts back to zero, where they start."""
    model = woken(small("switch-dit"))
    if not experts:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".pool." in key:
                    parameter.zero_()
    return model


def gates(model: nn.Module) -> list[nn.Parameter]:
    return [p for key, p in model.named_parameters() if ".routers." in key]


def denoising(model: nn.Module, name: str = "switch-dit"):
    batch = images(8, labels=[i % 10 for i in range(8)])
    return small(name).objective.build(model)(model, batch, generator(0, "t"), 0.5)


def test_with_experts_at_zero_it_is_bitwise_the_dense_model_of_its_weights() -> None:
    ours, dense = switch(experts=False), woken(small("dense-ddpm"), seed=1)
    shared = {key: ours.state_dict()[key] for key in dense.state_dict()}
    dense.load_state_dict(shared)
    extra = ours.state_dict().keys() - shared.keys()
    assert extra and all(".pre_block." in key for key in extra)
    batch, t = images(6), times(6)
    assert torch.equal(ours(batch.x, t, batch.cond).value, dense(batch.x, t, batch.cond).value)
    moved = switch()
    moved.load_state_dict(shared, strict=False)
    gap = moved(batch.x, t, batch.cond).value - dense(batch.x, t, batch.cond).value
    assert gap.abs().max() > 1e-3


def test_denoising_moves_no_gate_until_an_expert_has_moved() -> None:
    for experts in (False, True):
        model = switch(experts)
        denoising(model).main["denoising"].backward()
        moved = [p.grad is not None and bool(p.grad.any()) for p in gates(model)]
        assert len(moved) == 4 and all(moved) is experts and any(moved) is experts


def test_one_awake_expert_is_enough() -> None:
    model = switch(experts=False)
    first = model.backbone.trunk.blocks[0].pre_block
    with torch.no_grad():
        first.pool.weight[0].normal_(generator=torch.Generator().manual_seed(0))
    denoising(model).main["denoising"].backward()
    touched = [bool(p.grad.any()) for p in first.routers.parameters()]
    assert all(touched)
    second = model.backbone.trunk.blocks[1].pre_block
    assert not any(p.grad.any() for p in second.routers.parameters())


def test_the_prior_reaches_every_gate_and_the_time_embedding_and_nothing_else() -> None:
    model = switch(experts=False)
    (aux,) = denoising(model).aux
    assert (aux.key, aux.weight) == ("diffusion_prior", 1.0)
    assert 0 < aux.value.item() < 0.6932
    aux.value.backward()
    touched = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(p.grad is not None and p.grad.any() for p in gates(model))
    time = {f"backbone.time.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert time <= touched
    assert all(key in time or ".routers." in key for key in touched)


def test_equal_noise_means_equal_experts_whatever_the_label_and_the_picture() -> None:
    model = switch()
    x = images(6).x
    t = torch.tensor([0.2, 0.2, 0.2, 0.9, 0.9, 0.9])
    label = torch.tensor([0, 7, NULL_LABEL, 1, 2, 3])
    for routing in model(x, t, Condition(label=label)).routings:
        assert routing.unit == "sample" and routing.ids.shape == (6, 2)
        for same in (slice(0, 3), slice(3, 6)):
            assert (routing.ids[same] == routing.ids[same][:1]).all()
            torch.testing.assert_close(
                routing.gates[same], routing.gates[same][:1].expand(3, 2), rtol=1e-5, atol=1e-6
            )
        assert (routing.gates[0] - routing.gates[3]).abs().max() > 1e-5


def test_the_table_holds_the_gates_of_every_step_of_the_original_grid() -> None:
    model = switch()
    index = torch.tensor([0, 17, 500, 999])
    t = model.process.time_of_index(index)
    routings = model(images(4).x, t, Condition(label=torch.zeros(4, dtype=torch.long))).routings
    assert [routing.layer for routing in routings] == [0, 1]
    for routing in routings:
        assert routing.table.shape == (1000, 3)
        torch.testing.assert_close(routing.table[index], routing.probs, rtol=1e-4, atol=1e-6)
        assert torch.equal(routing.step_index, index)


def test_raw_gates_do_not_sum_to_one() -> None:
    model = switch()
    for routing in model(images(4).x, times(4), images(4).cond).routings:
        total = routing.gates.sum(1)
        assert ((total < 1) & (total > 2 / 3)).all()
        torch.testing.assert_close(routing.gates, routing.probs.gather(1, routing.ids))


def test_without_the_prior_there_is_no_auxiliary_loss() -> None:
    name = "switch-dit:no-prior"
    assert denoising(woken(small(name)), name).aux == ()
