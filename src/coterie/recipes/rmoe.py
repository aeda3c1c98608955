"""RMoE: routers share a recurrent cell over layers, so each knows how a token was routed before."""

from __future__ import annotations

from typing import Any, Literal

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig, SharedConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny, text_paper, text_tiny
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Layerwise Recurrent Router for Mixture-of-Experts",
    authors="Qiu, Zihan and Huang, Zeyu and Cheng, Shuang and Zhou, Yizhi and Wang, Zili and "
    "Titov, Ivan and Fu, Jie",
    year=2025,
    venue="ICLR 2025",
    arxiv="2408.06793",
    key="qiu2025rmoe",
    url="https://github.com/qiuzh20/RMoE",
)
SUMMARY = "A recurrent state of the router goes with each token from layer to layer."

STATE, MLP = 32, 46  # of the small runs: sizes that give routers equally many parameters


def slot(
    num_experts: int,
    k: int,
    hidden: int,
    router: Literal["gru", "rnn", "linear", "mlp"] = "gru",
    size: int = STATE,
    detach: bool = False,
    head: Literal["linear", "cosine"] = "linear",
    start: Literal["zeros", "time"] = "zeros",
    shared: int = 0,
    balance: float = 1e-3,
) -> SlotConfig:
    """Softmax over the logits of ``router``, top ``k`` gates that add up to 1, one balance loss
    over the rows of all layers.

    ``size``: of the state, or of the inner layer of an ``mlp``. ``shared``: inner size of a shared
    expert; routed and shared answers then weigh one half each.
    """
    memory = {"state": size, "detach": detach, "head": head, "start": start}
    scores: dict[str, dict[str, Any]] = {
        "linear": {"kind": "linear", "init_std": 0.02},
        "mlp": {"kind": "mlp", "hidden": size},
        "gru": {"kind": "recurrent", "cell": "gru", **memory},
        "rnn": {"kind": "recurrent", "cell": "rnn", **memory},
    }
    half = 0.5 if shared else 1.0
    loss = {"kind": "switch", "weight": balance, "pooled": True, "per_choice": False}
    expert = ExpertLayerConfig(
        num_experts=num_experts,
        experts={"kind": "swiglu", "hidden": hidden},
        router=RouterConfig(
            score=scores[router],
            select={"kind": "top_k", "k": k},
            weight="renorm",
            scale=half,
        ),
        shared=SharedConfig(hidden=shared, scale=half) if shared else None,
        balance=(loss,),
    )
    return SlotConfig(slot="ffn", expert=expert)


def _text(*slots: SlotConfig) -> RunConfig:
    sizes = {"width": 64, "depth": 6}
    return text_tiny("rmoe", *slots, steps=700, context=64, batch=8, trunk=sizes)


def _image(*slots: SlotConfig) -> RunConfig:
    return image_tiny("rmoe", *slots, steps=300)


def text() -> RunConfig:
    """Bytes of Python's help topics: 6 layers, top-2 of 8, a state of 32."""
    return _text(slot(8, 2, 64))


def tiny() -> RunConfig:
    """The same layers in a denoiser of digits; the state starts anew in each denoising step."""
    return _image(slot(8, 2, 64))


def _published(width: int, hidden: int, context: int, **train: Any) -> RunConfig:
    sizes = {"width": width, "depth": 24, "heads": 16}
    part = slot(16, 4, hidden, size=128)
    settings = {"lr": 3e-4, "schedule": {"kind": "cosine", "final": 0.1}, **train}
    return text_paper("rmoe", part, trunk=sizes, context=context, **settings)


def paper() -> RunConfig:
    """24 layers, 4 of 16 experts, a state of 128: 0.92B parameters."""
    return _published(1024, 640, 2048, vocabulary=32_000, batch=1120, steps=10_000, ema=None)


def gpu() -> RunConfig:
    """The published depth at half the width, on the standard library's bytes, for one GPU."""
    config = _published(512, 256, 512, batch=32, steps=6000, warmup=200)
    return config.replace(preset="gpu", data={"kind": "stdlib", "context": 512})


def arms() -> dict[str, RunConfig]:
    """Equal experts in all arms; ``mlp`` has the router parameters of ``gru``, without a state."""
    layers = {
        "gru": slot(8, 2, 64),
        "detached": slot(8, 2, 64, detach=True),
        "mlp": slot(8, 2, 64, "mlp", MLP),
        "linear": slot(8, 2, 64, "linear"),
    }
    words = {f"text-{name}": _text(part) for name, part in layers.items()}
    return {**words, **{f"image-{name}": _image(layers[name]) for name in ("gru", "linear")}}


CLAIMS = (
    Claim("a recurrent router beats a linear one", "held_out_loss", "text-gru", "text-linear"),
    Claim("router parameters alone do not explain it", "held_out_loss", "text-gru", "text-mlp"),
    Claim("the gradient through the state counts", "held_out_loss", "text-gru", "text-detached"),
    Claim(
        "a layer's choice says more about the next one's",
        "adjacent_bits",
        "text-gru",
        "text-linear",
        better="higher",
    ),
    Claim("experts grow less alike", "expert_similarity", "text-gru", "text-linear"),
    Claim(
        "a recurrent router beats a linear one (images)",
        "held_out_loss",
        "image-gru",
        "image-linear",
    ),
)
DEPARTURES = (
    "paper preset: 24 layers, 4 of 16 experts, a state of 128 and batches of 1120 are the names of "
    "the authors' checkpoints; width and expert size are recalled or ours, and 0.36B parameters "
    "are active where 0.24B are recalled",
    "paper preset: rate, schedule and length of training are ours; bytes of a dictionary",
    "the cell starts uniform in 1 / sqrt(state), as in PyTorch, maps and experts N(0, 0.02)",
    "the state passes blocks without experts unchanged; the released code leaves it undefined",
    "routers always run in float32; in the released code only the softmax does",
    "6 layers: in the authors' own figure of depths the gain is 0.001 bits there, 0.016 at 24",
    "images: the state starts anew in each denoising step (start=time: from the noise level)",
)
