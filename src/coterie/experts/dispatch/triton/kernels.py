"""Kernels of a feed-forward expert layer, forward: rows by expert, read and written by index.

Legend: R rows, K slots of a row, A = R * K assignments, E experts, D width, F inner size. An
assignment has a *position* ``row * K + slot`` and a *place* in the order by expert;
``order[place]`` is its position, ``bounds[e]`` the first place of expert e, and places from
``bounds[E]`` on belong to nobody. A *tile* is a run of at most ``BM`` places of one expert.

Weights are [E, out, in] as the pool stores them. Products accumulate in float32. ``UPCAST``: raise
operands to float32, since Triton's interpreter multiplies bfloat16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_kernel(
    bounds, tile_expert, tile_place, num_tiles,
    E: tl.constexpr, BM: tl.constexpr, ROUND_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The expert and first place of each tile; expert E for tiles beyond the last one."""
    experts = tl.arange(0, ROUND_E)
    known = experts < E
    first = tl.load(bounds + experts, mask=known, other=0)
    last = tl.load(bounds + experts + 1, mask=known, other=0)
    tiles = (last - first + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = (ends[None, :] <= tile[:, None]) & known[None, :]
    expert = tl.sum(before.to(tl.int32), axis=1)
    passed = tl.sum(tl.where(before, tiles[None, :], 0), axis=1)
    place = tl.load(bounds + expert, mask=tile < num_tiles, other=0) + (tile - passed) * BM
    tl.store(tile_expert + tile, expert, mask=tile < num_tiles)
    tl.store(tile_place + tile, place, mask=tile < num_tiles)


@triton.jit
def tile_and_column(num_tiles, num_columns, GROUP: tl.constexpr):
    """Which tile and column block a program serves: GROUP tiles share their columns in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    inside = program % (GROUP * num_columns)
    rows = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + inside % rows, inside // rows


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x f32. 1 + tanh(z) = 2 sigmoid(2 z) serves the tanh approximation of GELU."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACTIVATION == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x <= 0.0, 0.0, x)
    return y


@triton.jit
def product(
    acc, rows, weights, k, size, step_rows, step_weights, columns_inside,
    BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + rows [BM, size] @ weights [size, BN], by pointers to the first BK of each."""
    for start in range(0, size, BK):
        if EVEN:
            a = tl.load(rows)
            b = tl.load(weights)
        else:
            inside = k < size - start
            a = tl.load(rows, mask=inside[None, :], other=0.0)
            b = tl.load(weights, mask=inside[:, None] & columns_inside[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        rows += step_rows
        weights += step_weights
    return acc


@triton.jit
def two_products(
    acc, second, rows, weights, values, k, size, columns_inside,
    BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``product`` with two weights [size, BN] that run along ``k``; rows are read once."""
    for start in range(0, size, BK):
        if EVEN:
            a = tl.load(rows)
            b = tl.load(weights)
            c = tl.load(values)
        else:
            inside = k < size - start
            a = tl.load(rows, mask=inside[None, :], other=0.0)
            b = tl.load(weights, mask=inside[:, None] & columns_inside[None, :], other=0.0)
            c = tl.load(values, mask=inside[:, None] & columns_inside[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            c = c.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        second = tl.dot(a, c, second, input_precision=PRECISION)
        rows += BK
        weights += BK
        values += BK
    return acc, second


@triton.jit
def hidden_kernel(
    x, up, up_bias, order, bounds, tile_expert, tile_place, hidden, inner,
    num_tiles, width, size, x_row,
    E: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """inner [A, F] = activation(x W_up + b), by place; ``hidden`` [A, F or 2F] keeps its argument.

    x [R, D] is read through ``order``; with a gate, the two halves of ``up`` [E, 2F, D] share the
    read of x and meet in registers.
    """
    tile, column = tile_and_column(num_tiles, tl.cdiv(size, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= E:
        return
    first = tl.load(tile_place + tile)
    place = first + tl.arange(0, BM)
    mine = place < tl.load(bounds + expert + 1)
    row = tl.load(order + place, mask=mine, other=0).to(tl.int64) // K
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = n < size
    rows = x + row[:, None] * x_row + k[None, :]
    halves: tl.constexpr = 2 if GATED else 1
    start = expert.to(tl.int64) * halves * size
    weights = up + start * width + n[None, :] * width + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if GATED:
        second = tl.zeros((BM, BN), dtype=tl.float32)
        values = up + (start + size) * width + n[None, :] * width + k[:, None]
        acc, second = two_products(
            acc, second, rows, weights, values, k, width, inside, BK, EVEN, PRECISION, UPCAST
        )  # fmt: skip
    else:
        acc = product(
            acc, rows, weights, k, width, BK, BK, inside, BK, EVEN, PRECISION, UPCAST
        )  # fmt: skip
    if BIAS:
        acc += tl.load(up_bias + start + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            shift = tl.load(up_bias + start + size + n, mask=inside, other=0.0)
            second += shift.to(tl.float32)[None, :]
    # The rows of a tile lie together: 64 bits for the first, 32 for the way from there.
    stored = mine[:, None] & inside[None, :]
    place = tl.arange(0, BM)
    if KEEP:
        hidden += first.to(tl.int64) * halves * size
        kept = hidden + place[:, None] * (halves * size) + n[None, :]
        tl.store(kept, acc.to(hidden.dtype.element_ty), mask=stored)
        if GATED:
            tl.store(kept + size, second.to(hidden.dtype.element_ty), mask=stored)
    y = activate(acc, ACTIVATION)
    if GATED:
        y *= second
    into = inner + first.to(tl.int64) * size + place[:, None] * size + n[None, :]
    tl.store(into, y.to(inner.dtype.element_ty), mask=stored)


@triton.jit
def answer_kernel(
    rows_in, weight, bias, gates, order, bounds, tile_expert, tile_place, out,
    num_tiles, read, written, weight_k, weight_n,
    E: tl.constexpr, GATES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[position] = gate * (rows_in[place] W + b): rows [A, read] by place -> [A, written] by
    position. Element (k, n) of an expert's W lies at ``k * weight_k + n * weight_n``."""
    tile, column = tile_and_column(num_tiles, tl.cdiv(written, BN), GROUP)
    expert = tl.load(tile_expert + tile)
    if expert >= E:
        return
    place = tl.load(tile_place + tile) + tl.arange(0, BM)
    mine = place < tl.load(bounds + expert + 1)
    source = tl.where(mine, place, 0).to(tl.int64)
    position = tl.load(order + place, mask=mine, other=0).to(tl.int64)
    n = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = n < written
    rows = rows_in + source[:, None] * read + k[None, :]
    start = expert.to(tl.int64) * read * written
    weights = weight + start + k[:, None] * weight_k + n[None, :] * weight_n
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = product(
        acc, rows, weights, k, read, BK, BK * weight_k, inside, BK, EVEN, PRECISION, UPCAST
    )  # fmt: skip
    if BIAS:
        shift = tl.load(bias + expert.to(tl.int64) * written + n, mask=inside, other=0.0)
        acc += shift.to(tl.float32)[None, :]
    if GATES:
        acc *= tl.load(gates + position, mask=mine, other=0.0)[:, None]
    into = out + position[:, None] * written + n[None, :]
    tl.store(into, acc.to(out.dtype.element_ty), mask=mine[:, None] & inside[None, :])


@triton.jit
def sum_kernel(
    answers, ids, out, num_rows, width,
    E: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [R, D] = sum of answers [R, K, D] over the slots that chose somebody, in float32."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (row < num_rows)[:, None] & (n < width)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    row = row.to(tl.int64)
    for slot in tl.static_range(K):
        chosen = tl.load(ids + row * K + slot, mask=row < num_rows, other=E) < E
        one = answers + (row * K + slot)[:, None] * width + n[None, :]
        acc += tl.load(one, mask=inside & chosen[:, None], other=0.0).to(tl.float32)
    into = out + row[:, None] * width + n[None, :]
    tl.store(into, acc.to(out.dtype.element_ty), mask=inside)
