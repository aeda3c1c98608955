"""ProMoE: two-step routing by condition and by prototypes, guided by a contrastive loss."""

from __future__ import annotations

from typing import Any

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig, SharedConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import SIZES, image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance",
    authors="Wei, Yujie and Zhang, Shiwei and Yuan, Hangjie and others",
    year=2026,
    venue="ICLR 2026",
    arxiv="2510.24711",
    key="wei2026promoe",
    url="https://github.com/ali-vilab/ProMoE",
)
SUMMARY = "Unconditional tokens to their own expert, the others to prototypes by cosine."


def slot(
    width: int,
    num_experts: int = 12,
    choice: str = "token",
    contrastive: float = 1.0,
    probability: str = "identity",
    reads: str = "input",
) -> SlotConfig:
    """GELU experts of hidden 2 x width in every second block: routed + shared = dense hidden 4x.

    ``choice`` "token": top-1 by cosine; "expert": each expert takes its best tokens of a sample.
    ``probability``: gates are the cosines themselves, as published; "softmax_tokens" is what the
    released expert choice calls softmax, over the tokens of a sample. ``reads`` "normalised": the
    prototypes live among normalised tokens without their modulation (as in Nucleus-Image, whose
    router reads the time as well).
    """
    by_expert = choice == "expert"
    select = {"kind": "expert_choice"} if by_expert else {"kind": "top_k", "k": 1}
    statistics = "sequence" if by_expert else "batch"
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "gelu_mlp", "hidden": 2 * width},
        router=RouterConfig(
            score={"kind": "cosine"},
            probability=probability,
            select=select,
            partition="null_label",
        ),
        router_reads=reads,
        shared=SharedConfig(hidden=2 * width),
        balance=(
            ({"kind": "contrastive", "weight": contrastive, "statistics": statistics},)
            if contrastive
            else ()
        ),
    )
    return SlotConfig(slot="ffn", layers="odd", expert=expert)


def plain_slot(width: int, num_experts: int) -> SlotConfig:
    """The token-choice baseline: softmax top-1 with a balance loss, same experts."""
    expert = ExpertLayerConfig(
        num_experts=num_experts + 1,  # in place of the unconditional expert
        experts={"kind": "gelu_mlp", "hidden": 2 * width},
        router=RouterConfig(select={"kind": "top_k", "k": 1}),
        shared=SharedConfig(hidden=2 * width),
        balance=({"kind": "switch", "weight": 0.01},),
    )
    return SlotConfig(slot="ffn", layers="odd", expert=expert)


def _tiny(*slots: SlotConfig, **changes: Any) -> RunConfig:
    return image_tiny("promoe", *slots, clip=0.5, **changes)


def tiny() -> RunConfig:
    return _tiny(slot(64, 6))


def paper(size: str = "L", choice: str = "token") -> RunConfig:
    """ProMoE-L: 1.06B parameters, 458M active. ``choice`` "expert" is the variant for DDPM."""
    trunk = image_trunk(size, slot(SIZES[size][1], choice=choice))
    flow = choice == "token"
    return image_paper("promoe", trunk, flow=flow, train={"steps": 500_000, "clip": 0.5})


def arms() -> dict[str, RunConfig]:
    return {
        "promoe": tiny(),
        "expert-choice": _tiny(slot(64, 6, choice="expert")),
        "no-contrastive": _tiny(slot(64, 6, contrastive=0.0)),
        "normalised-router": _tiny(slot(64, 6, reads="normalised")),
        "token-choice": _tiny(plain_slot(64, 6)),
        "dense": _tiny(),
    }


CLAIMS = (
    Claim("better samples than plain token choice", "frechet", "promoe", "token-choice"),
    Claim("lower loss than plain token choice", "held_out_loss", "promoe", "token-choice"),
    Claim("better samples than a dense DiT of equal active size", "frechet", "promoe", "dense"),
    Claim(
        "expert choice with prototypes beats plain token choice too",
        "frechet",
        "expert-choice",
        "token-choice",
    ),
    Claim(
        "the contrastive loss spreads the load",
        "load_entropy",
        "promoe",
        "no-contrastive",
        better="higher",
    ),
    Claim(
        "the contrastive loss separates what experts see",
        "separation",
        "promoe",
        "no-contrastive",
        better="higher",
    ),
    Claim(
        "prototypes among unmodulated tokens beat those among what experts read (Nucleus-Image)",
        "held_out_loss",
        "normalised-router",
        "promoe",
    ),
)
DEPARTURES = (
    "tiny: 6 prototypes, 5,000 MNIST digits in pixels, Heun instead of 250 Euler steps",
    "no unused second half of the output: rectified flow has no variance to learn",
)
