"""ReXMoE: layers may also use the experts of their neighbours; which ones, opens step by step."""

from __future__ import annotations

from typing import Any, Literal

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig, SharedConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny, text_paper, text_tiny
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts",
    authors="Tan, Zheyue and Li, Zhiyuan and Yuan, Tao and others",
    year=2025,
    venue="arXiv preprint",
    arxiv="2510.17483",
    key="tan2025rexmoe",
)
SUMMARY = "Neighbouring layers share one pool of experts, opened to their routers progressively."

# depth, width, heads, key and value heads, experts of a layer, k, inner size, shared experts, reuse
SIZES = {
    "0.5B": (16, 768, 16, 2, 32, 4, 384, 0, 4),
    "0.5B-SE": (16, 768, 16, 2, 32, 3, 384, 1, 4),
    "2.3B": (32, 512, 16, 2, 64, 8, 744, 0, 4),
    "2.3B-SE": (32, 512, 16, 2, 64, 6, 744, 2, 4),
    "7B-SE": (32, 2048, 16, 4, 22, 6, 1408, 2, 3),
}
STEPS = 47_684  # 100B tokens in batches of 512 x 4096; of these the pool opens in 10k..30k


def slot(
    num_experts: int,
    k: int,
    hidden: int,
    reuse: int = 2,
    psr: Literal["linear", "steps"] | None = "linear",
    begin: float = 0.1,
    end: float = 0.3,
    shared: int = 0,
    balance: float = 0.01,
) -> SlotConfig:
    """Each layer owns ``num_experts`` and routes among those of ``reuse`` layers, with raw gates.

    ``psr``: how the pool opens while training goes from ``begin`` to ``end``; None: open at once.
    ``shared`` experts stay with their layer. ``reuse`` 1 is the ordinary layer.
    """
    opening = {"kind": "progressive", "mode": psr, "begin": begin, "end": end, "masks": "probs"}
    own = {"kind": "switch", "weight": balance}
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "swiglu", "hidden": hidden},
        router=RouterConfig(
            edits=(opening,) if psr and reuse > 1 else (),
            select={"kind": "top_k", "k": k},
        ),
        shared=SharedConfig(hidden=hidden, count=shared) if shared else None,
        balance=(own, {**own, "pooled": True}) if reuse > 1 else (own,),
    )
    return SlotConfig(slot="ffn", reuse=reuse, expert=expert)


def _text(*slots: SlotConfig) -> RunConfig:
    sizes = {"width": 80, "depth": 4}
    return text_tiny("rexmoe", *slots, steps=800, context=64, batch=8, trunk=sizes)


def _image(*slots: SlotConfig) -> RunConfig:
    return image_tiny("rexmoe", *slots, steps=400)


def text() -> RunConfig:
    """Bytes of Python's help topics: 4 layers in two pools of 2 x 8 experts, top-2."""
    return _text(slot(8, 2, 64))


def tiny() -> RunConfig:
    """The same layers in a denoiser of digits."""
    return _image(slot(8, 2, 64))


def _published(size: str, context: int, begin: float, end: float, **train: Any) -> RunConfig:
    depth, width, heads, kv_heads, experts, k, hidden, shared, reuse = SIZES[size]
    part = slot(experts, k, hidden, reuse, begin=begin, end=end, shared=shared)
    sizes = {"depth": depth, "width": width, "heads": heads, "kv_heads": kv_heads}
    schedule = {"kind": "cosine", "final": 0.1}
    settings = {"lr": 3e-4, "schedule": schedule, **train}
    return text_paper("rexmoe", part, trunk=sizes, context=context, **settings)


def paper(size: str = "2.3B") -> RunConfig:
    """``0.5B``, ``2.3B`` and, with shared experts, ``0.5B-SE``, ``2.3B-SE``, ``7B-SE``."""
    steps = STEPS * (10 if size.startswith("7B") else 1)
    begin, end = 10_000 / STEPS, 30_000 / STEPS
    return _published(size, 4096, begin, end, vocabulary=32_000, batch=512, steps=steps, ema=None)


def gpu() -> RunConfig:
    """The 0.5B layout on the standard library's bytes, for one GPU: minutes, not days."""
    config = _published("0.5B", 512, 0.1, 0.3, batch=32, steps=6000, warmup=200)
    return config.replace(preset="gpu", data={"kind": "stdlib", "context": 512})


def arms() -> dict[str, RunConfig]:
    """Equal experts, equal choices and equal steps in all arms of a modality."""
    layers = {
        "base": slot(8, 2, 64, reuse=1),
        "open": slot(8, 2, 64, psr=None),
        "psr": slot(8, 2, 64),
        "psr-all": slot(8, 2, 64, reuse=4),
    }
    words = {f"text-{name}": _text(part) for name, part in layers.items()}
    return {**words, **{f"image-{name}": _image(layers[name]) for name in ("base", "psr")}}


CLAIMS = (
    Claim("reuse beats experts of one layer", "held_out_loss", "text-psr", "text-base"),
    Claim("it takes the progressive opening", "held_out_loss", "text-psr", "text-open"),
    Claim("one pool for all layers is no better", "held_out_loss", "text-psr", "text-psr-all"),
    Claim(
        "the more layers share a pool, the more its busiest expert is loaded",
        "lbv_max",
        "text-psr",
        "text-psr-all",
    ),
    Claim("reuse beats experts of one layer (images)", "held_out_loss", "image-psr", "image-base"),
)
DEPARTURES = (
    "balance: the paper's form and weight were not at hand; Switch form per layer and over the "
    "pool, 0.01 each",
    "experts and routers start N(0, 0.02) like all else; how the paper's did is not known",
    "groups are r consecutive layers, as the text says; the printed index set is no partition",
    "closed experts are drawn for each layer and forward pass; the paper leaves the scope open",
    "7B-SE: 22 experts a layer (66 in a pool of three); the printed 64 would make 18.6B parameters "
    "at the printed widths",
    "7B-SE: opens in the same shares of training as 2.3B, the only schedule that is stated",
    "small runs open the pool from 10% to 30% of training; 2.3B did from 21% to 63%",
    "paper preset: a dictionary's bytes stand where the paper has 100B tokens of web text",
)
