"""Gaussian data whose clusters, experts and router are known exactly, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.core.prediction import Condition
from coterie.ensembles import split_mixture
from coterie.process import PROCESSES, ExactDenoiser, Mixture, Process

F64 = torch.float64
CLUSTERS = (0, 1, 1, 2, 2)
DATA = Mixture(
    torch.tensor([[1.5, 0.5], [-1.0, 0.2], [-1.4, -0.9], [0.3, -1.6], [0.9, 1.4]], dtype=F64),
    torch.tensor([0.3, 0.2, 0.15, 0.4, 0.25], dtype=F64),
    torch.tensor([0.15, 0.2, 0.1, 0.3, 0.25], dtype=F64),
)
PARTS, PRIOR = split_mixture(DATA, CLUSTERS)
NAMES = ("rectified_flow", "vp_linear", "ve")


def process(name: str = "rectified_flow") -> Process:
    made: Process = PROCESSES.parse(name).build()
    return made


def experts(views: Any = "x0", processes: Any = "rectified_flow") -> list[ExactDenoiser]:
    """The exact denoiser of each cluster's data; one view and process, or one each."""
    count = len(PARTS)
    views = [views] * count if isinstance(views, str) else views
    processes = [processes] * count if isinstance(processes, str) else processes
    return [
        ExactDenoiser(process(name), part, view)
        for name, part, view in zip(processes, PARTS, views, strict=True)
    ]


def whole(view: Any = "x0", name: str = "rectified_flow") -> ExactDenoiser:
    """The exact denoiser of all data."""
    return ExactDenoiser(process(name), DATA, view)


def states(name: str = "rectified_flow", count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy samples x [B, 2] at noise levels all over the process, f64."""
    rng = torch.Generator().manual_seed(seed)
    kind = process(name)
    unit = torch.linspace(0.02, 0.98, count, dtype=F64)
    t = kind.time_of_unit(unit)
    x0, _ = DATA.sample(count, rng)
    return kind.diffuse(x0, torch.randn(count, 2, generator=rng, dtype=F64), t), t


NOTHING = Condition()
