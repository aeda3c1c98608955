"""Tiny random networks of diffusers, of every class that is served, and folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.process import PROCESSES

DDPM = PROCESSES.parse("ddpm").build()
SIDE = 8


def there() -> Any:
    import diffusers

    return diffusers


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(kind: str, **fields: Any) -> Any:
    """A tiny network, as if it were trained: zero-initialised layers answer too."""
    torch.manual_seed(0)
    made = getattr(there(), kind)(**fields)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made.eval()


TOKENS, POOLED, MASK = rand(2, 5, 8, seed=1), rand(2, 6, seed=2), torch.ones(2, 5).bool()
MASK[1, 3:] = False
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
LEVELS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
}
PLAIN = {
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "attention_head_dim": 8,
}


def aura() -> Any:
    return trained(
        "AuraFlowTransformer2DModel", sample_size=SIDE, in_channels=4, out_channels=4,
        num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip


def lumina() -> Any:
    return trained(
        "Lumina2Transformer2DModel", sample_size=SIDE, in_channels=4, hidden_size=24, num_layers=1,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(4, 4, 4), axes_lens=(32, 32, 32), cap_feat_dim=8,
    )  # fmt: skip


def stable3() -> Any:
    return trained(
        "SD3Transformer2DModel", sample_size=SIDE, in_channels=4, out_channels=4, **HEADS,
        joint_attention_dim=8, caption_projection_dim=32, pooled_projection_dim=6,
        pos_embed_max_size=16,
    )  # fmt: skip


def flux(guided: bool) -> Any:
    return trained(
        "FluxTransformer2DModel", in_channels=16, **HEADS, num_single_layers=1,
        joint_attention_dim=8, pooled_projection_dim=6, guidance_embeds=guided,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def sana(scale: float) -> Any:
    return trained(
        "SanaTransformer2DModel", sample_size=SIDE, in_channels=4, out_channels=4, **HEADS,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=8, timestep_scale=scale,
    )  # fmt: skip


def pixart(sized: bool) -> Any:
    return trained(
        "PixArtTransformer2DModel", sample_size=SIDE, in_channels=4, out_channels=8,
        num_attention_heads=3, attention_head_dim=8, num_layers=1, cross_attention_dim=24,
        caption_channels=8, use_additional_conditions=sized,
    )  # fmt: skip


def large_unet() -> Any:
    """SDXL's: pooled text of 6 numbers, six time ids of 4 numbers each."""
    return trained(
        "UNet2DConditionModel", sample_size=SIDE, **LEVELS, **CROSS,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )  # fmt: skip


def saved(network: Any, folder: Path, **changes: Any) -> Path:
    """A pipeline of noise with this one network; ``changes`` to its configuration."""
    network.save_pretrained(folder / "unet")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), **changes}), "utf-8")
    there().DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "One", "unet": ["diffusers", type(network).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    return folder


def text_unet(**more: Any) -> Any:
    return trained("UNet2DConditionModel", **{"sample_size": SIDE, **LEVELS, **CROSS, **more})


def plain_unet(**more: Any) -> Any:
    fields = {"sample_size": SIDE, "in_channels": 2, "out_channels": 2, **LEVELS, **PLAIN}
    return trained("UNet2DModel", **{**fields, **more})


T, X, X2 = torch.tensor([100.0, 600.0]) / 999, rand(2, 4, SIDE, SIDE), rand(2, 2, SIDE, SIDE)
IDS = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
