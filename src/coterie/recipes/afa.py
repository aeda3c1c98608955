"""AFA: fine-tunes of one model, fused feature by feature with weights per pixel and layer."""

from __future__ import annotations

from typing import Any

from coterie.core.registry import Part
from coterie.ensembles import AggregateConfig, EnsembleModelConfig, MemberConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_trunk, unet_tiny
from coterie.runs.config import RunConfig
from coterie.runs.origins.first_weights import InitConfig
from coterie.runs.origins.trained_model import PretrainedConfig, WeightAverageConfig
from coterie.solvers import GuidanceConfig

PAPER = Paper(
    title="Ensembling Diffusion Models via Adaptive Feature Aggregation",
    authors="Wang, Cong and Tian, Kuan and Guan, Yonghang and Shen, Fei and others",
    year=2024,
    venue="ICLR 2025",
    arxiv="2405.17082",
    key="wang2024ensembling",
    url="https://github.com/Tenvence/afa",
)
SUMMARY = "Fine-tunes of one model run in lockstep; aggregators fuse their features per pixel."

DIGITS = {"kind": "digits"}
HALVES = {half: {"kind": "covered", "data": DIGITS, "keep": half} for half in ("left", "right")}
"""Experts of a half of every picture, which saw noise in place of the other: weights must differ
by place."""
GROUPS = {
    name: {"kind": "classes", "data": DIGITS, "classes": classes}
    for name, classes in {"low": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}.items()
}
"""Experts of some digits, all useful for every one."""
SETS = {"halves": tuple(HALVES), "groups": tuple(GROUPS)}
SIZES = {"width": 16, "layers": 1, "heads": 2, "groups": 4}
BASE, TUNED, FUSED = 300, 100, 80  # steps of batch 64
STEPS = 12  # of the solver


def base() -> RunConfig:
    """A U-Net of 165 thousand parameters on whole 8 x 8 digits."""
    sizes = {"image_size": 8, "widths": (16, 32)}
    run = unet_tiny("afa", sizes=sizes, steps=BASE, batch=64)
    sample = {"solver": "euler", "steps": STEPS, "guidance": GuidanceConfig(weight=1.0)}
    return run.replace(data=DIGITS, sample=run.sample.replace(**sample))


def tuned(data: dict[str, Any]) -> RunConfig:
    """The base, trained further on other data."""
    run = base()
    train = run.train.replace(steps=TUNED, lr=1e-3)
    return run.replace(data=data, train=train, init=InitConfig(path="arm:base"))


def made_of(model: Part, steps: int = 0) -> RunConfig:
    """On whole pictures of all digits: something made of what experts have learnt."""
    run = base()
    return run.replace(model=model, train=run.train.replace(steps=steps, warmup=20))


def alone(arm: str) -> RunConfig:
    return made_of(PretrainedConfig(path=f"arm:{arm}"))


def fused(experts: tuple[str, ...], steps: int = 0, **changes: Any) -> RunConfig:
    """``steps`` 0: plain means."""
    members = tuple(
        MemberConfig(name=name, model=PretrainedConfig(path=f"arm:{name}")) for name in experts
    )
    gate = "spatial" if steps else "uniform"
    config = AggregateConfig.from_dict({"aggregator": SIZES, "gate": gate, **changes})
    return made_of(EnsembleModelConfig(ensemble=config, members=members), steps)


def tiny() -> RunConfig:
    """What experts are tuned from: docs/how-to/aggregate.md goes on from here."""
    return base()


def paper() -> RunConfig:
    """The base of DiT-XL/2 on ImageNet latents; then ``coterie aggregate`` on its fine-tunes with
    --train.steps=12500 --train.batch=8 --train.lr=1e-4 --train.weight_decay=0.01."""
    return image_paper("afa", image_trunk("XL"))


def gpu() -> RunConfig:
    """A U-Net of 28 x 28 digits, wide enough for aggregators of the published sizes."""
    run = unet_tiny("afa", sizes={"widths": (64, 128, 128)}, steps=4000, batch=256, lr=5e-4)
    return run.replace(preset="gpu")


def arms() -> dict[str, RunConfig]:
    """Two sets of experts, and what is made of each; the base is their common origin."""
    out = {"base": base(), "base-alone": alone("base")}
    out |= {name: tuned(data) for name, data in (HALVES | GROUPS).items()}
    for name, experts in SETS.items():
        out |= {f"{expert}-alone": alone(expert) for expert in experts}
        weights = WeightAverageConfig(paths=tuple(f"arm:{expert}" for expert in experts))
        out[f"{name}-weights"] = made_of(weights)
        out[f"{name}-afa"] = fused(experts, FUSED)
        out[f"{name}-answers"] = fused(experts, FUSED, points=())
    halves = SETS["halves"]
    twice = out["left-alone"]
    return out | {
        "left-twice": twice.replace(sample=twice.sample.replace(steps=len(halves) * STEPS)),
        "left-wrapped": fused(halves[:1]),
        "halves-outputs": fused(halves, points=()),
        "halves-step": fused(halves, FUSED, gate="step"),
    }


WHAT = {
    **{f"{name}-alone": f"the expert {name!r}" for name in (*HALVES, *GROUPS)},
    **{f"{name}-weights": "the mean of the experts' weights" for name in SETS},
    **{f"{name}-answers": "weights per pixel of the answers alone" for name in SETS},
    "halves-outputs": "the mean of the experts' answers",
    "halves-step": "one weight per expert, layer and noise level",
    "base-alone": "the model the experts were tuned from",
}
HALVED = ("left-alone", "right-alone", *(arm for arm in WHAT if arm.startswith("halves-")))
GROUPED = ("low-alone", "high-alone", "groups-weights", "groups-answers", "base-alone")
PAIRS = [("halves-afa", arm) for arm in HALVED] + [("groups-afa", arm) for arm in GROUPED]
LOSS = "held_out_loss"
CLAIMS = (
    *(Claim(f"{a}: less held-out loss than {WHAT[b]}", LOSS, a, b) for a, b in PAIRS),
    *(Claim(f"{a}: nearer samples than {WHAT[b]} (Frechet)", "frechet", a, b) for a, b in PAIRS),
    Claim(
        "nearer samples than an expert of as many network calls, in twice the steps (Frechet)",
        "frechet",
        "halves-afa",
        "left-twice",
        equal="calls",
    ),
    Claim("the wrapper alone changes nothing", LOSS, "left-wrapped", "left-alone", tolerance=1e-5),
)
DEPARTURES = (
    "experts of 8 x 8 digits: halves of a picture, or five of ten classes; the paper fuses three "
    "Stable Diffusion fine-tunes of photographs, and has prompts in the place of labels",
    "two experts; aggregators of 16 channels, one transformer layer and 2 heads (published: three; "
    "128, 2, 8), 80 steps of batch 64 at 2e-3; they attend to the label as one token",
    "rectified flow in the tiny preset; judged by held-out loss and Frechet distance, not by "
    "ImageReward",
    "the condition is dropped for each sample by itself, not for a batch at a time",
)
