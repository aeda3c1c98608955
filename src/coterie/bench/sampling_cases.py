"""Sizes at which sampling is timed, and the least that one call of such a network computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.backbones import DiTConfig, TrunkConfig
from coterie.core.prediction import Condition
from coterie.core.rng import SampleNoise
from coterie.denoiser import Denoiser, DenoiserConfig
from coterie.nn.attention import SelfAttention
from coterie.solvers import GRIDS, SOLVERS, GuidanceConfig, guide, initial_noise, sample

CLASSES, CHANNELS, PATCH = 10, 4, 2
GUIDANCE = 2.0


@dataclass(frozen=True)
class Case:
    """A guided run of one sample: ``steps`` calls of 2 rows."""

    name: str
    width: int
    depth: int
    heads: int
    image_size: int
    steps: int


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("tiny", 128, 4, 4, 8, 20),
        Case("S2", 384, 12, 6, 32, 2),
    )
}


class Setup:
    """The network of a case with random weights, and one sample's noise and label."""

    def __init__(self, case: Case) -> None:
        self.case = case
        trunk = TrunkConfig(width=case.width, depth=case.depth, heads=case.heads)
        backbone = DiTConfig(
            image_size=case.image_size,
            channels=CHANNELS,
            patch=PATCH,
            num_classes=CLASSES,
            trunk=trunk,
        )
        process: Any = "ddpm"
        config = DenoiserConfig(backbone=backbone, process=process, view="eps")
        self.model: Denoiser = config.build().eval()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
        noise = SampleNoise([0])
        self.x = initial_noise(self.model.process, backbone.sample_shape, noise)
        self.label = torch.tensor([1])
        self.grid = GRIDS.parse({"kind": "respaced", "spacing": "leading"})

    def times(self, steps: int | None = None) -> Tensor:
        return self.grid.build(self.model.process, steps or self.case.steps)

    def run(self, denoiser: Any, solver: str = "ddim", steps: int | None = None) -> Tensor:
        """The sample [1, C, H, W]."""
        return sample(
            guide(denoiser, GuidanceConfig(weight=GUIDANCE)),
            self.x,
            Condition(label=self.label),
            solver=SOLVERS.parse(solver),
            grid=self.grid,
            steps=steps or self.case.steps,
        )

    def call(self) -> tuple[Tensor, Tensor, Condition]:
        """What one guided call asks: x [2, ...], t [2] and both conditions."""
        t = self.times()[:1].float().expand(2).clone()
        label = torch.cat([self.label, torch.full_like(self.label, -1)])
        return torch.cat([self.x, self.x]), t, Condition(label=label)


@torch.no_grad()
def products(setup: Setup) -> tuple[Callable[[], None], Callable[[], None]]:
    """The linear products of one call, without and with attention, on what the network fed them."""
    inputs: list[tuple[nn.Linear, Tensor]] = []
    attended: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            inputs.append((module, given[0].clone()))

    def keep_heads(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, SelfAttention)
        heads = module.qkv(given[0]).unflatten(2, (-1, given[0].shape[-1] // module.heads))
        q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
        attended.append((q, k, v))

    hooks = [m.register_forward_hook(keep) for m in setup.model.modules()]
    setup.model(*setup.call())
    for hook in hooks:
        hook.remove()
    hooks = [
        m.register_forward_hook(keep_heads)
        for m in setup.model.modules()
        if isinstance(m, SelfAttention)
    ]
    setup.model(*setup.call())
    for hook in hooks:
        hook.remove()
    weights = [(x, module.weight, module.bias) for module, x in inputs]

    @torch.no_grad()
    def linear() -> None:
        for x, weight, bias in weights:
            F.linear(x, weight, bias)

    @torch.no_grad()
    def both() -> None:
        linear()
        for q, k, v in attended:
            F.scaled_dot_product_attention(q, k, v)

    return linear, both
