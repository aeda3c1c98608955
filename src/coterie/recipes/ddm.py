"""DDM: experts that are whole denoisers, each trained alone on a cluster of the data."""

from __future__ import annotations

from typing import Any

from coterie.ensembles import MixtureConfig, Oracle
from coterie.ensembles.model import EnsembleModelConfig, MemberConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig
from coterie.runs.islands import IslandConfig, PartitionConfig
from coterie.runs.islands.assembly import router_of
from coterie.runs.islands.plan import shared_budget
from coterie.runs.origins.trained_model import PretrainedConfig
from coterie.solvers import GuidanceConfig
from coterie.train.objectives import DistillationConfig

PAPER = Paper(
    title="Decentralized Diffusion Models",
    authors="McAllister, David and Tancik, Matthew and Song, Jiaming and Kanazawa, Angjoo",
    year=2025,
    venue="CVPR 2025",
    arxiv="2501.05450",
    key="mcallister2025decentralized",
    url="https://decentralizeddiffusion.github.io",
)
SUMMARY = "Whole denoisers trained alone on clusters of the data, joined by a router on x_t."

ISLANDS = 4
STEPS = 500  # of the monolith, batch 64; each island has a quarter of its batch


def tiny() -> RunConfig:
    """What one model on all the data would be, without labels: ``coterie island plan ddm`` cuts
    it."""
    return unconditional(image_tiny("ddm", steps=STEPS))


def unconditional(run: RunConfig) -> RunConfig:
    model = run.model.replace(backbone=run.model.backbone.replace(num_classes=0))
    return run.replace(model=model, sample=run.sample.replace(guidance=GuidanceConfig()))


def paper() -> RunConfig:
    """DiT-XL/2 on ImageNet latents: ``coterie island plan ddm --preset paper --islands 8``."""
    return image_paper("ddm", image_trunk("XL"))


def gpu() -> RunConfig:
    """A wider model, more steps: islands and monolith in minutes each on one GPU."""
    trunk: dict[str, Any] = {"width": 256, "depth": 8}
    run = unconditional(image_tiny("ddm", steps=4000, trunk=trunk, batch=256, lr=1e-3))
    return run.replace(preset="gpu")


def cut(by: str) -> IslandConfig:
    return IslandConfig(
        data=tiny().data, partition=PartitionConfig.from_dict({"islands": ISLANDS, "by": by})
    )


def islands(by: str) -> dict[str, RunConfig]:
    """An arm for each island and one for the router, at the monolith's total of samples."""
    data, share = cut(by), shared_budget(tiny(), ISLANDS, "batch")
    arms = {
        f"{by}-{index}": share.replace(data=data.replace(index=index)) for index in range(ISLANDS)
    }
    router = router_of(tiny(), data, ISLANDS)
    short = router.replace(train=router.train.replace(steps=STEPS // 2))
    return {**arms, f"{by}-router": short}


def joined(by: str, choice: Any) -> EnsembleModelConfig:
    """The islands as one model. The prior is the router's own: it saw the data as they are."""
    members = tuple(
        MemberConfig(name=f"island-{index}", model=PretrainedConfig(path=f"arm:{by}-{index}"))
        for index in range(ISLANDS)
    )
    return EnsembleModelConfig(
        ensemble=MixtureConfig.from_dict({"choice": choice}),
        members=members,
        router=PretrainedConfig(path=f"arm:{by}-router"),
    )


def together(by: str, choice: Any) -> RunConfig:
    base = tiny()
    train = base.train.replace(steps=0)
    return base.replace(data=cut(by), model=joined(by, choice), train=train)


def arms() -> dict[str, RunConfig]:
    """One model, and islands by clusters of features or at random, each trained alone; ``top-1``,
    ``full``, ``sampled`` and ``random`` ask them; ``student`` is dense."""
    base = tiny().replace(data=cut("features"))
    teacher = joined("features", Oracle())
    denoising = base.objective
    shared = {name: getattr(denoising, name) for name in ("times", "weighting", "label_dropout")}
    return {
        "monolith": base,
        **islands("features"),
        **islands("random"),
        "top-1": together("features", {"kind": "top_k", "k": 1}),
        "full": together("features", "dense"),
        "sampled": together("features", "sampled"),
        "random": together("random", {"kind": "top_k", "k": 1}),
        "student": base.replace(objective=DistillationConfig(teacher=teacher, **shared)),
    }


CLAIMS = (
    Claim(
        "islands asked one at a time sample better than one model of equal total samples",
        "frechet",
        "top-1",
        "monolith",
    ),
    Claim("all islands weighted by the posterior do too", "frechet", "full", "monolith"),
    Claim(
        "the exact ensemble denoises held-out data better than one model",
        "held_out_loss",
        "full",
        "monolith",
    ),
    Claim("clusters of features beat a split at random", "frechet", "top-1", "random"),
    Claim("one island suffices (Frechet distance)", "frechet", "top-1", "full"),
    Claim("drawing the island at each step is worse", "frechet", "top-1", "sampled"),
    Claim(
        "a dense student of the islands is close to them (within 10 %)",
        "frechet",
        "student",
        "top-1",
        tolerance=0.1,
    ),
    Claim(
        "top-1 keeps the clusters' shares (total variation under 0.1)",
        "island_distance",
        "top-1",
        target=0.1,
    ),
)
DEPARTURES = (
    "clusters are those of a small classifier's features (it learnt from labels), not of DINOv2",
    "the router is the encoder of the model at half its depth, trained for half the steps, on top "
    "of the islands' samples: a quarter of the monolith's cost here, 4 % in the paper",
    "no labels: the experts of digits would be told by them what the clusters tell",
    "digits of 28 x 28 instead of ImageNet latents; the student trains as long as the monolith",
    "paper preset: latents are read from a folder",
)
