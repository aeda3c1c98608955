"""Training of an ensemble's router: predict, from x_t, the cluster of the clean sample.

Samples come from the whole data, not from one cluster, under the experts' noising process; the
minimum of the cross-entropy is P(cluster | x_t). Shapes: B batch, K clusters.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.core.batch import Batch, Losses
from coterie.core.errors import ConfigError, DataError, describe
from coterie.core.prediction import Condition
from coterie.core.registry import Part
from coterie.ensembles.router import ClusterRouterConfig
from coterie.process import TIMES
from coterie.train.objectives.base import OBJECTIVES
from coterie.train.objectives.denoising import drawn

CLUSTER_MODELS = (ClusterRouterConfig.model_fields["kind"].default,)


@OBJECTIVES.register
class ClusterPosteriorConfig(Part):
    """Cross-entropy of a router that predicts the cluster of the clean sample from x_t."""

    kind: Literal["cluster_posterior"] = "cluster_posterior"
    times: Annotated[SerializeAsAny[Part], TIMES.validator] = "uniform"  # type: ignore[assignment]
    """Distribution of the noise levels."""
    cluster: Literal["task", "label"] = "task"
    """field of the condition that holds the cluster; hidden from the network"""
    label_dropout: float = Field(0.1, ge=0, le=1)  # share of samples trained without condition
    answers: ClassVar[str] = "posterior"

    def build(self, model: Any) -> ClusterPosterior:
        if model.config.kind not in CLUSTER_MODELS:
            hint = "its answer is no logits of clusters"
            allowed = ", ".join(CLUSTER_MODELS)
            raise ConfigError(describe("model", model.config.kind, allowed, hint))
        return ClusterPosterior(self, model)


class ClusterPosterior(nn.Module):
    """Cross-entropy of ``model(x_t, t, cond) -> logits [B, K]``, in nats."""

    def __init__(self, config: ClusterPosteriorConfig, model: Any) -> None:
        super().__init__()
        self.config = config
        self.process = model.process
        self.num_clusters: int = model.config.num_clusters
        self.times = config.times.build(self.process)

    def forward(self, model: Any, batch: Batch, rng: Generator, progress: float = 1.0) -> Losses:
        cluster, cond = self.split(batch.cond)
        t, eps, cond = drawn(self.times, batch.x, cond, self.config.label_dropout, rng)
        x_t = self.process.diffuse(batch.x, eps, t)
        prediction = model(x_t, t, cond, sample_ids=batch.ids, rng=rng, progress=progress)
        loss = F.cross_entropy(prediction.value, cluster, reduction="none")
        right = prediction.value.argmax(1) == cluster
        return Losses(
            main={"cluster_posterior": loss.mean()},
            aux=model.aux_losses(prediction.routings, rng),
            routings=prediction.routings,
            per_sample=loss.detach(),
            noise=self.process.unit_time(t),
            extras={"accuracy": right.float().mean()},
        )

    def split(self, cond: Condition) -> tuple[Tensor, Condition]:
        """(cluster i64 [B], the condition without it)."""
        field = self.config.cluster
        cluster: Tensor | None = getattr(cond, field)
        allowed = f"clusters 0..{self.num_clusters - 1}"
        if cluster is None:
            raise DataError(describe(f"cond.{field}", None, allowed))
        if cluster.numel() and not 0 <= int(cluster.min()) <= int(cluster.max()) < (
            self.num_clusters
        ):
            raise DataError(describe(f"cond.{field}", sorted(set(cluster.tolist())), allowed))
        return cluster, cond.replace(**{field: None})
