"""What networks of diffusers are told besides the time, and which of them are refused at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers_networks import (
    DDPM,
    IDS,
    MASK,
    POOLED,
    SIDE,
    TOKENS,
    X2,
    T,
    X,
    flux,
    large_unet,
    lumina,
    plain_unet,
    rand,
    saved,
    stable3,
    text_unet,
    there,
)

from coterie.core.errors import CheckpointError, CoterieError
from coterie.core.prediction import Condition
from coterie.interop.diffusers import DiffusersConfig, DiffusersDenoiser, load_noise_ranges
from coterie.process import PROCESSES
from coterie.solvers import GuidanceConfig, guide


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


@pytest.mark.parametrize("kind", [
    "CogView4Transformer2DModel", "ZImageTransformer2DModel", "QwenImageTransformer2DModel",
    "LTXVideoTransformer3DModel", "MochiTransformer3DModel", "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel", "UNetSpatioTemporalConditionModel", "Flux2Transformer2DModel",
])  # fmt: skip
def test_D3_classes_without_a_convention_are_refused_before_they_are_made(
    tmp_path: Path, kind: str
) -> None:
    """These have billions of weights by default: the line comes before any of them."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": kind}), "utf-8")
    there().DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "One", "unet": ["diffusers", kind]}
    (tmp_path / "model_index.json").write_text(json.dumps(index), "utf-8")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    for load in (load_noise_ranges, lambda path: DiffusersConfig(path=str(path)).build()):
        with pytest.raises(CoterieError, match=rf"network: '{kind}'.*it") as found:
            load(tmp_path)
        assert "\n" not in str(found.value)


def test_D3_the_line_says_what_else_a_network_is_told() -> None:
    network = there().CogView4Transformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    with pytest.raises(CoterieError, match=r"crop_coords, .*original_size, .*target_size"):
        DiffusersDenoiser(network, DDPM, "eps")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("addition_embed_type", "image"),
        ("encoder_hid_dim_type", "image_proj"),
        ("time_cond_proj_dim", 16),
        ("attention_type", "gated"),
        ("time_embedding_type", "fourier"),
        ("quantization_config", {"bits": 8}),
        ("unheard_of", 3),
    ],
)
def test_D3_fields_that_need_more_than_a_condition_holds_are_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    folder = saved(text_unet(), tmp_path, **{field: value})
    with pytest.raises(CoterieError, match=rf"UNet2DConditionModel\.{field}: "):
        load_noise_ranges(folder)


def test_D3_vectors_of_another_width_and_none_at_all_are_refused() -> None:
    large, network = DiffusersDenoiser(large_unet(), DDPM, "eps"), stable3()
    flow = PROCESSES.parse("rectified_flow").build()
    other = DiffusersDenoiser(network, flow, "flow")
    guided = DiffusersDenoiser(flux(True), flow, "flow")
    for made, vector, words in [
        (large, None, r"cond\.vector: None.*UNet2DConditionModel"),
        (large, rand(2, 11), r"cond\.vector: \(2, 11\).*30 numbers when 4"),
        (other, rand(2, 7), r"cond\.vector: \(2, 7\).*\[B, 6\]: the pooled text"),
        (guided, POOLED, r"cond\.vector: \(2, 6\).*\[B, 7\].*guidance"),
    ]:
        with pytest.raises(CoterieError, match=words):
            made(X, T, Condition(tokens=TOKENS, vector=vector))
    with pytest.raises(CoterieError, match=r"cond\.tokens_mask.*attends to every token"):
        other(X, T, Condition(tokens=TOKENS, vector=POOLED, tokens_mask=MASK))
    with pytest.raises(CoterieError, match=r"cond\.tokens: None"):
        other(X, T, Condition(vector=POOLED))
    with pytest.raises(CoterieError, match=r"even H and W"):
        guided(rand(2, 4, 7, 8), T, Condition(tokens=TOKENS, vector=rand(2, 7)))


def test_D3_guided_samples_keep_the_numbers_behind_the_pooled_text() -> None:
    """SDXL's own pipeline tells both halves the same time ids; zeros would be another picture."""
    vector = torch.cat([POOLED, IDS], 1)
    cond = Condition(tokens=TOKENS, vector=vector, null={"tokens": TOKENS[0] * 0})
    guided = guide(DiffusersDenoiser(large_unet(), DDPM, "eps"), GuidanceConfig(weight=2.0))
    with pytest.raises(CoterieError, match=r"cond\.vector: 0\.0 .*null form that keeps them"):
        guided(X, T, cond)
    row = torch.cat([POOLED[0] * 0, IDS[0]])
    null = {**cond.null, "vector": row}
    plain = DiffusersDenoiser(large_unet(), DDPM, "eps")
    with torch.no_grad():
        found = guided(X, T, cond.replace(null=null)).value
        weak = Condition(tokens=TOKENS * 0, vector=row.expand(2, -1))
        one, other = plain(X, T, cond).value, plain(X, T, weak).value
    torch.testing.assert_close(found, other + 2.0 * (one - other), rtol=1e-4, atol=1e-5)


def test_D4_pipelines_that_put_channels_before_x_are_refused(tmp_path: Path) -> None:
    folder = saved(text_unet(in_channels=8), tmp_path)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["_class_name"] = "MarigoldDepthPipeline"
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    for load in (load_noise_ranges, lambda path: DiffusersConfig(path=str(path)).build()):
        with pytest.raises(CoterieError, match=r"_class_name: 'MarigoldDepthPipeline'.*before x"):
            load(folder)


def test_D3_lumina_attends_to_every_token_where_no_mask_is_given() -> None:
    made = DiffusersDenoiser(lumina(), PROCESSES.parse("rectified_flow").build(), "flow")
    whole = Condition(tokens=TOKENS, tokens_mask=torch.ones(2, 5).bool())
    assert torch.equal(made(X, T, Condition(tokens=TOKENS)).value, made(X, T, whole).value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_D2_half_precision_networks_take_conditions_of_any_type(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    for name, network, cond in [
        ("unet", large_unet(), Condition(tokens=TOKENS, vector=torch.cat([POOLED, IDS], 1))),
        ("none", plain_unet(class_embed_type="identity"), Condition(vector=rand(2, 32))),
    ]:
        x = X if name == "unet" else X2
        folder = saved(network, tmp_path / name)
        exact = load_noise_ranges(folder)(x, T, cond).value
        made = load_noise_ranges(folder, dtype=dtype)
        found = made(x, T, cond).value
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)
        network.to(dtype).save_pretrained(folder / "unet")  # and as it is stored
        assert torch.equal(load_noise_ranges(folder)(x, T, cond).value, found)


def test_D2_weights_that_nothing_computes_with_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(plain_unet(), tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        save_file({**weights, "conv_in.weight": weights["conv_in.weight"].to(dtype)}, file)
        with pytest.raises(CheckpointError, match=rf"conv_in\.weight is {dtype}.*bfloat16"):
            load_noise_ranges(folder)(X2, T, Condition())
        with pytest.raises(CheckpointError, match=rf"conv_in\.weight is {dtype}"):
            DiffusersConfig(path=str(folder)).build()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_C6_a_weight_that_is_not_finite_is_refused_at_load(tmp_path: Path, value: float) -> None:
    folder = saved(plain_unet(), tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"].view(-1)[3] = value
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"conv_out\.weight holds NaN or infinity"):
        DiffusersConfig(path=str(folder)).build()
    with pytest.raises(CheckpointError, match=r"conv_out\.weight holds NaN or infinity"):
        load_noise_ranges(folder)(X2, T, Condition())


def test_D4_inpainting_networks_read_the_channels_of_the_condition(tmp_path: Path) -> None:
    network = text_unet(in_channels=9)
    folder = saved(network, tmp_path)
    rest = rand(2, 5, SIDE, SIDE, seed=4)
    made = DiffusersConfig(path=str(folder)).build()
    assert made.config.backbone.sample_shape == (4, SIDE, SIDE)
    cond = Condition(tokens=TOKENS, channels=rest)
    with torch.no_grad():
        both = torch.cat([X, rest], dim=1)
        expected = network(both, DDPM.time_input(T), TOKENS, return_dict=False)[0]
    for found in (made, load_noise_ranges(folder)):
        torch.testing.assert_close(found(X, T, cond).value, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CoterieError, match=r"x: .*9 channels.*cond\.channels brings 0"):
        made(X, T, Condition(tokens=TOKENS))
    with pytest.raises(CoterieError, match=r"x: .*9 channels.*cond\.channels brings 3"):
        made(X, T, cond.replace(channels=rest[:, :3]))


def test_D4_labels_that_are_embedded_like_times_and_vectors_reach_the_network(
    tmp_path: Path,
) -> None:
    label, vector = torch.tensor([20, 700]), rand(2, 32)
    for kind, cond, given in [
        ("timestep", Condition(label=label), label),
        ("identity", Condition(vector=vector), vector),
    ]:
        network = plain_unet(class_embed_type=kind)
        folder = saved(network, tmp_path / kind)
        with torch.no_grad():
            (expected,) = network(X2, DDPM.time_input(T), given, return_dict=False)
        for made in (DiffusersConfig(path=str(folder)).build(), load_noise_ranges(folder)):
            torch.testing.assert_close(made(X2, T, cond).value, expected, rtol=1e-4, atol=1e-5)
            with pytest.raises(CoterieError, match=r"cond\.(label|vector)"):
                made(X2, T, Condition())


@pytest.mark.parametrize("ratio", ["0.7", True, [0.7], 1.5, 0.0, -0.1, float("nan")])
def test_D9_boundaries_of_odd_types_are_refused_by_value(tmp_path: Path, ratio: Any) -> None:
    folder = saved(plain_unet(), tmp_path)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index = {**index, "boundary_ratio": ratio}
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(CoterieError, match=r"boundary_ratio: .*a number between 0 and 1"):
        load_noise_ranges(folder)


def test_D9_components_and_shards_of_another_form_are_refused(tmp_path: Path) -> None:
    folder = saved(plain_unet(), tmp_path)
    index = folder / "model_index.json"
    for stored in ([], ["diffusers"], [["diffusers"], "UNet2DModel"], ["diffusers", None]):
        index.write_text(json.dumps({"unet": stored}), "utf-8")
        with pytest.raises(CoterieError, match=r"components: "):
            load_noise_ranges(folder)
    index.write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}), "utf-8")
    shards = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for written in ({}, {"weight_map": {}}, {"weight_map": [1]}):
        shards.write_text(json.dumps(written), "utf-8")
        with pytest.raises(CheckpointError, match=r"weight_map: "):
            load_noise_ranges(folder)
