"""The layer forward and backward as sequences of kernels.

Legend: R rows, K slots, A = R * K assignments, E experts, D width, F inner size, H = F or, with a
gate, 2F.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from coterie.experts.dispatch.triton import backward, kernels
from coterie.experts.dispatch.triton.tiles import (
    GROUP,
    Blocks,
    TileMap,
    cdiv,
    divisor,
    make_map,
    power_of_two,
    row_block,
    row_blocks,
    weight_blocks,
)

INTERPRETED = not isinstance(kernels.hidden_kernel, triton.JITFunction)
"""The kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET was set)."""


@dataclass(frozen=True, eq=False)
class Call:
    """What every kernel of one call needs."""

    x: Tensor  # [R, D], rows of unit stride
    gates: Tensor  # f32 [R, K]
    ids: Tensor  # i64 [R, K], E = nobody
    order: Tensor  # i64 [A]
    bounds: Tensor  # i32 [E + 1]
    up: Tensor  # [E, H, D]
    down: Tensor  # [E, D, F]
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    gated: bool

    @property
    def assignments(self) -> int:
        return self.ids.numel()

    @property
    def slots(self) -> int:
        return self.ids.shape[1]

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def width(self) -> int:
        return self.up.shape[2]

    @property
    def size(self) -> int:
        return self.down.shape[2]

    @property
    def halves(self) -> int:
        return 2 if self.gated else 1

    def map(self) -> TileMap:
        rows = self.rows()
        return make_map(self.bounds, self.assignments, rows)

    def rows(self) -> int:
        """Places in a tile; the same for all kernels of the call, which share one map."""
        rows = row_block(self.assignments, self.num_experts)
        return rows if self.x.itemsize <= 2 else min(rows, 64)

    def device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.x.device) if self.x.is_cuda else nullcontext()

    def sorted(self, tiles: TileMap) -> tuple[Tensor, ...]:
        """Arguments that say which places a tile has."""
        return self.order, self.bounds, tiles.expert, tiles.place


def options(blocks: Blocks, even: bool) -> dict[str, Any]:
    """Compile-time arguments of a kernel with a product."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return {
        "EVEN": even,
        "PRECISION": "tf32" if tf32 and not INTERPRETED else "ieee",
        "UPCAST": INTERPRETED,
        "BM": blocks.rows,
        "BN": blocks.columns,
        "BK": blocks.depth,
        "GROUP": GROUP,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _even(blocks: Blocks, columns: int, depth: int) -> bool:
    return columns % blocks.columns == 0 and depth % blocks.depth == 0


def forward(call: Call, keep: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y [R, D] of ``dtype``; the argument of the activation [A, H], or [0] without ``keep``."""
    with call.device():
        tiles = call.map()
        inner = call.x.new_empty(call.assignments, call.size)
        kept = (call.assignments, call.halves * call.size) if keep else (0,)
        hidden = call.x.new_empty(kept)
        blocks = row_blocks(
            "hidden", call.rows(), call.size, call.width, call.x.itemsize, call.halves
        )
        kernels.hidden_kernel[(tiles.number * cdiv(call.size, blocks.columns),)](
            call.x, call.up, call.up_bias, *call.sorted(tiles), hidden, inner,
            tiles.number, call.width, call.size, call.x.stride(0),
            E=call.num_experts, K=call.slots, ACTIVATION=call.activation, GATED=call.gated,
            BIAS=call.up_bias is not None, KEEP=keep,
            **options(blocks, _even(blocks, call.size, call.width)),
        )  # fmt: skip
        strides = (1, call.size)
        answers = _answers(call, tiles, inner, call.down, strides, call.down_bias, gated=True)
        return _sum(call, answers, dtype), hidden


def _answers(
    call: Call,
    tiles: TileMap,
    rows: Tensor,
    weight: Tensor,
    strides: tuple[int, int],
    bias: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """[A, D] by position: rows [A, read] by place, times each expert's weight (and the gates)."""
    read = rows.shape[1]
    out = rows.new_empty(call.assignments, call.width)
    role = "answer" if gated else "row_grad"
    blocks = row_blocks(role, call.rows(), call.width, read, rows.itemsize)
    kernels.answer_kernel[(tiles.number * cdiv(call.width, blocks.columns),)](
        rows, weight, bias, call.gates, *call.sorted(tiles), out,
        tiles.number, read, call.width, *strides,
        E=call.num_experts, GATES=gated, BIAS=bias is not None,
        **options(blocks, _even(blocks, call.width, read)),
    )  # fmt: skip
    return out


def _sum(call: Call, answers: Tensor, dtype: torch.dtype) -> Tensor:
    rows, width = call.ids.shape[0], call.width
    out = answers.new_empty(rows, width, dtype=dtype)
    columns = min(256, power_of_two(width))
    height = max(1, 2048 // columns)
    kernels.sum_kernel[(cdiv(rows, height), cdiv(width, columns))](
        answers, call.ids, out, rows, width, E=call.num_experts, K=call.slots, BM=height, BN=columns
    )
    return out


@dataclass(frozen=True, eq=False)
class Grads:
    """Gradients; None where nobody asked, or there is no such bias."""

    x: Tensor | None
    gates: Tensor
    up: Tensor | None
    down: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def gradients(call: Call, hidden: Tensor, dy: Tensor, rows: bool, weights: bool) -> Grads:
    """All gradients for dy [R, D] of x's type; ``rows``, ``weights``: whether x, and the experts,
    want theirs."""
    with call.device():
        tiles = call.map()
        d_hidden, weighed, d_gates = _hidden_grad(call, tiles, hidden, dy, weights)
        d_up = d_down = d_up_bias = d_down_bias = d_x = None
        if weights:
            d_down = _weight_grad(call, call.down, dy, weighed, left_by_row=True)
            if call.down_bias is not None:
                d_down_bias = _bias_grad(call, call.down_bias, dy, gated=True)
        del weighed
        if weights:
            d_up = _weight_grad(call, call.up, d_hidden, call.x, left_by_row=False)
            if call.up_bias is not None:
                d_up_bias = _bias_grad(call, call.up_bias, d_hidden, gated=False)
        if rows:
            d_x = _sum(
                call, _answers(call, tiles, d_hidden, call.up, (call.width, 1)), call.x.dtype
            )
        return Grads(d_x, d_gates, d_up, d_down, d_up_bias, d_down_bias)


def _hidden_grad(
    call: Call, tiles: TileMap, hidden: Tensor, dy: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the activation's argument [A, H], gated inner values [A, F], and of the gates."""
    count, slots = call.assignments, call.slots
    d_hidden = torch.empty_like(hidden)
    weighed = hidden.new_empty((count, call.size) if weights else (0,))
    blocks = row_blocks("hidden_grad", call.rows(), call.size, call.width, dy.itemsize, halves=2)
    columns = cdiv(call.size, blocks.columns)
    parts = hidden.new_empty(count, columns, dtype=torch.float32)
    backward.hidden_grad_kernel[(tiles.number * columns,)](
        dy, call.down, hidden, call.gates, *call.sorted(tiles), d_hidden, weighed, parts,
        tiles.number, call.width, call.size, dy.stride(0),
        E=call.num_experts, K=slots, ACTIVATION=call.activation, GATED=call.gated, WEIGHTS=weights,
        **options(blocks, _even(blocks, call.size, call.width)),
    )  # fmt: skip
    d_gates = torch.empty_like(call.gates)
    width = min(128, power_of_two(call.width))
    backward.gate_grad_kernel[(cdiv(count, 32),)](
        parts, dy, call.down_bias, call.ids, d_gates, count, columns, call.width, dy.stride(0),
        E=call.num_experts, K=slots, BIAS=call.down_bias is not None,
        BM=32, BN=width, COLUMNS=power_of_two(columns),
    )  # fmt: skip
    return d_hidden, weighed, d_gates


def _weight_grad(
    call: Call, like: Tensor, left: Tensor, right: Tensor, left_by_row: bool
) -> Tensor:
    """[E, height, width] like the weight: left^T right; one side by row, the other by place."""
    out = torch.empty_like(like)
    _, height, width = like.shape
    blocks = weight_blocks(height, width, left.itemsize)
    per_expert = cdiv(height, blocks.rows) * cdiv(width, blocks.columns)
    even = height % blocks.rows == 0 and width % blocks.columns == 0
    backward.weight_grad_kernel[(call.num_experts * per_expert,)](
        left, right, call.order, call.bounds, out, height, width, left.stride(0), right.stride(0),
        K=call.slots, LEFT_BY_ROW=left_by_row, RIGHT_BY_ROW=not left_by_row,
        **options(blocks, even),
    )  # fmt: skip
    return out


def _bias_grad(call: Call, like: Tensor, rows: Tensor, gated: bool) -> Tensor:
    out = torch.empty_like(like)
    width = like.shape[1]
    columns = divisor(width, 64)
    backward.bias_grad_kernel[(call.num_experts, cdiv(width, columns))](
        rows, call.gates, call.order, call.bounds, out, width, rows.stride(0),
        K=call.slots, GATES=gated, BM=64, BN=columns,
    )  # fmt: skip
    return out
