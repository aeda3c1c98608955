"""Noise-range experts: denoisers that each answer for a range of noise levels (eDiff-I)."""

from __future__ import annotations

from typing import Any

from coterie.ensembles import EnsembleModelConfig, MemberConfig, NoiseRangesConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig
from coterie.runs.origins.first_weights import InitConfig
from coterie.runs.origins.trained_model import PretrainedConfig

PAPER = Paper(
    title="eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers",
    authors="Balaji, Yogesh and Nah, Seungjun and Huang, Xun and Vahdat, Arash and others",
    year=2022,
    venue="arXiv",
    arxiv="2211.01324",
    key="balaji2022ediffi",
    url="https://research.nvidia.com/labs/dir/eDiff-I",
)
SUMMARY = "One base denoiser, then experts of noise ranges trained on from it; one runs at a time."

STEPS = 400  # of the base, and again of what goes on from it
QUARTERS = (0.6625, 0.5, 0.3375)
"""Boundaries in t, from noisy to clean, between which a quarter of the training times lie each."""


def tiny() -> RunConfig:
    """The base: ``coterie train noise-ranges``; docs/how-to/islands.md goes on from there."""
    return image_tiny("noise-ranges", steps=STEPS)


def paper() -> RunConfig:
    return image_paper("noise-ranges", image_trunk("XL"))


def gpu() -> RunConfig:
    trunk: dict[str, Any] = {"width": 256, "depth": 8}
    run = image_tiny("noise-ranges", steps=4000, trunk=trunk, batch=256, lr=1e-3)
    return run.replace(preset="gpu")


def expert(boundaries: tuple[float, ...], index: int, first: str | None, steps: int) -> RunConfig:
    """The expert of range ``index`` (0 = noisiest), with its share of the monolith's batch; from
    the weights of arm ``first``, or from nothing."""
    edges = (None, *boundaries, None)
    run = tiny()
    within = {"kind": "within", "times": run.objective.times}
    times = {**within, "high": edges[index], "low": edges[index + 1]}
    batch = run.train.batch // (len(boundaries) + 1)
    return run.replace(
        objective=run.objective.replace(times=times),
        train=run.train.replace(batch=batch, steps=steps),
        init=None if first is None else InitConfig(path=first),
    )


def joined(name: str, boundaries: tuple[float, ...]) -> RunConfig:
    """Experts ``name-0`` ... as one denoiser."""
    members = tuple(
        MemberConfig(name=f"range-{index}", model=PretrainedConfig(path=f"arm:{name}-{index}"))
        for index in range(len(boundaries) + 1)
    )
    run = tiny()
    return run.replace(
        model=EnsembleModelConfig(
            ensemble=NoiseRangesConfig(boundaries=boundaries), members=members
        ),
        train=run.train.replace(steps=0),
    )


def arms() -> dict[str, RunConfig]:
    """``monolith`` goes on from ``base`` as the experts do; ``alone`` starts from nothing and sees
    what base and experts see together."""
    half, base = QUARTERS[1:2], "arm:base"
    parts = {
        **{f"pair-{i}": expert(half, i, base, STEPS) for i in range(2)},
        **{f"four-{i}": expert(QUARTERS, i, base, STEPS) for i in range(4)},
        **{f"alone-{i}": expert(half, i, None, 2 * STEPS) for i in range(2)},
    }
    return {
        "base": tiny(),
        "monolith": tiny().replace(init=InitConfig(path=base)),
        **parts,
        "pair": joined("pair", half),
        "four": joined("four", QUARTERS),
        "alone": joined("alone", half),
    }


CLAIMS = (
    Claim(
        "two experts of noise ranges denoise better than one model trained on as long",
        "held_out_loss",
        "pair",
        "monolith",
    ),
    Claim("and sample better", "frechet", "pair", "monolith"),
    Claim(
        "at the cost of one model per step (active parameters)",
        "active_parameters",
        "pair",
        "monolith",
        tolerance=0.001,
    ),
    Claim("four ranges denoise better than two", "held_out_loss", "four", "pair"),
    Claim(
        "a base shared first beats experts trained alone from nothing",
        "held_out_loss",
        "pair",
        "alone",
    ),
)
DEPARTURES = (
    "ranges are halves and quarters of the training times; eDiff-I grows a binary tree of which "
    "it keeps the noisiest and the cleanest leaf and one expert for all between",
    "experts and monolith see equal totals of samples: an expert's batch is its range's share",
    "digits by class, no text; paper preset: the size of DiT-XL/2 on latents from a folder",
)
