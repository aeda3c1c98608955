"""Kernels of a feed-forward expert layer, backward; the words are those of ``kernels``.

Saved are x, the argument of the activation and the choices. With ``q = dy W_down`` (no gate) the
gradient of a gate is ``<q, inner>`` (+ ``<dy, b_down>``), so answers need not be kept (the same
identity as in SonicMoE, arXiv:2512.14080); the activation is computed again where it is needed.
No sum crosses programs: results do not depend on the order of execution.
"""

from __future__ import annotations

import triton
import triton.language as tl

from coterie.experts.dispatch.triton.kernels import activate, product, tile_and_column


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """Derivative of the activation at x f32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406861290190927 * x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x > 0.0, 1.0, 0.0)
    return y


@triton.jit
def through_activation(
    q, gate, hidden, d_hidden, weighed, rows, n, mine, size,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Store what follows from q [BM, columns n] at rows of these pointers; <q, inner> [BM]."""
    halves: tl.constexpr = 2 if GATED else 1
    stored = mine[:, None] & (n < size)[None, :]
    kept = rows[:, None] * (halves * size) + n[None, :]
    argument = tl.load(hidden + kept, mask=stored, other=0.0).to(tl.float32)
    inner = activate(argument, ACTIVATION)
    d_argument = gate[:, None] * q * slope(argument, ACTIVATION)
    if GATED:
        d_value = gate[:, None] * q * inner
        tl.store(d_hidden + kept + size, d_value.to(d_hidden.dtype.element_ty), mask=stored)
        value = tl.load(hidden + kept + size, mask=stored, other=0.0).to(tl.float32)
        d_argument *= value
        inner *= value
    tl.store(d_hidden + kept, d_argument.to(d_hidden.dtype.element_ty), mask=stored)
    if WEIGHTS:
        into = weighed + rows[:, None] * size + n[None, :]
        tl.store(into, (gate[:, None] * inner).to(weighed.dtype.element_ty), mask=stored)
    return tl.sum(tl.where(stored, q * inner, 0.0), axis=1)


@triton.jit
def hidden_grad_kernel(
    dy, down, hidden, gates, order, bounds, tile_expert, tile_place, d_hidden, weighed, d_gates,
    num_tiles, width, size, dy_row,
    E: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    WEIGHTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d_hidden [A, F or 2F] by place; parts of d_gates f32 [A, columns] by position; and, where
    weights learn, ``weighed`` [A, F] = gate * inner, what the gradient of ``down`` reads."""
    num_columns = tl.cdiv(size, BN)
    tile, column = tile_and_column(num_tiles, num_columns, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= E:
        return
    first = tl.load(tile_place + tile)
    place = first + tl.arange(0, BM)
    mine = place < tl.load(bounds + expert + 1)
    position = tl.load(order + place, mask=mine, other=0).to(tl.int64)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = dy + (position // K)[:, None] * dy_row + k[None, :]
    weights = down + expert.to(tl.int64) * width * size + k[:, None] * size + n[None, :]
    q = tl.zeros((BM, BN), dtype=tl.float32)
    q = product(
        q, rows, weights, k, width, BK, BK * size, n < size, BK, EVEN, PRECISION, UPCAST
    )  # fmt: skip
    # The rows of a tile lie together: 64 bits for the first, 32 for the way from there.
    start = first.to(tl.int64) * size
    halves: tl.constexpr = 2 if GATED else 1
    hidden += halves * start
    d_hidden += halves * start
    if WEIGHTS:
        weighed += start
    rows = tl.arange(0, BM)
    gate = tl.load(gates + position, mask=mine, other=0.0)
    # In two halves: arguments, slopes and products of all columns would not fit into registers.
    left, right = tl.split(tl.permute(tl.reshape(q, (BM, 2, BN // 2)), (0, 2, 1)))
    n = column * BN + tl.arange(0, BN // 2)
    part = through_activation(
        left, gate, hidden, d_hidden, weighed, rows, n, mine, size, ACTIVATION, GATED, WEIGHTS
    )  # fmt: skip
    part += through_activation(
        right, gate, hidden, d_hidden, weighed, rows, n + BN // 2, mine, size,
        ACTIVATION, GATED, WEIGHTS,
    )  # fmt: skip
    tl.store(d_gates + position * num_columns + column, part, mask=mine)


@triton.jit
def gate_grad_kernel(
    parts, dy, down_bias, ids, d_gates, count, num_columns, width, dy_row,
    E: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_gates f32 [A] by position: the sum of its parts [A, columns] and <dy, b_down>; 0 where a
    slot chose nobody."""
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    expert = tl.load(ids + position, mask=position < count, other=E)
    chosen = expert < E
    c = tl.arange(0, COLUMNS)
    position = position.to(tl.int64)
    some = chosen[:, None] & (c < num_columns)[None, :]
    part = tl.load(parts + position[:, None] * num_columns + c[None, :], mask=some, other=0.0)
    total = tl.sum(part, axis=1)
    if BIAS:
        n = tl.arange(0, BN)
        for start in range(0, width, BN):
            read = chosen[:, None] & (n < width - start)[None, :]
            from_bias = down_bias + expert.to(tl.int64)[:, None] * width + start + n[None, :]
            from_dy = dy + (position // K)[:, None] * dy_row + start + n[None, :]
            b = tl.load(from_bias, mask=read, other=0.0).to(tl.float32)
            total += tl.sum(b * tl.load(from_dy, mask=read, other=0.0).to(tl.float32), axis=1)
    tl.store(d_gates + position, total, mask=position < count)


@triton.jit
def weight_grad_kernel(
    left, right, order, bounds, out, height, width, left_row, right_row,
    K: tl.constexpr, LEFT_BY_ROW: tl.constexpr, RIGHT_BY_ROW: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [E, height, width]: left^T right over the places of each expert; 0 where it has none.

    A side is read by place, or (``BY_ROW``) by the row of each assignment.
    """
    per_expert = tl.cdiv(height, BM) * tl.cdiv(width, BN)
    expert = tl.program_id(0) // per_expert
    inside = tl.program_id(0) % per_expert
    group = inside // (GROUP * tl.cdiv(width, BN))
    inside = inside % (GROUP * tl.cdiv(width, BN))
    rows = tl.minimum(tl.cdiv(height, BM) - group * GROUP, GROUP)
    m = (group * GROUP + inside % rows) * BM + tl.arange(0, BM)
    n = inside // rows * BN + tl.arange(0, BN)
    begin = tl.load(bounds + expert)
    end = tl.load(bounds + expert + 1)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(begin, end, BK):
        place = start + tl.arange(0, BK)
        mine = place < end
        source = place.to(tl.int64)
        if LEFT_BY_ROW or RIGHT_BY_ROW:
            row = tl.load(order + place, mask=mine, other=0).to(tl.int64) // K
        from_left = left + (row if LEFT_BY_ROW else source)[None, :] * left_row + m[:, None]
        from_right = right + (row if RIGHT_BY_ROW else source)[:, None] * right_row + n[None, :]
        # Both are masked: a row of nobody may hold NaN.
        if EVEN:
            a = tl.load(from_left, mask=mine[None, :], other=0.0)
            b = tl.load(from_right, mask=mine[:, None], other=0.0)
        else:
            a = tl.load(from_left, mask=mine[None, :] & (m < height)[:, None], other=0.0)
            b = tl.load(from_right, mask=mine[:, None] & (n < width)[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = expert.to(tl.int64) * height * width + m.to(tl.int64)[:, None] * width + n[None, :]
    stored = (m < height)[:, None] & (n < width)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit
def bias_grad_kernel(
    rows_in, gates, order, bounds, out, width, row_stride,
    K: tl.constexpr, GATES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [E, width]: the sum of an expert's rows; with ``GATES`` of gate * row, read by row."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.load(bounds + expert)
    end = tl.load(bounds + expert + 1)
    acc = tl.zeros((BN,), dtype=tl.float32)
    for start in range(begin, end, BM):
        place = start + tl.arange(0, BM)
        mine = place < end
        source = place.to(tl.int64)
        if GATES:
            position = tl.load(order + place, mask=mine, other=0).to(tl.int64)
            source = position // K
        at = rows_in + source[:, None] * row_stride + n[None, :]
        value = tl.load(at, mask=mine[:, None] & (n < width)[None, :], other=0.0).to(tl.float32)
        if GATES:
            value *= tl.load(gates + position, mask=mine, other=0.0)[:, None]
        acc += tl.sum(value, axis=0)
    into = out + expert.to(tl.int64) * width + n
    tl.store(into, acc.to(out.dtype.element_ty), mask=n < width)
