"""Fine-grained experts and shared isolation as one rule (DeepSeekMoE, arXiv:2401.06066).

From N experts of inner size F with top-K, segmenting by m and isolating K_s gives mN - K_s routed
experts of inner size F / m, of which mK - K_s are used, and K_s shared ones: equal expert
parameters and equal multiply-adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator

from coterie.core.config import Config
from coterie.core.cost import count_parameters
from coterie.core.errors import ConfigError, describe
from coterie.experts.kinds import ExpertKind, SwiGLU
from coterie.experts.layer import ExpertLayer, ExpertLayerConfig
from coterie.experts.routers import RouterConfig, TopK
from coterie.experts.shared import SharedConfig


@dataclass(frozen=True)
class Segments:
    """Sizes of a segmented layer."""

    num_experts: int
    top_k: int
    hidden: int
    num_shared: int
    hidden_gap: int  # m * hidden - base_hidden; 0 if F is a multiple of m


@dataclass(frozen=True)
class LayerCost:
    """Parameters of one layer, those used for one token, and multiply-adds per token."""

    total: int
    active: int
    multiply_adds: int


class Segmentation(Config):
    """An expert layer given by the unsegmented one, the number of segments and of shared
    experts."""

    base_experts: PositiveInt = 16  # N, number of experts before segmentation
    base_k: PositiveInt = 2  # K, experts per token before segmentation
    base_hidden: PositiveInt  # F, inner size of an expert before segmentation
    segment: PositiveInt = 4  # m, parts into which each expert is cut
    shared: NonNegativeInt = 1  # K_s, shared experts after segmentation

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.base_k > self.base_experts:
            raise ConfigError(describe("base_k", self.base_k, f"1..{self.base_experts}"))
        used = self.segment * self.base_k
        if self.shared >= used:
            hint = f"{used} experts are used per token; at least one must be routed"
            raise ConfigError(describe("shared", self.shared, f"0..{used - 1}", hint))
        if self.segment > self.base_hidden:
            raise ConfigError(describe("segment", self.segment, f"1..{self.base_hidden}"))
        return self

    def resolve(self) -> Segments:
        """The sizes of the segmented layer."""
        hidden = round(self.base_hidden / self.segment)
        return Segments(
            num_experts=self.segment * self.base_experts - self.shared,
            top_k=self.segment * self.base_k - self.shared,
            hidden=hidden,
            num_shared=self.shared,
            hidden_gap=self.segment * hidden - self.base_hidden,
        )

    def layer(
        self, experts: ExpertKind | None = None, router: RouterConfig | None = None
    ) -> ExpertLayerConfig:
        """The segmented layer; ``experts`` (default SwiGLU) and ``router`` give everything else."""
        numbers = self.resolve()
        kind = (SwiGLU() if experts is None else experts).with_hidden(numbers.hidden)
        router = RouterConfig() if router is None else router
        shared = None
        if numbers.num_shared:
            shared = SharedConfig(hidden=numbers.hidden, count=numbers.num_shared)
        return ExpertLayerConfig(
            num_experts=numbers.num_experts,
            experts=kind,
            router=router.replace(select=TopK(k=numbers.top_k)),
            shared=shared,
        )

    def twin(self) -> Segmentation:
        """The unsegmented layer with the same expert parameters and cost."""
        return self.replace(segment=1, shared=0)

    def summary(self, width: int) -> str:
        """Sizes and costs of this layer and of the unsegmented one, as two lines of text."""
        lines = []
        for name, rule in (("segmented", self), ("unsegmented", self.twin())):
            numbers, cost = rule.resolve(), layer_cost(rule.layer(), width)
            lines.append(
                f"{name}: {numbers.num_experts} routed, {numbers.top_k} used, "
                f"{numbers.num_shared} shared, inner size {numbers.hidden}; parameters "
                f"{cost.total:,} total, {cost.active:,} active; "
                f"{cost.multiply_adds:,} multiply-adds per token"
            )
        return "\n".join(lines)


def layer_cost(config: ExpertLayerConfig, width: int) -> LayerCost:
    """Cost of a layer, computed from shapes; nothing is allocated."""
    with torch.device("meta"):
        layer = config.build(width)
    counted = count_parameters(layer)
    routed = config.router.select_part.expected(config.candidates(width)) * config.rounds
    return LayerCost(counted.total, counted.active, round(multiply_adds(layer, routed)))


def multiply_adds(layer: ExpertLayer, chosen: float) -> float:
    """Multiply-adds of a layer for one row that chose ``chosen`` experts over all rounds.

    Counts these, the parts that every row uses (shared experts, stem, adaptor) and the routers.
    """
    width, rounds = layer.width, layer.config.rounds
    total = _matrix_elements(layer.pool.kind.shapes(width)) * chosen
    runs = rounds if layer.config.round_routing == "shared" else 1
    total += runs * sum(p.numel() for r in layer.routers for p in r.parameters() if p.dim() > 1)
    for part in (layer.shared, layer.stem, layer.adaptor):
        if part is not None:
            total += rounds * sum(p.numel() for p in part.parameters() if p.dim() > 1)
    return total


def _matrix_elements(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
