"""Clipping of the predicted x0.

Dynamic thresholding: Saharia et al. 2022 (arXiv:2205.11487, section 2.3).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, DenoiserLike, Prediction
from coterie.process import Process, as_view, expand
from coterie.solvers.base import prepared


class ThresholdConfig(Config):
    """Keeps the predicted x0 in a range."""

    mode: Literal["clip", "dynamic"] = "clip"
    """``clip``: into [-limit, limit]. ``dynamic``: per sample, clip to the quantile of |x0| if that
    is above ``limit``, then scale to [-limit, limit]."""
    limit: float = Field(1.0, gt=0)  # end of the range
    quantile: float = 0.995  # of |x0|, for dynamic

    @model_validator(mode="after")
    def _check_quantile(self) -> Self:
        if not 0.0 < self.quantile <= 1.0:
            raise ConfigError(describe("quantile", self.quantile, "above 0, at most 1"))
        return self


class Thresholded:
    """A denoiser whose predicted x0 is clipped; it predicts x0."""

    def __init__(self, denoiser: DenoiserLike, config: ThresholdConfig) -> None:
        self.denoiser, self.config = denoiser, config
        self.process: Process = denoiser.process

    def prepare(self, cond: Condition) -> Condition:
        """See :func:`coterie.solvers.base.prepared`."""
        return prepared(self.denoiser, cond)

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        prediction = as_view(self.process, self.denoiser(x, t, cond), "x0", x, t)
        value, limit = prediction.value, self.config.limit
        if self.config.mode == "clip":
            return prediction.replace(value=value.clamp(-limit, limit))
        sizes = value.detach().abs().flatten(1)
        if sizes.dtype not in (torch.float32, torch.float64):
            sizes = sizes.float()
        bound = expand(torch.quantile(sizes, self.config.quantile, dim=1), value)
        bound = bound.clamp_min(limit).to(value)
        clipped = torch.minimum(torch.maximum(value, -bound), bound)
        return prediction.replace(value=clipped * (limit / bound))
