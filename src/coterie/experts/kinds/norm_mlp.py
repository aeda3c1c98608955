"""Feed-forward experts with normalised outputs and a gate on their input features (HoME,
arXiv:2408.05430).

``act(norm(W2 act(W1 v + b1) + b2))`` with ``v = x * 2 sigmoid(A (B x))``. Normalised outputs have
one scale, so gates compare experts fairly. With ReLU and no norm or feature gate it is the usual
expert of multi-task mixtures. Legend: R rows, D width, S streams, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.core.errors import ConfigError, describe
from coterie.core.numbers import Few
from coterie.experts.kinds.base import EXPERTS, ExpertKind, Weights, xavier_uniform
from coterie.nn import norm_mlp


@EXPERTS.register
class NormMLP(ExpertKind):
    """A feed-forward expert with normalised output and an optional gate on its input features."""

    kind: Literal["norm_mlp"] = "norm_mlp"
    hidden: PositiveInt | None = None  # inner size of a second layer; null: one linear map
    out: PositiveInt | None = None  # size of the output; null: that of the input
    norm: norm_mlp.Norm = "batch"
    """batch (over rows, with running statistics), layer (over units) or none"""
    activation: norm_mlp.Activation = "silu"  # after each layer
    feature_rank: PositiveInt | None = None  # rank of the gate on the input features; null: no gate
    streams: Few = 1  # S: a row holds S parts of equal size
    reads: tuple[NonNegativeInt, ...] | None = None
    """for each expert, the number of the part that it reads; sets the number of experts"""
    eps: PositiveFloat = 1e-5  # added to the variance
    momentum: float = Field(default=0.1, gt=0, le=1)  # of the running statistics

    @model_validator(mode="after")
    def _streams_are_read(self) -> Self:
        if (self.reads is None) != (self.streams == 1):
            hint = "say for each expert which of the streams it reads"
            raise ConfigError(describe("reads", self.reads, "a list, with several streams", hint))
        if self.reads is not None and max(self.reads) >= self.streams:
            raise ConfigError(describe("reads", self.reads, f"each in 0..{self.streams - 1}"))
        return self

    @property
    def ends(self) -> tuple[str, ...]:  # type: ignore[override]
        """Parameters that can start at zero; none with ReLU, whose gradient at 0 is 0."""
        if self.activation == "relu":
            return ()
        return ("down", "down_bias") if self.norm == "none" else ("gain", "offset")

    @property
    def batch_statistics(self) -> bool:  # type: ignore[override]
        return self.norm == "batch"

    def stream_width(self, width: int) -> int:
        """What one expert reads of a row."""
        if width % self.streams:
            hint = "the streams of a row are equally wide"
            allowed = f"a divisor of the width {width}"
            raise ConfigError(describe("experts.streams", self.streams, allowed, hint))
        return width // self.streams

    def _out(self, width: int) -> int:
        return self.out or width

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:-1], self._out(shape[-1]))

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        read, out = self.stream_width(width), self._out(width)
        made: dict[str, tuple[int, ...]] = {}
        if self.feature_rank is not None:
            made |= {"reduce": (self.feature_rank, read), "expand": (read, self.feature_rank)}
        if self.hidden is not None:
            made |= {"up": (self.hidden, read), "up_bias": (self.hidden,)}
        made["down"] = (out, self.hidden or read)
        if self.norm != "batch":  # whose statistics would take it away again
            made["down_bias"] = (out,)
        if self.norm != "none":
            made |= {"gain": (out,), "offset": (out,)}
        return made

    def statistics(self, width: int) -> dict[str, Tensor]:
        if self.norm != "batch":
            return {}
        out = self._out(width)
        return {"mean": torch.zeros(out), "variance": torch.ones(out)}

    def buffers(self, width: int) -> dict[str, Tensor]:
        if self.reads is None:
            return {}
        return {"stream": F.one_hot(torch.tensor(self.reads), self.streams).float()}

    def fixed_count(self, width: int) -> int | None:
        return None if self.reads is None else len(self.reads)

    def with_hidden(self, hidden: int) -> Self:
        return self.replace(hidden=hidden, streams=1, reads=None)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        if self.reads is not None:
            chosen = weights.constant("stream").to(x.dtype)[..., None]
            x = (x.unflatten(-1, (self.streams, -1)) * chosen).sum(-2)
        return self._answer(x, weights)

    def forward_all(self, x: Tensor, weights: Weights, experts: Sequence[int]) -> Tensor:
        if self.reads is None:
            return super().forward_all(x, weights, experts)
        streams = x.unflatten(-1, (self.streams, -1)).transpose(0, 1)  # [S, R, D / S]
        read = torch.tensor([self.reads[e] for e in experts], device=x.device)
        return self._answer(streams.index_select(0, read), weights)

    def _answer(self, x: Tensor, weights: Weights) -> Tensor:
        activation = norm_mlp.ACTIVATIONS[self.activation]
        if self.feature_rank is not None:
            x = x * 2 * torch.sigmoid(weights.linear(weights.linear(x, "reduce"), "expand"))
        if self.hidden is not None:
            x = activation(weights.linear(x, "up", "up_bias"))
        x = weights.linear(x, "down", None if self.norm == "batch" else "down_bias")
        if self.norm == "batch":
            x = weights.normalise(x, self.momentum, self.eps)
        elif self.norm == "layer":
            x = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)
        if self.norm != "none":
            x = x * weights.vector("gain", x) + weights.vector("offset", x)
        return activation(x)

    def reset(self, name: str, parameter: Tensor, rng: Generator | None) -> None:
        if name == "expand" or name.endswith("bias") or name == "offset":
            nn.init.zeros_(parameter)
        elif name == "gain":
            nn.init.ones_(parameter)
        else:
            xavier_uniform(parameter, rng)

    def module(self, width: int) -> nn.Module:
        """It reads its own stream, not the whole row."""
        return norm_mlp.NormMLP(
            self.stream_width(width),
            self._out(width),
            self.hidden,
            self.norm,
            self.activation,
            self.feature_rank,
            self.eps,
            self.momentum,
        )

    def plain_names(self) -> dict[str, str]:
        return {
            "reduce": "gate.reduce.weight",
            "expand": "gate.expand.weight",
            "up": "up.weight",
            "up_bias": "up.bias",
            "down": "down.weight",
            "down_bias": "down.bias",
            "gain": "norm.weight",
            "offset": "norm.bias",
            "mean": "norm.running_mean",
            "variance": "norm.running_var",
        }

    def folded(self) -> Self:
        """The kind of expert that :meth:`fold` returns weights for."""
        return self.replace(norm="none")

    def fold(self, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold batch norm into the linear maps: stacks with running statistics -> stacks without
        norm.

        The output is the same: ``gamma / sqrt(var + eps)`` scales the map before, the rest is its
        bias.
        """
        left = dict(stacks)
        gain, offset, mean, variance = (
            left.pop(name).double() for name in ("gain", "offset", "mean", "variance")
        )
        scale, down = gain * torch.rsqrt(variance + self.eps), left["down"]
        left["down"] = (scale[..., None] * down.double()).to(down.dtype)
        left["down_bias"] = (offset - scale * mean).to(down.dtype)
        return left
