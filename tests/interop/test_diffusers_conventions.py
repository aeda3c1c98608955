"""Networks of diffusers are asked as their own pipelines ask them: time, sign and conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers_networks import (
    CROSS,
    DDPM,
    IDS,
    LEVELS,
    MASK,
    POOLED,
    SIDE,
    TOKENS,
    X2,
    T,
    aura,
    flux,
    large_unet,
    lumina,
    pixart,
    rand,
    sana,
    saved,
    stable3,
    there,
    trained,
)
from torch import Tensor

from coterie.core.errors import CoterieError
from coterie.core.prediction import Condition
from coterie.interop.diffusers import DiffusersConfig, load_noise_ranges
from coterie.interop.diffusers.conventions import CONVENTIONS, ask
from coterie.interop.diffusers.facts import embed_time, read_call, time_network

PIXELS = SIDE * 8  # what a pipeline without a decoder takes for it


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("diffusers")


def parts_of(pipeline: Any, **given: Any) -> Any:
    """A pipeline of these parts, and nothing in the places of the others."""
    known = list(inspect.signature(pipeline.__init__).parameters)[1:]
    needed = {
        name: None
        for name in known
        if inspect.signature(pipeline.__init__).parameters[name].default is inspect._empty
    }
    made = pipeline(**{**needed, **given})
    made.set_progress_bar_config(disable=True)
    return made


FLOW = {"scheduler": lambda: there().FlowMatchEulerDiscreteScheduler(shift=3.0)}
HALF = {"scheduler": lambda: there().FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)}
NOISE = {"scheduler": lambda: there().DDIMScheduler(clip_sample=False)}
TEXT = {"prompt_embeds": TOKENS}
MASKED = {**TEXT, "prompt_attention_mask": MASK}

CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any], dict[str, Any], Condition]] = {
    "aura flow": ("AuraFlowPipeline", aura, FLOW, MASKED, Condition(tokens=TOKENS)),
    "lumina 2": (
        "Lumina2Pipeline", lumina, FLOW, MASKED, Condition(tokens=TOKENS, tokens_mask=MASK),
    ),
    "lumina 2, 500 steps": (
        "Lumina2Pipeline", lumina, HALF, MASKED, Condition(tokens=TOKENS, tokens_mask=MASK),
    ),
    "stable diffusion 3": (
        "StableDiffusion3Pipeline", stable3, FLOW, {**TEXT, "pooled_prompt_embeds": POOLED},
        Condition(tokens=TOKENS, vector=POOLED),
    ),
    "stable diffusion 3, 500 steps": (
        "StableDiffusion3Pipeline", stable3, HALF, {**TEXT, "pooled_prompt_embeds": POOLED},
        Condition(tokens=TOKENS, vector=POOLED),
    ),
    "flux": (
        "FluxPipeline", lambda: flux(False), FLOW, {**TEXT, "pooled_prompt_embeds": POOLED},
        Condition(tokens=TOKENS, vector=POOLED),
    ),
    "flux, guidance inside": (
        "FluxPipeline", lambda: flux(True), FLOW,
        {**TEXT, "pooled_prompt_embeds": POOLED, "guidance_scale": 3.5},
        Condition(tokens=TOKENS, vector=torch.cat([POOLED, torch.full((2, 1), 3.5)], 1)),
    ),
    "sana": (
        "SanaPipeline", lambda: sana(0.25), FLOW, MASKED,
        Condition(tokens=TOKENS, tokens_mask=MASK),
    ),
    "pixart": (
        "PixArtAlphaPipeline", lambda: pixart(False), NOISE, MASKED,
        Condition(tokens=TOKENS, tokens_mask=MASK),
    ),
    "stable diffusion": (
        "StableDiffusionPipeline",
        lambda: trained("UNet2DConditionModel", sample_size=SIDE, **LEVELS, **CROSS),
        NOISE, TEXT, Condition(tokens=TOKENS),
    ),
    "stable diffusion xl": (
        "StableDiffusionXLPipeline", large_unet, NOISE, {**TEXT, "pooled_prompt_embeds": POOLED},
        Condition(tokens=TOKENS, vector=torch.cat([POOLED, IDS], 1)),
    ),
}  # fmt: skip


def packed(latents: Tensor) -> Tensor:
    return there().FluxPipeline._pack_latents(latents, *latents.shape)


def run_theirs(name: str, folder: Path) -> list[tuple[Any, Tensor, Tensor]]:
    """(timestep, latents, what the scheduler is given) of each step of the pipeline itself."""
    kind, network, scheduler, told, _ = CASES[name]
    made = network()
    place = "unet" if "UNet" in type(made).__name__ else "transformer"
    pipeline = parts_of(
        getattr(there(), kind), **{place: made, "scheduler": scheduler["scheduler"]()}
    )
    pipeline.save_pretrained(folder)
    steps: list[tuple[Any, Tensor, Tensor]] = []
    step = pipeline.scheduler.step

    def noted(answer: Tensor, time: Any, latents: Tensor, **more: Any) -> Any:
        steps.append((time, latents.clone(), answer.clone()))
        return step(answer, time, latents, **more)

    pipeline.scheduler.step = noted
    start = rand(2, 4, SIDE, SIDE)
    plain = {"guidance_scale": 1.0} | told
    if "PixArt" in kind or "Sana" in kind:
        plain |= {"use_resolution_binning": False, "negative_prompt": None}
        sides = 32 if "Sana" in kind else 8
    else:
        sides = 8
    pipeline(
        height=SIDE * sides, width=SIDE * sides, num_inference_steps=3, output_type="latent",
        latents=packed(start) if "Flux" in kind else start, **plain,
    )  # fmt: skip
    return steps


@pytest.mark.parametrize("name", CASES)
def test_A2_each_network_is_asked_as_its_own_pipeline_asks_it(name: str, tmp_path: Path) -> None:
    """The latents of every step of the pipeline, asked of ours, give what its scheduler was given:
    the time, the sign and the conditions (D3) are right together."""
    steps = run_theirs(name, tmp_path)
    made = load_noise_ranges(tmp_path)
    kind, _, _, _, cond = CASES[name]
    assert len(steps) == 3
    for time, latents, expected in steps:
        if "Flux" in kind:
            latents, expected = (
                there().FluxPipeline._unpack_latents(value, PIXELS, PIXELS, 8)
                for value in (latents, expected)
            )
        count = float(made.process.num_steps)
        t = made.process.time_of_index(time) if made.process.discrete else time / count
        with torch.no_grad():
            found = made(latents, t.float().expand(2), cond).value
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert float(expected.std()) > 1e-3


@pytest.mark.parametrize("name", [name for name in CASES if "500" not in name])
def test_A2_experts_inside_a_network_see_the_noise_that_it_is_told_of(name: str) -> None:
    """``attach`` reads off a call its level, its step and the embedding it makes itself."""
    _, network, _, _, cond = CASES[name]
    model, time = network(), torch.tensor([100.0, 600.0])
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    found = time_network(model)
    if found is not None:
        found[1].register_forward_hook(lambda *call: calls.append(call[-1]))
    with torch.no_grad():
        ask(model, rand(2, 4, SIDE, SIDE), time, 1000, cond)
        ctx = read_call(model, *calls[0], 1000, None)
    assert ctx.noise is not None and ctx.step_index is not None
    torch.testing.assert_close(ctx.noise, time / 1000)
    assert ctx.step_index.tolist() == [100, 600]
    if found is not None:
        torch.testing.assert_close(ctx.time_embedding, calls[1], rtol=1e-4, atol=1e-5)
        with torch.no_grad():  # and of a call of ours, which knows the time of the grid
            again = embed_time(model, 1000)(time)
        torch.testing.assert_close(again, calls[1], rtol=1e-4, atol=1e-5)


OLDER = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "patch_size": 2}
OLDER |= {"sample_size": SIDE, "in_channels": 2, "out_channels": 4, "num_embeds_ada_norm": 5}


def test_A2_networks_under_older_names_are_asked_like_those_of_today(tmp_path: Path) -> None:
    kind, times = "Transformer2DModel", DDPM.time_input(T)
    dit = trained(kind, **OLDER, norm_type="ada_norm_zero")
    text = {"cross_attention_dim": 8, "caption_channels": 8, "attention_bias": True}
    art = trained(kind, **OLDER, **text, norm_type="ada_norm_single", norm_elementwise_affine=False)
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    for name, network, cond, given in [
        ("dit", dit, Condition(label=torch.tensor([1, -1])),
         {"class_labels": torch.tensor([1, 5])}),
        ("art", art, Condition(tokens=TOKENS, tokens_mask=MASK),
         {"encoder_hidden_states": TOKENS, "encoder_attention_mask": MASK, **more}),
    ]:  # fmt: skip
        made = DiffusersConfig(path=str(saved(network, tmp_path / name))).build()
        with torch.no_grad():
            (expected,) = network(X2, timestep=times, **given, return_dict=False)
        found = made(X2, T, cond)
        torch.testing.assert_close(found.value, expected[:, :2], rtol=1e-4, atol=1e-5)
        assert found.variance is not None
    other = saved(dit, tmp_path / "dit", norm_type="layer_norm")
    with pytest.raises(CoterieError, match=r"network: 'Transformer2DModel'"):
        load_noise_ranges(other)


def test_A2_every_class_that_is_served_is_compared_with_its_pipeline() -> None:
    """Wan and DiT are sampled beside their pipelines in tests/interop/test_diffusers_pipeline.py
    and test_diffusers_slots.py, plain U-Nets in test_diffusers_schedulers.py."""
    elsewhere = {"WanTransformer3DModel", "DiTTransformer2DModel", "UNet2DModel"}
    here = {type(network()).__name__ for _, network, _, _, _ in CASES.values()}
    assert here | elsewhere == set(CONVENTIONS)
