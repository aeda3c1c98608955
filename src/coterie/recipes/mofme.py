"""MoFME: experts that only modulate one shared block, for rain, drops, snow and haze together."""

from __future__ import annotations

from typing import Any

from coterie.backbones import SlotConfig
from coterie.backbones.restorer import RESTORER_TRUNK, RestorerConfig
from coterie.core.config import override
from coterie.denoiser import DenoiserConfig
from coterie.experts import ExpertLayerConfig
from coterie.recipes.base import Claim, Paper
from coterie.runs.config import RunConfig
from coterie.train.config import TrainConfig
from coterie.train.objectives import RestorationConfig

PAPER = Paper(
    title="Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear "
    "Modulation",
    authors="Zhang, Rongyu and Luo, Yulin and Liu, Jiaming and others",
    year=2024,
    venue="AAAI 2024",
    arxiv="2312.16610",
    key="zhang2024mofme",
    url="https://github.com/RoyZry98/MoFME-Pytorch",
)
SCHEDULE: dict[str, Any] = {"schedule": {"kind": "cosine", "final": 0.005}, "clip": 1.0}
DROPOUT = 0.1
SUMMARY = "Feature-modulated experts and an uncertainty-aware router, for image restoration."


def slot(experts: str = "linear", sure: bool = True, paper: bool = False) -> SlotConfig:
    """``experts``: modulations by affine maps (``linear``) or by vectors (``vector``), or ``whole``
    feed-forward networks, the conventional mixture. ``sure``: the router weighs its scores by their
    steadiness under dropout. ``paper``: with its bias, exact GELU and dropout."""
    score: dict[str, Any] = {"kind": "linear", "bias": paper}
    if sure:
        score = {"kind": "uncertain", "passes": 5, "of": score}
    router = {"score": score, "select": "top_k", "when": "after"}
    gelu = "gelu" if paper else "gelu_tanh"
    layer: dict[str, Any] = {"experts": {"kind": "gelu_mlp", "ratio": 4.0, "activation": gelu}}
    if experts != "whole":
        layer = {"experts": {"kind": "modulation", "form": experts}, "stem": "star"}
        layer["adaptor"] = {"ratio": 4.0, "activation": gelu, "dropout": DROPOUT * paper}
    layer |= {"num_experts": 8, "router_reads": "stream", "router": router}
    return SlotConfig(expert=ExpertLayerConfig.from_dict(layer))


def tiny(*slots: SlotConfig) -> RunConfig:
    """Crops of 64 pixels, patches of 8, two blocks of width 96."""
    trunk = RESTORER_TRUNK.replace(width=96, heads=4, slots=slots or (slot(),))
    backbone = RestorerConfig(stem=8, tail=8, trunk=trunk)
    return RunConfig(
        recipe="mofme",
        preset="tiny",
        data={"kind": "weather", "count": 3000},
        model=DenoiserConfig(backbone=backbone, view="x0"),
        objective=RestorationConfig(beta=0.1),
        train=TrainConfig.from_dict(
            {**SCHEDULE, "steps": 240, "batch": 12, "lr": 1e-3, "ema": 0.99, "warmup": 30}
        ),
    )


def gpu() -> RunConfig:
    """The published network on crops of 96 pixels of the photographs: minutes on one GPU."""
    settings = {**SCHEDULE, "steps": 6_000, "batch": 64, "lr": 4e-4, "warmup": 200}
    return tiny().replace(
        preset="gpu",
        data={"kind": "weather", "size": 96, "count": 20_000},
        model=DenoiserConfig(backbone=published(96), view="x0"),
        train=TrainConfig.from_dict(settings),
    )


def published(image_size: int) -> RestorerConfig:
    """Width 384, two blocks, 8 heads of 64, 8 experts."""
    attention = {"head_width": 64, "qkv_bias": False, "dropout": DROPOUT, "norm_eps": 1e-5}
    trunk = RESTORER_TRUNK.replace(**attention, slots=(slot(paper=True),))
    return RestorerConfig(image_size=image_size, padding="zeros", trunk=trunk)


def paper() -> RunConfig:
    """Crops of 256 pixels of the 18,069 pairs of "Allweather", 200 epochs of batches of 64."""
    settings = {"steps": 56_500, "batch": 64, "lr": 2e-4, "warmup": 850, "clip": 10.0}
    return tiny().replace(
        preset="paper",
        data={"kind": "pairs-folder", "path": "allweather", "size": 256, "crops": 1},
        model=DenoiserConfig(backbone=published(256), view="x0"),
        objective=RestorationConfig(beta=2.0),  # 1 in units of [0, 1]
        train=TrainConfig.from_dict({**SCHEDULE, **settings}),
    )


def arms() -> dict[str, RunConfig]:
    """Equal data, steps and rate; the feed-forward half of both blocks differs."""
    slots = {
        "moe": slot("whole", sure=False),
        "plain-router": slot(sure=False),
        "mofme": slot(),
        "vectors": slot("vector"),
    }
    dense = override(tiny(), {"model.backbone.trunk.slots": []})
    return {"dense": dense, **{name: tiny(part) for name, part in slots.items()}}


def _better(text: str, baseline: str, tolerance: float = 0.0) -> Claim:
    return Claim(text, "psnr", "mofme", baseline, better="higher", tolerance=tolerance)


CLAIMS = (
    Claim(
        "at most 45 % of a conventional mixture's parameters in the feed-forward half",
        "slot_parameters",
        "mofme",
        "moe",
        factor=0.45,
    ),
    Claim(
        "less time per picture than that mixture when only its chosen experts run",
        "time_over_dense",
        "mofme",
        "moe",
    ),
    _better("restores no worse than it less 0.1 dB (0.5 %)", "moe", tolerance=0.005),
    _better("restores better than a dense network", "dense"),
    _better("weighing scores by their steadiness restores better than not", "plain-router"),
    _better("modulating by maps restores better than by vectors", "vectors"),
    Claim(
        "routers tell the weather of a picture, one of four",
        "router_accuracy",
        "mofme",
        target=0.25,
        better="higher",
    ),
)
DEPARTURES = (
    "the uncertainty-aware router is the one the paper describes (logits over their deviation "
    "under dropout); the released one averages deviations of identical passes, which is zero",
    "outside training one pass is divided by running deviations; the released code does not weigh",
    "slot i answers with expert i; the released lookup is one place off and leaves out the last",
    "no perceptual loss: the network it uses ships in no package",
    "rain, drops, snow and haze are synthetic, over real photographs; split by photograph",
    "gamma starts at 1: features pass at the start; other matrices by Xavier's rule, not torch's",
    "time: the mixture it is compared with runs chosen experts only, not all of them as published",
    "tiny: heads of width / heads, biases of queries, keys and values and none of the router, eps "
    "1e-6, reflected borders, GELU by tanh, no dropout but the router's",
    "the answer is a tanh on [-1, 1], the released one a sigmoid on [0, 1]: its last map is halved",
    "paper preset: the published data sets are read from a folder (docs/how-to/restoration.md)",
)
