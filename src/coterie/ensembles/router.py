"""The router of an ensemble of clusters: predicts the cluster of the clean sample from x_t.

Trained with cross-entropy on the whole data, noised by the experts' process, its softmax is the
posterior r_k(x, t) that mixes them (Decentralized Diffusion Models, McAllister et al. 2025).
Shapes: B batch, N tokens, D width, K clusters.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Generator, Tensor, nn

from coterie.backbones import BACKBONES
from coterie.backbones.dit import DiTConfig, PatchEncoder
from coterie.core.context import Context
from coterie.core.errors import ConfigError, describe
from coterie.core.prediction import Condition, Prediction, as_times
from coterie.core.registry import Part
from coterie.core.routing import Routing
from coterie.denoiser import MODELS, Model, context_at, time_inputs
from coterie.experts.routers.config import within
from coterie.process import PRECONDITIONS, PROCESSES, Process, expand


class PosteriorNetwork(PatchEncoder):
    """A DiT's encoder; the mean of its tokens gives K logits, f32."""

    def __init__(self, config: DiTConfig, num_clusters: int) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.trunk.width, num_clusters)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise with a small head: probabilities near 1 / K."""
        super().reset_parameters()
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, x: Tensor, ctx: Context, cond: Condition
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        z_BND, routings = self.encode(x, ctx, cond)
        return self.head(z_BND.mean(1)).float(), routings


@MODELS.register
class ClusterRouterConfig(Part):
    """A network that predicts the cluster of the clean sample from x_t."""

    kind: Literal["cluster_router"] = "cluster_router"
    num_clusters: int = Field(2, ge=1)  # number of experts
    backbone: Annotated[SerializeAsAny[Part], BACKBONES.validator] = DiTConfig(num_classes=0)
    """with num_classes 0 it reads x_t alone, else the condition too"""
    process: Annotated[SerializeAsAny[Part], PROCESSES.validator] = "rectified_flow"  # type: ignore[assignment]
    """Noising process; it may differ from the experts', as noise levels are matched."""
    precondition: Annotated[SerializeAsAny[Part], PRECONDITIONS.validator] = "none"  # type: ignore[assignment]
    """Scaling of the network's input."""

    @model_validator(mode="after")
    def _check(self) -> ClusterRouterConfig:
        if not isinstance(self.backbone, DiTConfig):
            hint = "a router pools the tokens of an image transformer"
            raise ConfigError(describe("backbone", self.backbone.kind, "dit", hint))
        told = self.backbone.told - {"task"}
        within("backbone", partial(self.backbone.check_told, told, "a router of clusters"))
        return self

    def build(self) -> ClusterRouter:
        return ClusterRouter(self)


class ClusterRouter(Model):
    """``forward(x [B, ...], t f32 [B], cond) -> Prediction`` of logits f32 [B, K].

    ``cond.task`` is ignored: in training it holds the target.
    """

    backbone: PosteriorNetwork

    def __init__(self, config: ClusterRouterConfig) -> None:
        super().__init__()
        self.config = config
        self.process: Process = config.process.build()
        self.precondition = config.precondition.build(self.process)
        assert isinstance(config.backbone, DiTConfig)
        self.backbone = PosteriorNetwork(config.backbone, config.num_clusters)
        self.register_buffer("time_inputs", time_inputs(self.process), persistent=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        sample_ids: Tensor | None = None,
        rng: Generator | None = None,
        progress: float = 1.0,
    ) -> Prediction:
        t = as_times(t, x)
        ctx = context_at(self.process, t, self.get_buffer("time_inputs")).replace(
            sample_ids=sample_ids, training=self.training, rng=rng, progress=progress
        )
        scale = expand(self.precondition.coefficients(t)[0], x)
        dtype: torch.dtype = self.backbone.head.weight.dtype
        logits, routings = self.backbone((scale * x).to(dtype), ctx, cond.replace(task=None))
        return Prediction(logits, "logits", routings)
