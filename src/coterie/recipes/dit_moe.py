"""DiT-MoE: every feed-forward network of a DiT becomes a token-choice mixture of experts."""

from __future__ import annotations

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig, SharedConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import SIZES, image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Scaling Diffusion Transformers to 16 Billion Parameters",
    authors="Fei, Zhengcong and Fan, Mingyuan and Yu, Changqian and Li, Debang and Huang, Junshi",
    year=2024,
    venue="arXiv preprint",
    arxiv="2407.11633",
    key="fei2024ditmoe",
    url="https://github.com/feizc/DiT-MoE",
)
SUMMARY = "Token-choice experts with always-on shared experts and a balance loss in every block."


def slot(
    width: int,
    num_experts: int = 8,
    ratio: float = 4.0,
    shared: int = 2,
    balance: float = 0.01,
    reads: str = "input",
) -> SlotConfig:
    """Raw top-2 softmax gates, SwiGLU experts of hidden ``ratio * width``, ``shared`` experts of
    hidden ``width`` merged into one, Switch balance loss per layer. ``reads`` "normalised": the
    router reads normalised tokens without their modulation, and the time (Nucleus-Image)."""
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "swiglu", "ratio": ratio},
        router=RouterConfig(score={"kind": "linear"}, select={"kind": "top_k", "k": 2}),
        router_reads=reads,
        router_reads_time=reads == "normalised",
        shared=SharedConfig(hidden=width, count=shared) if shared else None,
        balance=({"kind": "switch", "weight": balance},) if balance else (),
    )
    return SlotConfig(slot="ffn", expert=expert)


def tiny() -> RunConfig:
    return image_tiny("dit-moe", slot(64, ratio=1.0))


def demo() -> RunConfig:
    """What ``coterie demo`` trains: minutes from nothing to readable digits on two cores."""
    config = image_tiny("dit-moe", slot(96, ratio=1.0), steps=1800, trunk={"width": 96})
    drop = {"kind": "steps", "at": (0.85,), "factor": 0.3}
    train = config.train.replace(batch=128, ema=(0.99,), schedule=drop)
    return config.replace(preset="demo", train=train)


def gpu() -> RunConfig:
    """CIFAR-10 in pixels, DiT-S sized, for one GPU: minutes, not days."""
    config = image_tiny("dit-moe", slot(384), steps=3000, trunk={"width": 384, "depth": 12})
    backbone = config.model.backbone.replace(image_size=32, channels=3, patch=2)
    return config.replace(
        preset="gpu",
        data={"kind": "cifar10"},
        model=config.model.replace(backbone=backbone),
        train=config.train.replace(batch=256, lr=3e-4, ema=(0.999,)),
    )


def paper(size: str = "G", num_experts: int = 16) -> RunConfig:
    """G/2-16E2A by default: 16.5B parameters, 3.2B active."""
    trunk = image_trunk(size, slot(SIZES[size][1], num_experts))
    return image_paper("dit-moe", trunk)


def arms() -> dict[str, RunConfig]:
    """``dense`` has the width of all SwiGLU networks active for one token: 2 routed + 2 shared."""
    return {
        "moe": tiny(),
        "no-balance": image_tiny("dit-moe", slot(64, ratio=1.0, shared=0, balance=0.0)),
        "normalised-router": image_tiny("dit-moe", slot(64, ratio=1.0, reads="normalised")),
        "dense": image_tiny("dit-moe", trunk={"mlp": "swiglu", "mlp_hidden": 4 * 64}),
    }


CLAIMS = (
    Claim(
        "experts with sharing and balance beat a dense model of equal active parameters",
        "held_out_loss",
        "moe",
        "dense",
    ),
    Claim("the same, for samples", "frechet", "moe", "dense"),
    Claim(
        "sharing and balance halve the load variation", "load_cv", "moe", "no-balance", factor=0.5
    ),
    Claim(
        "experts follow noise level and position more than class, first block",
        "place_minus_class_bits_first",
        "moe",
        target=0.0,
        better="higher",
    ),
    Claim(
        "preference for positions fades with depth",
        "position_bits_fade",
        "moe",
        target=0.0,
        better="higher",
    ),
    Claim(
        "a router of unmodulated tokens and time beats one of what experts read (Nucleus-Image)",
        "held_out_loss",
        "normalised-router",
        "moe",
    ),
)
DEPARTURES = (
    "time is multiplied by 1000 before the embedding; the published rectified-flow path feeds "
    "t in [0, 1] as it is",
    "tiny: experts of hidden 1 x width instead of 4 x, so that the dense twin fits the budget",
    "the balance loss is an explicit term of the objective, not an identity with a hidden gradient",
)
