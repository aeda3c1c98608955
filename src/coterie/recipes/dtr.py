"""DTR: each noise level reads its own window of channels; no parameters, almost no cost."""

from __future__ import annotations

from coterie.backbones import SlotConfig
from coterie.experts import ExpertLayerConfig, RouterConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.config import RunConfig

PAPER = Paper(
    title="Denoising Task Routing for Diffusion Models",
    authors="Park, Byeongjun and Woo, Sangmin and Go, Hyojun and Kim, Jin-Young and Kim, Changick",
    year=2024,
    venue="ICLR 2024",
    arxiv="2310.07138",
    key="park2024dtr",
    url="https://github.com/byeongjun-park/DTR",
)
SUMMARY = "A fixed router by noise level whose experts are windows of channels."


def slot(share: float = 0.8, alpha: float = 4.0, mode: str = "window") -> SlotConfig:
    """Every block reads m * z; the window starts at round((t / (T-1))^alpha * (C - n))."""
    random = mode == "random"
    expert = ExpertLayerConfig(
        num_experts=None,
        experts={"kind": "channel_window", "share": share, "mode": mode},
        # The control gives every step a random mask of its own.
        router=RouterConfig(
            score={"kind": "noise_window", "alpha": 1.0 if random else alpha},
            select={"kind": "top_k", "k": 1},
            weight="one",
        ),
    )
    return SlotConfig(slot="pre_block", expert=expert)


def tiny() -> RunConfig:
    return image_tiny("dtr", slot(), flow=False)


def paper(size: str = "L") -> RunConfig:
    """DTR-L/2 with the uncertainty weighting of its best row (ANT-UW, stratified times)."""
    config = image_paper("dtr", image_trunk(size, slot()), flow=False)
    objective = config.objective.replace(
        times={"kind": "stratified"}, weighting={"kind": "uncertainty"}
    )
    return config.replace(objective=objective)


def arms() -> dict[str, RunConfig]:
    return {
        "dtr": tiny(),
        "dit": image_tiny("dit", flow=False),
        "random": image_tiny("dtr", slot(mode="random"), flow=False),
    }


CLAIMS = (
    Claim("better samples than a dense DiT at equal steps", "frechet", "dtr", "dit"),
    Claim("lower loss than a dense DiT at equal steps", "held_out_loss", "dtr", "dit"),
    Claim("sliding windows beat random masks (loss)", "held_out_loss", "dtr", "random"),
    Claim("sliding windows beat random masks (samples)", "frechet", "dtr", "random"),
)
DEPARTURES = (
    "tiny: 5,000 MNIST digits in pixels, fixed variance, DPM-Solver++ 2M instead of 250 "
    "ancestral steps",
)
