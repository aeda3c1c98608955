"""DeepSeekMoE: finer experts and isolated shared experts at constant parameters and compute."""

from __future__ import annotations

from typing import Any

from coterie.backbones import SlotConfig, TrunkConfig
from coterie.backbones.causal import TEXT_TRUNK, CausalConfig
from coterie.denoiser import TokenDenoiserConfig
from coterie.experts import Segmentation
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny, text_tiny
from coterie.train.run import RunConfig

PAPER = Paper(
    title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts "
    "Language Models",
    authors="Dai, Damai and Deng, Chengqi and Zhao, Chenggang and others",
    year=2024,
    venue="ACL 2024",
    arxiv="2401.06066",
    key="dai2024deepseekmoe",
    url="https://github.com/deepseek-ai/DeepSeek-MoE",
)
SUMMARY = "Fine-grained experts with always-on shared experts, in text and in images."


def slot(
    base_experts: int,
    base_k: int,
    hidden: int,
    segment: int = 4,
    shared: int = 1,
    balance: float = 0.01,
    statistics: str = "batch",
    layers: str = "all",
) -> SlotConfig:
    """A reference layer of N experts, top-K and inner size ``hidden``, cut m = ``segment`` times,
    ``shared`` of the pieces always on."""
    rule = Segmentation(
        base_experts=base_experts,
        base_k=base_k,
        base_hidden=hidden,
        segment=segment,
        shared=shared,
    )
    loss = {"kind": "switch", "weight": balance, "statistics": statistics}
    expert = rule.layer().replace(balance=(loss,))
    return SlotConfig.from_dict({"slot": "ffn", "layers": layers, "expert": expert})


def text() -> RunConfig:
    """Bytes of Python's help topics: 8 base experts, top-2, cut in four, one shared."""
    return text_tiny("deepseekmoe", slot(8, 2, 128))


def tiny() -> RunConfig:
    """The same layer in a denoiser of digits."""
    return image_tiny("deepseekmoe", slot(8, 2, 128))


def paper(size: str = "16B") -> RunConfig:
    """``16B``: 28 layers, first dense, 2 shared + 6 of 64. ``2B``: 9 layers, 1 + 7 of 63."""
    if size == "2B":
        slots = (slot(16, 2, 3412),)
        sizes = {"depth": 9, "width": 1280, "heads": 10, "mlp_hidden": 3412}
        vocabulary = 8192
        train: dict[str, Any] = {"lr": 1.08e-3, "batch": 2048}
    else:
        fine = slot(16, 2, 4 * 1408, shared=2, balance=0.001, statistics="sequence")
        # The released model routes among 64 beside the shared two: 66 experts in all.
        expert = fine.expert.replace(num_experts=64)
        slots = (SlotConfig(slot="ffn", layers="except_first", expert=expert),)
        sizes = {"depth": 28, "width": 2048, "heads": 16, "mlp_hidden": 10944}
        vocabulary = 102_400
        train = {"lr": 4.2e-4, "batch": 4608}
    trunk = TrunkConfig.from_dict(
        {**TEXT_TRUNK.model_dump(), **sizes, "init_std": 0.006, "slots": slots}
    )
    backbone = CausalConfig(vocabulary=vocabulary, context=2048, trunk=trunk)
    config = text_tiny("deepseekmoe", steps=100_000, warmup=2000, clip=1.0, **train)
    return config.replace(
        preset="paper",
        data={"kind": "gcide", "context": 2048},
        model=TokenDenoiserConfig(backbone=backbone),
    )


def arms() -> dict[str, RunConfig]:
    """Equal expert parameters and equal active expert parameters in all arms of a modality."""
    layers = {
        "gshard": slot(8, 2, 128, segment=1, shared=0),
        "fine": slot(8, 2, 128),
    }
    words = {f"text-{name}": text_tiny("deepseekmoe", part) for name, part in layers.items()}
    images = {f"image-{name}": image_tiny("deepseekmoe", part) for name, part in layers.items()}
    return {**words, **images}


CLAIMS = (
    Claim(
        "fine-grained and shared experts beat plain top-2 at equal parameters and compute (text)",
        "held_out_loss",
        "text-fine",
        "text-gshard",
    ),
    Claim(
        "fine-grained and shared experts beat plain top-2 (images)",
        "held_out_loss",
        "image-fine",
        "image-gshard",
    ),
    Claim(
        "less redundancy: losing each token's first expert hurts fine-grained experts more",
        "first_choice_cost",
        "text-fine",
        "text-gshard",
        better="higher",
    ),
)  # fmt: skip
DEPARTURES = (
    "the router and all experts start as in the baseline arm (Xavier in images, N(0, 0.02) in "
    "text); the published init is N(0, 0.006) everywhere",
    "2B: expert width 3412 / 4 = 853; the paper states only the relative size 0.25",
    "paper preset: bytes and a dictionary stand where the paper has 2T tokens of web text",
)
