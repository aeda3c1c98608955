"""Chain-of-Experts: one pool passed several times within a layer, each round routed anew."""

from __future__ import annotations

from typing import Literal

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig, SharedConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny, text_paper, text_tiny
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Chain-of-Experts: Unlocking the Communication Power of Mixture-of-Experts Models",
    authors="Wang, Zihan and Pan, Rui and Yao, Jiarui and others",
    year=2025,
    venue="arXiv preprint",
    arxiv="2506.18945",
    key="wang2025coe",
    url="https://github.com/ZihanWang314/CoE",
)
SUMMARY = "Experts read what experts wrote: rounds over one pool, a router of its own each."


def slot(
    num_experts: int = 64,
    k: int = 4,
    rounds: int = 2,
    hidden: int = 704,
    shared: int = 1,
    routing: Literal["own", "shared", "frozen"] = "own",
    inner: bool = True,
    outer: Literal["delta", "add", "replace"] = "delta",
    norm: bool = False,
    balance: float = 1e-3,
) -> SlotConfig:
    """``num_experts`` counts the ``shared`` ones too, as the paper does; k routed ones a round.

    ``inner``: the residual within a round. ``outer``: what becomes of the stream s when x_0 =
    norm(s) ends as x_C: ``delta`` s + x_C - x_0, ``add`` s + x_C, ``replace`` x_C.
    """
    expert = ExpertLayerConfig(
        num_experts=num_experts - shared,
        experts={"kind": "swiglu", "hidden": hidden},
        router=RouterConfig(select={"kind": "top_k", "k": k}),
        shared=SharedConfig(hidden=hidden, count=shared) if shared else None,
        rounds=rounds,
        round_routing=routing,
        inner_residual=inner,
        inner_norm=norm,
        answer="delta" if outer == "delta" else "output",
        balance=({"kind": "switch", "weight": balance, "statistics": "sequence"},),
    )
    return SlotConfig(slot="ffn", expert=expert, residual=outer != "replace")


def _text(part: SlotConfig) -> RunConfig:
    """Lines like ``2+3*4=14`` (modulo 17, numbers to 4) in a network of two layers."""
    return text_tiny(
        "chain-of-experts",
        part,
        data={"kind": "arithmetic", "largest": 4},
        trunk={"width": 64, "depth": 2},
        context=64,
        steps=550,
    )


def _image(part: SlotConfig) -> RunConfig:
    return image_tiny("chain-of-experts", part, steps=300)


def text() -> RunConfig:
    return _text(slot(32, 4, 2, 32))


def tiny() -> RunConfig:
    """The same layer in a denoiser of digits."""
    return _image(slot(16, 2, 2, 32))


def _published(steps: int, vocabulary: int) -> RunConfig:
    return text_paper(
        "chain-of-experts",
        slot(),
        trunk={"depth": 4, "width": 1024, "heads": 8},
        context=512,
        vocabulary=vocabulary,
        steps=steps,
        batch=64,
        lr=3e-4,
        weight_decay=0.01,
        schedule="linear",
        warmup=steps // 10,
    )


def paper() -> RunConfig:
    """63 routed experts and a shared one in all 4 layers, 4 of them in each of 2 rounds."""
    return _published(10_000, 102_400)


def gpu() -> RunConfig:
    """The published layout on the standard library's bytes: minutes on one GPU."""
    data = {"kind": "stdlib", "context": 512}
    return _published(1000, 260).replace(preset="gpu", data=data)


def arms() -> dict[str, RunConfig]:
    """Equal routed multiply-adds in all arms of a modality: 8 of 31 (text), 4 of 15 (images)."""
    layers = {
        "moe": slot(32, 8, 1, 32),
        "coe": slot(32, 4, 2, 32),
        "coe-24": slot(24, 4, 2, 32),
        "shared-gate": slot(32, 4, 2, 32, routing="shared"),
        "outer-residual": slot(32, 4, 2, 32, inner=False, outer="add"),
    }
    words = {f"text-{name}": _text(part) for name, part in layers.items()}
    return {**words, "image-coe": tiny(), "image-moe": _image(slot(16, 4, 1, 32))}


LOSS, OURS, PLAIN = "held_out_loss", "text-coe", "text-moe"
CLAIMS = (
    Claim("two rounds of 4 experts beat one of 8 at equal routed compute", LOSS, OURS, PLAIN),
    Claim("the same for answers, which need composition", "answer_loss", OURS, PLAIN),
    Claim("routers of their own beat one for both rounds", LOSS, OURS, "text-shared-gate"),
    Claim("the residual belongs inside the rounds", LOSS, OURS, "text-outer-residual"),
    Claim(
        "24 experts in two rounds are no worse than 32 in one (1%)",
        LOSS,
        "text-coe-24",
        PLAIN,
        tolerance=0.01,
    ),
)
DEPARTURES = (
    "the layer adds x_C - x_0 to the stream, so that one round is the ordinary block; in the "
    "released code x_C replaces the stream (outer=replace)",
    "outer-residual arm: without the residual inside, as the text says; the released script "
    "keeps it (outer=add, inner=true)",
    "a shared expert runs in every round and the budget counts routed experts only, as published: "
    "9 expert passes in one round, 10 in two",
    "text: numbers are 0..4, or no arm would learn to compute in these steps",
    "paper: ordinary attention instead of latent attention; the 544M without embeddings are "
    "units of 2^20 (571.0 million)",
    "paper: bytes of a dictionary stand where the paper has SlimPajama and MetaMathQA",
)
