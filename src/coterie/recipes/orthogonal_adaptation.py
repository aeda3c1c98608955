"""Orthogonal Adaptation: concepts learnt apart, in slots of a shared basis, are added up."""

from __future__ import annotations

from typing import Any

from coterie.adapters import AdapterConfig, BasisConfig, LoraConfig
from coterie.backbones import DiTConfig, TrunkConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig
from coterie.runs.origins.first_weights import InitConfig
from coterie.solvers import GuidanceConfig

PAPER = Paper(
    title="Orthogonal Adaptation for Modular Customization of Diffusion Models",
    authors="Po, Ryan and Yang, Guandao and Aberman, Kfir and Wetzstein, Gordon",
    year=2024,
    venue="CVPR 2024",
    arxiv="2312.02432",
    key="po2024orthogonal",
    url="https://ryanpo.com/ortha/",
)
SUMMARY = "Adapters of one concept each, trained apart in orthogonal bases and merged by summation."

BASE = (0, 1, 2, 3, 4, 5)  # digits that the base knows
CONCEPTS = (6, 7, 8, 9)  # digits that adapters teach, each one its own
RANK = 8
FEWER = 5  # rank at which a plain adapter trains as many numbers as an orthogonal one of RANK
STEPS = 150  # per concept


def some(*classes: int, count: int | None = None) -> dict[str, Any]:
    return {"kind": "classes", "data": {"kind": "digits"}, "classes": classes, "count": count}


def base() -> RunConfig:
    """8 x 8 digits, 16 tokens of 2 x 2 pixels, width 64, 3 blocks; 0 to 5 only."""
    run = image_tiny("orthogonal-adaptation", steps=600)
    backbone = DiTConfig(image_size=8, patch=2, trunk=TrunkConfig(width=64, depth=3, heads=4))
    sample = {"solver": "euler", "steps": 12, "guidance": GuidanceConfig(weight=1.0)}
    return run.replace(
        data=some(*BASE),
        model=run.model.replace(backbone=backbone),
        sample=run.sample.replace(**sample),
    )


def lora(rank: int, basis: BasisConfig | None, *rows: int) -> LoraConfig:
    """All linear maps of the trunk, and the embeddings of the new concepts' labels."""
    trunk, labels = ("backbone.trunk.blocks.*",), ("backbone.label.table",)
    return LoraConfig(targets=trunk, rank=rank, basis=basis, embeddings=labels, rows=rows)


def taught(path: str, adapter: LoraConfig, data: dict[str, Any], steps: int) -> RunConfig:
    """One adapter on the base at ``path``."""
    run = base()
    new = AdapterConfig(name="concept", lora=adapter)
    train = run.train.replace(steps=steps, ema=(0.95,))
    return run.replace(data=data, train=train, init=InitConfig(path=path, adapters=(new,)))


def together(*arms: str, weight: float = 1.0, asked: tuple[int, ...] = CONCEPTS) -> RunConfig:
    """The sum of what these arms have learnt, asked for its concepts; nothing is trained."""
    run = base()
    adapters = tuple(AdapterConfig(name=a, path=f"arm:{a}", weight=weight) for a in arms)
    init = InitConfig(path="arm:base", adapters=adapters)
    return run.replace(data=some(*asked), train=run.train.replace(steps=0), init=init)


def tiny() -> RunConfig:
    """The first concept, on a base trained on other digits (docs/how-to/adapters.md says how)."""
    adapter = lora(RANK, BasisConfig(index=0), CONCEPTS[0])
    return taught("runs/base", adapter, some(CONCEPTS[0], count=40), STEPS)


def paper() -> RunConfig:
    """One concept of twenty pictures, rank 20, on a trained DiT-XL/2."""
    run = image_paper("orthogonal-adaptation", image_trunk("XL"), train={"steps": 1000, "batch": 4})
    new = AdapterConfig(name="concept", lora=lora(20, BasisConfig(index=0), 0))
    latents = {"kind": "latents", "path": "imagenet-latents"}
    data = {"kind": "classes", "data": latents, "classes": (0,), "count": 20}
    return run.replace(data=data, init=InitConfig(path="runs/dit-xl", adapters=(new,)))


def gpu() -> RunConfig:
    """The first concept of CIFAR-10, rank 20, on a DiT-S trained on other classes."""
    sizes = {"width": 384, "depth": 12, "heads": 6}
    run = image_tiny("orthogonal-adaptation", steps=2000, trunk=sizes).replace(preset="gpu")
    backbone = run.model.backbone.replace(image_size=32, channels=3, patch=2)
    new = AdapterConfig(name="concept", lora=lora(20, BasisConfig(index=0), CONCEPTS[0]))
    data = {"kind": "classes", "data": {"kind": "cifar10"}, "classes": CONCEPTS[:1]}
    init = InitConfig(path="runs/base-cifar", adapters=(new,))
    return run.replace(data=data, model=run.model.replace(backbone=backbone), init=init)


def arms() -> dict[str, RunConfig]:
    """Adapters of each kind for each concept, and for each kind their sum."""
    kinds = {"orthogonal": RANK, "plain": RANK, "fewer": FEWER}
    out = {"base": base()}
    for kind, rank in kinds.items():
        for index, concept in enumerate(CONCEPTS):
            basis = BasisConfig(index=index) if kind == "orthogonal" else None
            data = some(concept, count=40)
            out[f"{kind}-{concept}"] = taught("arm:base", lora(rank, basis, concept), data, STEPS)
        out[kind] = together(*[f"{kind}-{concept}" for concept in CONCEPTS])
    for kind in ("orthogonal", "plain"):
        first = [f"{kind}-{concept}" for concept in CONCEPTS[:2]]
        out[f"{kind}-two"] = together(*first, asked=CONCEPTS[:2])
    joint, steps = some(*CONCEPTS, count=40), len(CONCEPTS) * STEPS
    out["joint-training"] = taught("arm:base", lora(RANK, None, *CONCEPTS), joint, steps)
    plain = [f"plain-{concept}" for concept in CONCEPTS]
    average = together(*plain, weight=1 / len(plain))
    return out | {"average": average, "joint": together("joint-training")}


OURS, SHOWN = "orthogonal", "label_accuracy"
LESS = {
    "crosstalk": "less crosstalk in the modules than plain adapters of equal rank",
    "adapter_drift": "the others move the prediction of a concept less, equal rank",
    "held_out_loss": "a lower held-out loss of the sum on the concepts, equal rank",
    "frechet": "samples of the sum closer to the concepts' pictures, equal rank",
}
MORE = {
    "plain": "the sum shows the concept asked for more often than that of plain ones, equal rank",
    "fewer": "more often than that of plain ones with as many trained parameters",
    "average": "more often than federated averaging of plain ones",
}
CLAIMS = (
    Claim("updates in slots of one basis do not overlap", "update_overlap", OURS, target=1e-5),
    *(Claim(text, metric, OURS, "plain") for metric, text in LESS.items()),
    *(Claim(text, SHOWN, OURS, arm, better="higher") for arm, text in MORE.items()),
    Claim("two concepts likewise", SHOWN, f"{OURS}-two", "plain-two", better="higher"),
    Claim("joint training is the upper bound", SHOWN, "joint", OURS, better="higher"),
)
DEPARTURES = (
    "a class-conditional DiT on 8 x 8 digits instead of Stable Diffusion: a concept is a digit the "
    "base has not seen, its token a row of the label table; there is no text encoder to adapt",
    "every linear map of the trunk is adapted, its modulation included",
    "40 pictures and 150 steps of AdamW at 2e-3 per concept; rank 20 in the preset paper only",
    "federated averaging and joint training stand for the paper's baselines; gradient fusion "
    "(Mix-of-Show) is not among them",
    "concepts are asked for one at a time; the paper's several per picture need regional prompts",
)
