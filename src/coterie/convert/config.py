"""How dense feed-forward networks become experts.

*Copy*: each expert is a copy (sparse upcycling, arXiv:2212.05055). *Slice*: the experts are equal
parts of the inner dimension. *Slice+copy*: parts of copies (Dynamic-DINO, ICCV 2025; virtual
groups, arXiv:2410.07524). Expert ``c * slices + j`` is slice j of copy c.

At step 0 the layer is the dense network, whichever copy a token is sent to, because

* the slices of a copy add up to it: the inner units are split, and the output bias is divided;
* the slices of a copy have equal router rows, so that they are chosen together;
* the gates of a chosen copy are 1 at the start. How, is ``gates`` (s slices, N copies, u used):

=====================  ==================  =========  ==========================================
gates                  at step 0           scale      gradient to the router
=====================  ==================  =========  ==========================================
``renorm``             exactly 1           s          none if s u = 1: one gate is always 1
``straight_through``   exactly 1, always   1 / u      that of the probability, also if s u = 1
``raw``                1 + router_scale    N s / u    full; logits have to start near 0
=====================  ==================  =========  ==========================================
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from coterie.backbones.trunk import Layers
from coterie.core.config import Config
from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Few
from coterie.core.registry import Part
from coterie.experts import ExpertLayerConfig, RouterConfig

Gates = Literal["auto", "renorm", "straight_through", "raw"]
NEAR_ZERO = 1e-5  # standard deviation of logits whose raw softmax counts as uniform


class UpcycleConfig(Config):
    """How the dense feed-forward networks of a trained model become experts."""

    copies: Few = 4  # N, copies of each network
    slices: Few = 2  # s, parts into which each copy is cut
    copies_used: Few = 1  # u, whole copies used per token at the start (top_k = s u)
    layers: Layers = "all"  # blocks whose networks become experts
    gates: Gates = "auto"
    """rule of the gates; auto: renorm, or straight_through if that has no gradient"""
    balance: NonNegativeFloat = 0.01  # weight of the Switch loss
    router_scale: PositiveFloat | None = None
    """Standard deviation of the logits at the start; null: 1, near 0 for raw gates."""
    calibration: NonNegativeInt = 256
    """samples whose hidden states balance the router; 0: random rows"""
    noise: NonNegativeFloat = 0.0
    """standard deviation of noise on expert weights, relative to each tensor's"""
    repeat_rows: bool = True  # False changes the function at the start (ablation)
    seed: int = Field(0, ge=0, lt=2**63)  # of router rows and noise

    @model_validator(mode="after")
    def _check(self) -> UpcycleConfig:
        if self.copies_used > self.copies:
            raise ConfigError(describe("copies_used", self.copies_used, f"1..{self.copies}"))
        return self

    @property
    def mode(self) -> str:
        """``copy``, ``slice``, ``slice+copy``; ``identity`` for one expert that is the network."""
        if self.slices == 1:
            return "copy" if self.copies > 1 else "identity"
        return "slice+copy" if self.copies > 1 else "slice"

    @property
    def num_experts(self) -> int:
        return self.copies * self.slices

    @property
    def top_k(self) -> int:
        return self.slices * self.copies_used

    @property
    def exact(self) -> bool:
        """Whether the function is kept."""
        near = self.gates != "raw" or self.logit_std <= NEAR_ZERO
        return near and self.noise == 0 and (self.repeat_rows or self.slices == 1)

    @property
    def logit_std(self) -> float:
        if self.router_scale is not None:
            return self.router_scale
        return NEAR_ZERO if self.gates == "raw" else 1.0

    def router(self) -> RouterConfig:
        """The router whose gates add up to 1 per copy, see the module."""
        weight: str = self.gates
        if weight == "auto":
            weight = "renorm" if self.top_k > 1 else "straight_through"
        scale = {
            "renorm": float(self.slices),
            "straight_through": 1 / self.copies_used,
            "raw": self.num_experts / self.copies_used,
        }[weight]
        select = {"kind": "top_k", "k": self.top_k}
        return RouterConfig.from_dict({"select": select, "weight": weight, "scale": scale})

    def layer(self, experts: Part, hidden: int) -> ExpertLayerConfig:
        """The expert layer that replaces a network of inner size ``hidden``, ``experts`` its kind.

        ConfigError unless the slices divide it.
        """
        if hidden % self.slices:
            allowed = f"a divisor of the inner size {hidden}"
            raise ConfigError(describe("slices", self.slices, allowed))
        balance: tuple[Any, ...] = ()
        if self.balance:
            balance = ({"kind": "switch", "weight": self.balance},)
        return ExpertLayerConfig.from_dict(
            {
                "num_experts": self.num_experts,
                "experts": experts.replace(hidden=hidden // self.slices),
                "router": self.router(),
                "balance": balance,
            }
        )
