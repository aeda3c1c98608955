"""Upcycling: a trained dense model becomes a mixture of experts and trains on."""

from __future__ import annotations

from coterie.convert import UpcycleConfig
from coterie.recipes.base import Claim, Paper
from coterie.recipes.common import image_paper, image_tiny, image_trunk
from coterie.runs.build import upcycled_run
from coterie.runs.config import RunConfig
from coterie.runs.origins.first_weights import InitConfig

PAPER = Paper(
    title="Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    authors="Komatsuzaki, Aran and Puigcerver, Joan and Lee-Thorp, James and Ruiz, Carlos Riquelme "
    "and others",
    year=2023,
    venue="ICLR 2023",
    arxiv="2212.05055",
    key="komatsuzaki2023upcycling",
    url="https://github.com/google-research/vmoe",
)
SUMMARY = "Experts made of a dense model's copies and slices: nothing is lost at step 0."

COPY = UpcycleConfig(copies=4, slices=1, copies_used=2)
SLICE_COPY = UpcycleConfig(copies=4, slices=2)
DENSE = "arm:dense"
STEPS = 300  # of the dense model, and again of each arm that goes on from it


def tiny() -> RunConfig:
    """Goes on from ``coterie train dit``: 4 copies in 2 slices, one network's worth active."""
    return upcycled_run(image_tiny("upcycling"), "runs/dit", SLICE_COPY)


def paper() -> RunConfig:
    """The paper's ViT-B/16 shape as a denoiser: 32 copies in the last 6 of 12 blocks, 2 of them
    used; a dense run of the same model is expected at ``runs/dit-b``."""
    dense = image_paper("upcycling", image_trunk("B"))
    upcycling = UpcycleConfig(copies=32, slices=1, copies_used=2, layers=tuple(range(6, 12)))
    return upcycled_run(dense, "runs/dit-b", upcycling)


def arms() -> dict[str, RunConfig]:
    """All but ``dense`` and ``scratch`` start from what ``dense`` has learnt; all train equally
    long, with the same rate and warm-up. One network's worth of experts is active, in ``copy`` two
    as in the paper."""
    dense = image_tiny("upcycling", steps=STEPS)
    unpaired = SLICE_COPY.replace(repeat_rows=False)
    return {
        "dense": dense,
        "continued": dense.replace(init=InitConfig(path=DENSE)),
        "copy": upcycled_run(dense, DENSE, COPY),
        "slice-copy": upcycled_run(dense, DENSE, SLICE_COPY),
        "unpaired-rows": upcycled_run(dense, DENSE, unpaired),
        "scratch": upcycled_run(dense, DENSE, SLICE_COPY).replace(init=None),
    }


CLAIMS = (
    Claim(
        "slices of copies lose nothing at step 0 (within 0.01 %)",
        "initial_loss",
        "slice-copy",
        "continued",
        tolerance=1e-4,
    ),
    Claim(
        "copies lose nothing at step 0 (within 0.01 %)",
        "initial_loss",
        "copy",
        "continued",
        tolerance=1e-4,
    ),
    Claim(
        "router rows that are not paired with slices break the model at step 0 (loss over 1.2 x)",
        "initial_loss",
        "unpaired-rows",
        "slice-copy",
        better="higher",
        factor=1.2,
    ),
    Claim(
        "two of four copies beat the dense model trained on equally long, at more cost per step",
        "held_out_loss",
        "copy",
        "continued",
    ),
    Claim(
        "slices of copies beat the dense model trained on equally long, at equal active cost",
        "held_out_loss",
        "slice-copy",
        "continued",
    ),
    Claim(
        "upcycling beats the same mixture trained from scratch for the same further steps",
        "held_out_loss",
        "slice-copy",
        "scratch",
    ),
)
DEPARTURES = (
    "token choice with gates that are 1 at the start instead of expert choice: expert choice "
    "leaves some tokens to nobody, so the paper's models lose quality at step 0",
    "arms are compared at equal steps; the paper counts time, in which two active copies cost more "
    "than the dense network (their active parameters stand in the budget of the claim)",
    "optimiser and averages start afresh; the paper keeps the optimiser's state for images",
    "router rows are balanced on training data instead of drawn N(0, 0.02)",
    "slices of copies are Dynamic-DINO's (ICCV 2025) and virtual groups' (arXiv:2410.07524)",
    "a denoiser of digits instead of T5 and ViT; paper: sizes of ViT-B/16 in a denoiser",
)
