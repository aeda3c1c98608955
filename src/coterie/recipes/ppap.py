"""PPAP: off-the-shelf networks as guides, each frozen, with a small expert per noise range."""

from __future__ import annotations

from typing import Any

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.registry import Part
from coterie.guides import GuideConfig, ReaderConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_tiny
from coterie.runs.config import RunConfig
from coterie.runs.origins.synthetic_data import GeneratedConfig
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.solvers import GuidanceConfig
from coterie.solvers.network_guidance import GuidedConfig
from coterie.train.objectives import RecognitionConfig

PAPER = Paper(
    title="Towards Practical Plug-and-Play Diffusion Models",
    authors="Go, Hyojun and Lee, Yunsung and Kim, Jin-Young and Lee, Seunghyun and others",
    year=2023,
    venue="CVPR 2023",
    arxiv="2212.05973",
    key="go2023practical",
    url="https://github.com/riiid/PPAP",
)
SUMMARY = "A frozen network guides samples by small experts of noise ranges, learnt without labels."

STEPS, RANGES, SCALE = 800, 5, 4.0
SWEEP = (1.0, 2.0, 8.0)
DDPM: dict[str, Any] = {"kind": "ddpm"}


def denoiser() -> RunConfig:
    """8 x 8 digits without labels: 16 tokens of 2 x 2 pixels, width 64, 3 blocks."""
    run, trunk = image_tiny("ppap", steps=600), TrunkConfig(width=64, depth=3, heads=4)
    backbone = DiTConfig(image_size=8, patch=2, num_classes=0, trunk=trunk)
    sample = {"solver": "ddim", "steps": 20, "threshold": {}, "guidance": GuidanceConfig()}
    return run.replace(
        data={"kind": "digits"},
        model=run.model.replace(backbone=backbone, process=DDPM, view="v"),
        objective={"kind": "denoising", "label_dropout": 0.0},
        sample=run.sample.replace(**sample),
    )


def reader(task: str = "classes") -> RunConfig:
    """The off-the-shelf network: clean pictures only."""
    run, width = denoiser(), 32 if task == "classes" else 16
    return run.replace(
        model=ReaderConfig(task=task, image_size=8, width=width),
        objective=RecognitionConfig(),
        train=run.train.replace(steps=300, ema=(), weight_decay=0.05),
    )


def guide(network: str, adapt: str, ranges: int, data: str = "", steps: int = STEPS) -> RunConfig:
    """Experts for ``network``: from samples of the run ``data`` and the network's own answers, or
    ("") from labelled digits. The learning rate falls to 0 for each."""
    run, part = denoiser(), PretrainedConfig(path=network)
    schedule = {"kind": "repeated", "schedule": "linear", "times": ranges}
    train = {"steps": steps, "batch": 32, "ema": (), "weight_decay": 0.05, "warmup": 0}
    told = "teacher" if data else "data"
    return run.replace(
        data=GeneratedConfig(path=data) if data else run.data,
        model=GuideConfig(network=part, process=DDPM, ranges=ranges, adapt=adapt),
        objective=RecognitionConfig(learn_from=told, times="uniform"),
        train=run.train.replace(**train, schedule=schedule),
    )


def guided(by: Part, scale: float = SCALE) -> RunConfig:
    run = denoiser()
    model = GuidedConfig(denoiser=PretrainedConfig(path="arm:denoiser"), guide=by, scale=scale)
    return run.replace(model=model, train=run.train.replace(steps=0))


def tiny() -> RunConfig:
    """The denoiser; ``coterie guide`` goes on from there (docs/how-to/guides.md)."""
    return denoiser()


def paper() -> RunConfig:
    """Experts of rank 16 for a classifier of ImageNet, on samples of an unconditional denoiser."""
    run = guide("runs/classifier", "lora", RANGES, "runs/denoiser", steps=300_000)
    return run.replace(
        preset="paper",
        data=run.data.replace(count=500_000, steps=25),
        model=run.model.replace(rank=16, alpha=8.0),
        train=run.train.replace(batch=256, lr=1e-4, checkpoint_every=5_000),
    )


def arms() -> dict[str, RunConfig]:
    """Guides of equal steps in all; then the same denoiser guided by each, at several scales."""
    clean, data, half = "arm:reader", "arm:denoiser", STEPS // 2
    parts = {
        "experts-guide": guide(clean, "lora", RANGES, data),
        "single-guide": guide(clean, "lora", 1, data),
        "labelled-guide": guide(clean, "full", 1),
        "labelled-experts-guide": guide(clean, "full", RANGES),
        "map-guide": guide("arm:map-reader", "lora", RANGES, data, half),
    }
    by: dict[str, Part] = {
        n.removesuffix("-guide"): PretrainedConfig(path=f"arm:{n}") for n in parts
    }
    for prefix in ("", "map-"):
        network = PretrainedConfig(path=f"arm:{prefix}reader")
        none = GuideConfig(network=network, process=DDPM, ranges=1, adapt="none")
        by[f"{prefix}{OFF}"] = none
    swept = {
        f"{name}-{scale:g}": guided(by[name], scale) for scale in SWEEP for name in (OURS, OFF)
    }
    made = {"denoiser": denoiser(), "reader": reader(), "map-reader": reader("map")}
    return made | parts | {name: guided(part) for name, part in by.items()} | swept


OURS, OFF, SEEN, MAP = "experts", "off-the-shelf", "label_accuracy", "map"
MORE = {
    OFF: "shows the class asked for more often than the network as it is",
    "single": "more often than one adapter for all noise levels",
    "labelled": "more often than one network trained on noise with labels",
}
PAIRS = {f"{OURS}-{s:g}": f"{OFF}-{s:g}" for s in SWEEP}
LABELLED = "labelled-experts"
CLAIMS = (
    *(Claim(text, SEEN, OURS, arm, better="higher") for arm, text in MORE.items()),
    *(Claim(f"{a}: likewise", SEEN, a, b, better="higher") for a, b in PAIRS.items()),
    Claim("makes better pictures than the network as it is", "frechet", OURS, OFF),
    Claim("is closer to the clean answers than one adapter", "guide_loss", OURS, "single"),
    Claim("labelled networks of ranges do better", SEEN, LABELLED, OURS, better="higher"),
    Claim("with a tenth of their trained numbers", "guide_parameters", OURS, LABELLED, factor=0.1),
    Claim("guided by maps, pictures are better too", "frechet", MAP, f"{MAP}-{OFF}"),
    Claim("and follow the map more closely", "target_error", MAP, f"{MAP}-{OFF}"),
)
DEPARTURES = (
    "8 x 8 digits and a denoiser of 0.25 million parameters instead of ADM on ImageNet and GLIDE",
    "networks trained here on clean digits: a classifier, and a regressor of ink for that of depth",
    "800 steps of batch 32 in all (map: 400), an equal part for each range; paper: 300,000 of 256",
    "an expert starts with the weights of the one before, and with a fresh optimiser state",
    "no random flip of the generated pictures: digits have a right way round",
    "a module with fewer channels than the rank gets the lower rank (the first convolution)",
    "samples are judged by a classifier of its own, never by the guide",
)
