"""The same network and the same sampling run in diffusers.

Our weights are put into ``DiTTransformer2DModel``, whose blocks each embed time and label again
(with the frequencies of the original DiT), so both answer the same; the schedulers are its DDIM and
DPM-Solver++(2M), in the loop of its pipeline: both halves of guidance in one call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.backbones.dit import DiT
from coterie.bench.sampling_cases import CHANNELS, CLASSES, GUIDANCE, PATCH, Setup

PACKAGE = "diffusers"
DDIM, DPM = "diffusers-ddim", "diffusers-dpmpp"


def diffusers_runs(setup: Setup) -> dict[str, Callable[[int], Tensor]]:
    """Steps -> sample, by the name of the loop; {} where diffusers is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return {}
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    network = diffusers_network(setup)
    shared: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    ddim = DDIMScheduler(**shared, clip_sample=False, timestep_spacing="leading")
    dpm = DPMSolverMultistepScheduler(**shared, timestep_spacing="leading")
    return {
        DDIM: lambda steps: _loop(network, ddim, setup, steps),
        DPM: lambda steps: _loop(network, dpm, setup, steps),
    }


@torch.no_grad()
def _loop(network: Any, scheduler: Any, setup: Setup, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = setup.x * scheduler.init_noise_sigma
    labels = torch.tensor([int(setup.label), CLASSES])
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x] * 2), t)
        out = network(both, timestep=t.expand(2), class_labels=labels).sample
        strong, weak = out.chunk(2)
        x = scheduler.step(weak + GUIDANCE * (strong - weak), t, x).prev_sample
    return x


@torch.no_grad()
def diffusers_network(setup: Setup) -> Any:
    """``DiTTransformer2DModel`` that answers what ``setup.model`` does."""
    from diffusers import DiTTransformer2DModel

    case, ours = setup.case, setup.model.backbone
    assert isinstance(ours, DiT) and ours.label is not None
    made: Any = DiTTransformer2DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.width // case.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=case.depth,
        sample_size=case.image_size,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    made.eval()
    stem = made.pos_embed
    stem.proj.weight.copy_(ours.patch_in.weight.reshape(stem.proj.weight.shape))
    stem.proj.bias.copy_(ours.patch_in.bias)
    stem.pos_embed.copy_(ours.get_buffer("positions")[None])
    for theirs, block in zip(made.transformer_blocks, ours.trunk.blocks):
        emb = theirs.norm1.emb
        emb.time_proj.downscale_freq_shift = 0
        _copy(emb.timestep_embedder.linear_1, ours.time.mlp[0])
        _copy(emb.timestep_embedder.linear_2, ours.time.mlp[2])
        emb.class_embedder.embedding_table.weight.copy_(ours.label.table.weight)
        _copy(theirs.norm1.linear, block.modulation)
        attention: Any = block.attention
        for name, rows in zip("qkv", range(3)):
            part = slice(rows * case.width, (rows + 1) * case.width)
            into = getattr(theirs.attn1, f"to_{name}")
            into.weight.copy_(attention.qkv.weight[part])
            into.bias.copy_(attention.qkv.bias[part])
        _copy(theirs.attn1.to_out[0], attention.out)
        ffn: Any = block.ffn
        inner, outer = [m for m in ffn.modules() if isinstance(m, nn.Linear)]
        _copy(theirs.ff.net[0].proj, inner)
        _copy(theirs.ff.net[2], outer)
    _copy(made.proj_out_1, ours.head_modulation)
    # Our head answers channel by channel, theirs pixel by pixel.
    order = torch.arange(CHANNELS * PATCH**2).reshape(CHANNELS, PATCH, PATCH).permute(1, 2, 0)
    made.proj_out_2.weight.copy_(ours.head.weight[order.flatten()])
    made.proj_out_2.bias.copy_(ours.head.bias[order.flatten()])
    return made


def _copy(into: Any, source: Any) -> None:
    into.weight.copy_(source.weight)
    into.bias.copy_(source.bias)
