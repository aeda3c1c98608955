"""Experts in models of diffusers: by name, unchanged at first, seen through our own records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coterie.backbones import SlotConfig
from coterie.backbones.scope import current
from coterie.core.context import NULL_LABEL, Context
from coterie.core.errors import ConfigError, DataError
from coterie.core.prediction import Condition
from coterie.interop.diffusers import attach

SMALL = {"sample_size": 8, "in_channels": 2, "out_channels": 2}
UNET = {**SMALL, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


def plain_unet() -> Any:
    from diffusers import UNet2DModel

    levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(**UNET, **levels, attention_head_dim=8, num_class_embeds=4)


def text_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=6,
    )


def transformer(num_classes: int = 5) -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=num_classes,
    )


def made(build: Callable[[], Any]) -> Any:
    """The model with every parameter moved, as if it were trained."""
    torch.manual_seed(0)
    model = build().eval()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TIME = torch.tensor([10, 500, 900])
GIVEN: dict[str, dict[str, Any]] = {
    "plain_unet": {"timestep": TIME, "class_labels": torch.tensor([0, 3, 2])},
    "text_unet": {"timestep": TIME, "encoder_hidden_states": rand(3, 5, 6)},
    "transformer": {"timestep": TIME, "class_labels": torch.tensor([4, 5, 0])},
}
MODELS = {"plain_unet": plain_unet, "text_unet": text_unet, "transformer": transformer}
SAMPLE = {"unit": "sample", "select": "dense"}


def conv(names: str, router: dict[str, Any] = SAMPLE, **fields: Any) -> SlotConfig:
    expert = {"num_experts": 3, "experts": "conv", "router": router}
    return SlotConfig.from_dict({"slot": "conv", "names": [names], "expert": expert, **fields})


def ffn(names: str, kind: str = "gelu_mlp", **router: Any) -> SlotConfig:
    experts = {"kind": kind, "hidden": 6} if kind != "affine" else {"kind": kind}
    expert = {"num_experts": 4, "experts": experts, "router": router}
    return SlotConfig.from_dict({"slot": "ffn", "names": [names], "expert": expert})


SLOTS: dict[str, list[SlotConfig]] = {
    "plain_unet": [conv("*.conv?"), conv("conv_in", {"score": "noise_level"})],
    "text_unet": [conv("*proj_in"), conv("*samplers.0.conv"), ffn("*.ff")],
    "transformer": [ffn("*.0.ff", "swiglu"), ffn("*.1.ff", "affine", score="noise_level")],
}


def call(name: str, model: Any) -> Tensor:
    return model(rand(3, 2, 8, 8), **GIVEN[name]).sample


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same_until_its_experts_are_trained(name: str) -> None:
    model = made(MODELS[name])
    expected, state = call(name, model), {k: v.clone() for k, v in model.state_dict().items()}
    host = attach(model, SLOTS[name])
    torch.testing.assert_close(call(name, model), expected, atol=1e-6, rtol=1e-5)
    with host.recording() as routings:
        changed = call(name, model)
    assert {r.slot for r in routings} == {slot.slot for slot in SLOTS[name]}
    assert [r.name for r in routings] and len({(r.slot, r.layer) for r in routings}) == len(
        routings
    )
    assert len(routings) == len(host.slots())
    changed.square().sum().backward()
    assert all(slot.experts.pool.kind.ends for slot in host.slots())
    for slot in host.slots():
        last = slot.experts.pool.stacks()[slot.experts.pool.kind.ends[0]]
        assert last.grad.abs().max() > 0, slot.name
        with torch.no_grad():
            last.add_(last.grad)
    model.zero_grad()
    moved = call(name, model)
    assert not torch.allclose(moved, expected, atol=1e-4)
    moved.square().sum().backward()
    learned = [p.grad for slot in host.slots() for p in slot.experts.routers.parameters()]
    assert all(grad.abs().max() > 0 for grad in learned)
    assert host.detach() is model and not list(host.slots())
    assert model.state_dict().keys() == state.keys() and not model._forward_hooks
    assert torch.equal(call(name, model), expected)


def test_what_a_slot_is_told_of_a_call_from_outside() -> None:
    model = made(transformer)
    host = attach(model, [ffn("*.ff")], null_label=5)
    with host.recording() as routings:
        call("transformer", model)
        first = len(routings)
        model(rand(3, 2, 8, 8), torch.full((3,), 7), torch.tensor([1, 1, 5]))
    assert first == 2 and len(routings) == 4
    told, later = routings[0], routings[2]
    assert (told.unit, told.batch, told.name) == ("token", (3, 16), "transformer.0.ff")
    assert told.step_index.tolist() == [10, 500, 900] and later.step_index.tolist() == [7, 7, 7]
    torch.testing.assert_close(told.noise, torch.tensor([0.01, 0.5, 0.9]))
    assert told.label.tolist() == [4, NULL_LABEL, 0] and later.label.tolist() == [1, 1, NULL_LABEL]
    call("transformer", model)
    assert len(routings) == 4, "the block is over"
    unet = made(plain_unet)
    with attach(unet, [conv("conv_in")]).recording() as routings:
        unet(rand(3, 2, 8, 8), 7, class_labels=torch.zeros(3, dtype=torch.int64))
    assert routings[0].step_index.tolist() == [7, 7, 7]


def test_the_time_embedding_is_the_models_own() -> None:
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

    model = made(transformer)
    (slot,) = attach(model, [ffn("*.0.ff", score="noise_level")]).slots()
    seen: list[Tensor] = []
    slot.experts.register_forward_pre_hook(lambda _, given: seen.append(given[1].time_embedding))
    call("transformer", model)
    embedder = model.transformer_blocks[0].norm1.emb
    assert isinstance(embedder, CombinedTimestepLabelEmbeddings)
    whole = embedder(TIME, torch.tensor([4, 5, 0]), torch.float32)
    rows = embedder.class_embedder.embedding_table(torch.tensor([4, 5, 0]))
    torch.testing.assert_close(seen[0], whole - rows)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = made(plain_unet)
    attach(model, [conv("*.conv1")])
    with pytest.raises(ValueError, match="class_labels"):
        model(rand(3, 2, 8, 8), TIME)
    assert current() is None
    with pytest.raises(DataError, match=r"timestep: \(2,\) .*\[3\]"):
        model(rand(3, 2, 8, 8), TIME[:2], torch.zeros(3, dtype=torch.int64))
    assert current() is None
    assert call("plain_unet", model).isfinite().all()


def test_gradient_checkpointing_is_refused_where_it_would_go_wrong() -> None:
    model = made(plain_unet).train()
    host = attach(model, [conv("mid_block.*.conv1")])
    model.enable_gradient_checkpointing()
    with host.recording():
        answer = call("plain_unet", model)
    with pytest.raises(DataError, match=r"slot mid\.1\.conv1: no context; .*checkpointing"):
        answer.sum().backward()


def test_a_pipeline_runs_with_experts_inside() -> None:
    from diffusers import DDPMScheduler, DiTPipeline
    from diffusers.models import AutoencoderKL

    model = made(lambda: transformer(num_classes=1000))
    parts = {"in_channels": 2, "out_channels": 2, "latent_channels": 2, "norm_num_groups": 4}
    coder = AutoencoderKL(**parts, block_out_channels=(4,)).eval()
    pipeline = DiTPipeline(transformer=model, vae=coder, scheduler=DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Any:
        torch.manual_seed(3)  # its scheduler draws from the global generator
        steps = {"num_inference_steps": 2, "guidance_scale": 2.0}
        return pipeline(class_labels=[1, 2], **steps, output_type="np").images

    expected = images()
    host = attach(model, [ffn("*.ff")], null_label=1000)
    with host.recording() as routings:
        found = images()
    assert abs(found - expected).max() < 1e-5
    assert [(r.layer, r.label.tolist()) for r in routings] == [
        (layer, [1, 2, NULL_LABEL, NULL_LABEL]) for _ in range(2) for layer in range(2)
    ]


def test_it_is_a_backbone_too() -> None:
    model = made(transformer)
    host = attach(model, [ffn("*.ff")], null_label=5)
    x, label = rand(3, 2, 8, 8), torch.tensor([4, NULL_LABEL, 0])
    ctx = Context(batch=3, tokens=0, time_input=TIME.float(), noise=TIME / 1000)
    answer = host(x, ctx, Condition(label=label))
    whole = torch.cat([answer.sample, answer.variance], dim=1)
    torch.testing.assert_close(whole, call("transformer", model))
    assert [r.label.tolist() for r in answer.routings] == [[4, NULL_LABEL, 0]] * 2
    with pytest.raises(DataError, match="null_label"):
        attach(made(transformer), [])(x, ctx, Condition(label=label))
    text = attach(made(text_unet), [])
    answer = text(x, ctx, Condition(tokens=GIVEN["text_unet"]["encoder_hidden_states"]))
    torch.testing.assert_close(answer.sample, call("text_unet", text.network))
    assert answer.variance is None


def test_copies_keep_their_own_hooks_and_experts() -> None:
    host = attach(made(plain_unet), [conv("*.conv1")])
    other = copy.deepcopy(host)
    with host.recording() as own, other.recording() as routings:
        call("plain_unet", other.network)
    assert len(routings) == len(other.slots()) and not own
    with torch.no_grad():
        for slot in other.slots():
            slot.experts.pool.weight.add_(1.0)
    expected = call("plain_unet", made(plain_unet))
    torch.testing.assert_close(call("plain_unet", host.network), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(call("plain_unet", other.network), expected, atol=1e-2)
    other.detach()
    assert not other.network._forward_hooks and host.network._forward_hooks


def test_half_precision_and_a_second_name_for_one_module() -> None:
    model = made(plain_unet)
    conv_of = model.down_blocks[0].downsamplers[0].conv
    model.alias = conv_of
    host = attach(model, [conv("alias")])
    (slot,) = host.slots()
    assert model.alias is slot is model.down_blocks[0].downsamplers[0].conv
    host.detach()
    assert model.alias is conv_of is model.down_blocks[0].downsamplers[0].conv
    half = made(plain_unet).to(torch.bfloat16)
    host = attach(half, [conv("conv_in"), conv("mid_block.*.conv1", reuse=2)])
    assert {p.dtype for p in host.parameters()} == {torch.bfloat16}
    given = {**GIVEN["plain_unet"]}
    answer = half(rand(3, 2, 8, 8).to(torch.bfloat16), **given).sample
    assert answer.dtype == torch.bfloat16 and answer.isfinite().all()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("build", "slots", "message"),
    [
        (plain_unet, [ffn("*")], r"names: '\*' .*none in this network; slot 'ffn'"),
        (text_unet, [ffn("*.ffn")], r"names: '\*\.ffn' .*transformer_blocks\.0\.ff"),
        (transformer, [conv("*", layers=[1])], r"layers: 1 .*0\.\.0"),
        (Bare, [conv("conv", {"score": "noise_level"})], r"slots\.0.*score: 'noise_level'.*Bare"),
    ],
)
def test_slots_that_do_not_fit_are_refused(build: Any, slots: Any, message: str) -> None:
    model = build()
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        attach(model, slots)
    assert list(model.state_dict()) == before


def test_networks_of_any_make() -> None:
    model = Bare()
    expected = model(rand(3, 2, 8, 8))
    host = attach(model, [conv("conv")])
    with host.recording() as routings:
        assert torch.allclose(model(rand(3, 2, 8, 8)), expected, atol=1e-6)
    assert [(r.name, r.batch) for r in routings] == [("conv", (3, 64))]
    with pytest.raises(ConfigError, match="none in this network"):
        attach(model, [conv("conv.*")])


def test_C5_recordings_of_two_hosts_list_their_own_calls() -> None:
    balance = {"kind": "switch", "weight": 1.0}
    slots = [conv("mid_block.*.conv1")]
    slots[0] = slots[0].replace(expert=slots[0].expert.replace(balance=(balance,)))
    first, second = (attach(made(plain_unet), slots) for _ in range(2))
    with first.recording() as ours, second.recording() as theirs:
        call("plain_unet", first.network)
        with first.recording() as nested:
            call("plain_unet", first.network)
            call("plain_unet", second.network)
    assert (len(ours), len(nested), len(theirs)) == (4, 2, 2)
    assert nested == ours[2:] and not {*map(id, ours)} & {*map(id, theirs)}
    assert first.aux_losses(ours) and second.aux_losses(theirs)
    assert [r.name for r in ours[:2]] == [r.name for r in theirs], "only the host tells them apart"
    for use in (first.aux_losses, first.after_step):
        with pytest.raises(DataError, match="routing of slot conv, layer 0: 'foreign'"):
            use([*ours, *theirs])
    with first.recording() as routings:
        ctx = Context(batch=3, tokens=0, time_input=TIME.float(), noise=TIME / 1000)
        answer = first(rand(3, 2, 8, 8), ctx, Condition(label=torch.tensor([1, 2, 0])))
    assert routings == list(answer.routings), "as a backbone it is called too"


def test_C5_a_network_inside_another_has_its_own_context() -> None:
    inner = attach(Bare(), [conv("conv")])

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.others = [inner.network]  # not a child of it, as a ControlNet is none

        def forward(self, x: Tensor, timestep: Any) -> Tensor:
            return self.conv(self.others[0](x[:2]).repeat(2, 1, 1, 1)[:3])

    outer = attach(Outer(), [conv("conv")])
    with outer.recording() as around, inner.recording() as within:
        outer.network(rand(3, 2, 8, 8), TIME)
    assert [r.batch for r in around] == [(3, 64)] and [r.batch for r in within] == [(2, 64)]
    assert current() is None
