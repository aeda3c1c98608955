"""DeepSeekMoE: finer experts and isolated shared experts at constant parameters and compute."""

from __future__ import annotations

from typing import Any

from coterie.backbones import SlotConfig, TrunkConfig
from coterie.backbones.causal import TEXT_TRUNK, CausalConfig
from coterie.denoiser import TokenDenoiserConfig
from coterie.experts import RouterConfig, Segmentation
from coterie.experts.kinds import SwiGLU
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny, text_tiny
from coterie.runs.config import RunConfig

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

# Of the learning rate, as published.
DECAY: dict[str, Any] = {"kind": "steps", "at": (0.8, 0.9), "factor": 0.316}
IMAGE_STD = 0.1  # about Xavier's for an uncut expert: 0.08 and 0.10
PAPER_STD = 0.006


def slot(
    base_experts: int,
    base_k: int,
    hidden: int,
    segment: int = 4,
    shared: int = 1,
    balance: float = 0.01,
    statistics: str = "batch",
    layers: str = "all",
    init_std: float = 0.02,
) -> SlotConfig:
    """A reference layer of N experts, top-K and inner size ``hidden``, cut m = ``segment`` times,
    ``shared`` of the pieces always on. Routers and experts start N(0, ``init_std``) whatever their
    size: by Xavier's rule pieces would start larger than what they are cut from."""
    rule = Segmentation(
        base_experts=base_experts,
        base_k=base_k,
        base_hidden=hidden,
        segment=segment,
        shared=shared,
    )
    loss = {"kind": "switch", "weight": balance, "statistics": statistics}
    router = RouterConfig(score={"kind": "linear", "init_std": init_std})
    expert = rule.layer(SwiGLU(init_std=init_std), router).replace(balance=(loss,))
    return SlotConfig.from_dict({"slot": "ffn", "layers": layers, "expert": expert})


def _text(part: SlotConfig) -> RunConfig:
    return text_tiny("deepseekmoe", part, steps=1500, schedule=DECAY)


def _image(part: SlotConfig) -> RunConfig:
    return image_tiny("deepseekmoe", part, schedule=DECAY)


def text() -> RunConfig:
    """Bytes of Python's help topics: 8 base experts, top-2, cut in four, one shared."""
    return _text(slot(8, 2, 128))


def tiny() -> RunConfig:
    """The same layer in a denoiser of digits."""
    return _image(slot(8, 2, 128, init_std=IMAGE_STD))


def paper(size: str = "16B") -> RunConfig:
    """``16B``: 28 layers, first dense, 2 shared + 6 of 64. ``2B``: 9 layers, 1 + 7 of 63."""
    if size == "2B":
        slots = (slot(16, 2, 3412, init_std=PAPER_STD),)
        sizes = {"depth": 9, "width": 1280, "heads": 10, "mlp_hidden": 3412}
        vocabulary = 8192
        train: dict[str, Any] = {"lr": 1.08e-3, "batch": 2048}
    else:
        own: dict[str, Any] = {"balance": 0.001, "statistics": "sequence", "init_std": PAPER_STD}
        fine = slot(16, 2, 4 * 1408, shared=2, **own)
        # The released model routes among 64 beside the shared two: 66 experts in all.
        expert = fine.expert.replace(num_experts=64)
        slots = (SlotConfig(slot="ffn", layers="except_first", expert=expert),)
        sizes = {"depth": 28, "width": 2048, "heads": 16, "mlp_hidden": 10944}
        vocabulary = 102_400
        train = {"lr": 4.2e-4, "batch": 4608}
    trunk = TrunkConfig.from_dict(
        {**TEXT_TRUNK.model_dump(), **sizes, "init_std": PAPER_STD, "slots": slots}
    )
    backbone = CausalConfig(vocabulary=vocabulary, context=2048, trunk=trunk)
    config = text_tiny("deepseekmoe", steps=100_000, warmup=2000, schedule=DECAY, **train)
    return config.replace(
        preset="paper",
        data={"kind": "gcide", "context": 2048},
        model=TokenDenoiserConfig(backbone=backbone),
    )


def arms() -> dict[str, RunConfig]:
    """Equal expert parameters and equal active expert parameters in all arms of a modality."""
    plain: dict[str, Any] = {"segment": 1, "shared": 0}
    return {
        "text-gshard": _text(slot(8, 2, 128, **plain)),
        "text-fine": text(),
        "image-gshard": _image(slot(8, 2, 128, **plain, init_std=IMAGE_STD)),
        "image-fine": tiny(),
    }


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
    "small runs start routers and experts N(0, 0.02) in text and N(0, 0.1) in images, in all arms "
    "alike; the published init is N(0, 0.006) everywhere",
    "2B: expert width 3412 / 4 = 853; the paper states only the relative size 0.25",
    "paper preset: bytes and a dictionary stand where the paper has 2T tokens of web text",
)
