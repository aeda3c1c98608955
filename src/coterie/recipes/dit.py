"""DiT: the dense diffusion transformer that every expert system here is measured against."""

from __future__ import annotations

from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Scalable Diffusion Models with Transformers",
    authors="Peebles, William and Xie, Saining",
    year=2023,
    venue="ICCV 2023",
    arxiv="2212.09748",
    key="peebles2023dit",
    url="https://github.com/facebookresearch/DiT",
)
SUMMARY = "Dense diffusion transformer with adaLN-zero: the baseline."


def tiny() -> RunConfig:
    return image_tiny("dit")


def paper(size: str = "XL") -> RunConfig:
    """DiT-XL/2: DDPM with linear betas and learned variance."""
    config = image_paper("dit", image_trunk(size), flow=False)
    linear = {"kind": "ddpm", "schedule": "linear"}
    return config.replace(model=config.model.replace(process=linear))


def arms() -> dict[str, RunConfig]:
    return {
        "dit": tiny(),
        "half-width": image_tiny("dit", trunk={"width": 32}),
        "half-depth": image_tiny("dit", trunk={"depth": 2}),
    }


CLAIMS = (
    Claim("a wider DiT has lower loss at equal steps", "held_out_loss", "dit", "half-width"),
    Claim("a deeper DiT has lower loss at equal steps", "held_out_loss", "dit", "half-depth"),
    Claim("more compute gives samples closer to the data (width)", "frechet", "dit", "half-width"),
    Claim("more compute gives samples closer to the data (depth)", "frechet", "dit", "half-depth"),
)
DEPARTURES = (
    "tiny: rectified flow on pixels of 5,000 MNIST digits instead of DDPM on ImageNet latents",
    "guidance covers all channels by default; the published code guides three of four "
    "(sample.guidance.channels=3 reproduces it)",
    "positions are a buffer, so parameter counts leave them out",
)
