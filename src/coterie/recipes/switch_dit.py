"""Switch-DiT: experts chosen by the noise level alone make a soft mask in front of every block."""

from __future__ import annotations

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Switch Diffusion Transformer: Synergizing Denoising Tasks with Sparse "
    "Mixture-of-Experts",
    authors="Park, Byeongjun and Go, Hyojun and Kim, Jin-Young and Woo, Sangmin and "
    "Ham, Seokil and Kim, Changick",
    year=2024,
    venue="ECCV 2024",
    arxiv="2403.09176",
    key="park2024switchdit",
    url="https://github.com/byeongjun-park/Switch-DiT",
)
SUMMARY = "A timestep-gated mixture of affine maps masks each block's input; a prior ties levels."


def slot(num_experts: int = 3, k: int = 2, prior: float = 1.0) -> SlotConfig:
    """m = 1 + sum of raw softmax gates times affine maps that start at zero."""
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "affine"},
        router=RouterConfig(
            score={"kind": "noise_level", "table": True}, select={"kind": "top_k", "k": k}
        ),
        balance=({"kind": "diffusion_prior", "weight": prior},) if prior else (),
    )
    return SlotConfig(slot="pre_block", expert=expert)


def tiny() -> RunConfig:
    return image_tiny("switch-dit", slot(), flow=False)


def paper(size: str = "XL") -> RunConfig:
    return image_paper("switch-dit", image_trunk(size, slot()), flow=False)


def arms() -> dict[str, RunConfig]:
    """``wide`` is a dense DiT with at least the parameters of Switch-DiT."""
    return {
        "switch-dit": tiny(),
        "no-prior": image_tiny("switch-dit", slot(prior=0.0), flow=False),
        "dit": image_tiny("dit", flow=False),
        "wide": image_tiny("dit", flow=False, trunk={"width": 72}),
    }


CLAIMS = (
    Claim("lower loss than a dense DiT at equal steps", "held_out_loss", "switch-dit", "dit"),
    Claim("better samples than a dense DiT at equal steps", "frechet", "switch-dit", "dit"),
    Claim(
        "lower loss than a wider dense DiT of at least as many parameters",
        "held_out_loss",
        "switch-dit",
        "wide",
    ),
    Claim(
        "the prior makes one expert per block shared by all noise levels",
        "always_on_per_layer",
        "switch-dit",
        target=0.8,
        better="higher",
    ),
    Claim(
        "without the prior fewer experts are shared",
        "always_on_per_layer",
        "switch-dit",
        "no-prior",
        better="higher",
    ),
)
DEPARTURES = (
    "tiny: 5,000 MNIST digits in pixels, fixed variance, DPM-Solver++ 2M instead of 250 "
    "ancestral steps",
    "the prior is one term of the objective with its own weight; published code adds it in the "
    "training script",
)
