"""Dense feed-forward networks served as one expert that every row uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from coterie.experts.dispatch.expert_weights import OneExpert
from coterie.experts.dispatch.single_expert import run_one
from coterie.experts.kinds import GeluMLP as GeluKind
from coterie.experts.kinds import SwiGLU as SwiGLUKind
from coterie.nn import mlp


def _plain(linear: nn.Module | None) -> dict[str, Any] | None:
    """Parameters of a layer that is a product and nothing else: no adapter in its place, nobody
    listening to it."""
    if type(linear) is not nn.Linear or linear._forward_pre_hooks or linear._forward_hooks:
        return None
    return None if linear._backward_pre_hooks or linear._backward_hooks else linear._parameters


class GeluMLP(mlp.GeluMLP):
    """:class:`coterie.nn.mlp.GeluMLP`, by the native operator where that can serve."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu_tanh") -> None:
        super().__init__(width, hidden, activation)
        self.served = GeluKind.from_dict({"activation": activation})

    def forward(self, x: Tensor) -> Tensor:
        # Not by attribute, which takes longer than a small product.
        up, down = _plain(self._modules["up"]), _plain(self._modules["down"])
        if up is None or down is None:
            return super().forward(x)
        parameters = {
            "up": up["weight"],
            "up_bias": up["bias"],
            "down": down["weight"],
            "down_bias": down["bias"],
        }
        return run_one(self.served, x, OneExpert(parameters, {}))


class SwiGLU(mlp.SwiGLU):
    """:class:`coterie.nn.mlp.SwiGLU`, by the native operator where that can serve."""

    def __init__(self, width: int, hidden: int, activation: str = "silu") -> None:
        super().__init__(width, hidden, activation)
        self.served = SwiGLUKind.from_dict({"activation": activation})

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = _plain(self._modules["gate_up"]), _plain(self._modules["down"])
        if gate_up is None or down is None:
            return super().forward(x)
        parameters = {"gate_up": gate_up["weight"], "down": down["weight"]}
        return run_one(self.served, x, OneExpert(parameters, {}))


FEED_FORWARD: dict[str, type[GeluMLP] | type[SwiGLU]] = {"gelu": GeluMLP, "swiglu": SwiGLU}
