"""Embeddings against values worked out by hand and against the published conventions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coterie.core.errors import DataError
from coterie.nn.embed import (
    LabelEmbedding,
    TimeEmbedding,
    rotary_table,
    rotate,
    sincos_1d,
    sincos_grid,
    sinusoid,
)


def test_sinusoid_is_cosines_then_sines_of_falling_frequencies() -> None:
    features = sinusoid(torch.tensor([0.0, 3.0]), 4)
    assert features[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    slow = 3.0 / math.sqrt(10000.0)
    expected = [math.cos(3.0), math.cos(slow), math.sin(3.0), math.sin(slow)]
    torch.testing.assert_close(features[1], torch.tensor(expected))


def test_sinusoid_frequencies_span_one_to_almost_the_longest_period() -> None:
    tiny = torch.tensor([1e-3])
    frequency = torch.asin(sinusoid(tiny, 256)[0, 128:].double()) / tiny
    expected = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(frequency, expected, rtol=1e-4, atol=0)


def test_time_embedding_is_two_layers_on_the_sinusoid() -> None:
    embed = TimeEmbedding(6, channels=8).double()
    t = torch.tensor([0.3, 700.0])
    first, second = embed.mlp[0], embed.mlp[2]
    h = sinusoid(t, 8).double() @ first.weight.T + first.bias
    expected = (h * torch.sigmoid(h)) @ second.weight.T + second.bias
    torch.testing.assert_close(embed(t), expected)


def mae_grid(width: int, side: int) -> np.ndarray:
    """Positions as MAE and DiT publish them: the first half of the channels encodes the column."""
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows = []
    for row in range(side):
        for column in range(side):
            parts = [np.sin(column * omega), np.cos(column * omega)]
            parts += [np.sin(row * omega), np.cos(row * omega)]
            rows.append(np.concatenate(parts))
    return np.stack(rows)


@pytest.mark.parametrize(("width", "side"), [(8, 2), (64, 4), (384, 16)])
def test_grid_positions_follow_mae(width: int, side: int) -> None:
    table = sincos_grid((side, side), width).double().numpy()
    np.testing.assert_allclose(table, mae_grid(width, side), atol=1e-6)


def test_grids_of_one_and_three_axes_and_left_over_channels() -> None:
    line = sincos_grid((5,), 8)
    torch.testing.assert_close(line, sincos_1d(torch.arange(5), 8))
    cube = sincos_grid((2, 3, 4), 20)  # three shares of 6; 2 channels are left over
    assert cube.shape == (24, 20) and cube[:, 18:].abs().max() == 0
    assert len(cube.unique(dim=0)) == 24
    innermost = sincos_1d(torch.arange(4), 6)
    torch.testing.assert_close(cube[:4, :6], innermost)


def test_the_last_row_stands_for_no_label() -> None:
    embed = LabelEmbedding(3, 4)
    rows = embed(torch.tensor([0, 2, -1]))
    torch.testing.assert_close(rows, embed.table.weight[[0, 2, 3]])


@pytest.mark.parametrize("label", [3, -2, 1000])
def test_labels_out_of_range_are_named(label: int) -> None:
    with pytest.raises(DataError, match=rf"label: {label} .*0\.\.2, or -1"):
        LabelEmbedding(3, 4)(torch.tensor([0, label]))


def test_rotary_products_depend_on_the_distance_only() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=rng, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_table(12, 8))
    turned_q, turned_k = (rotate(v.expand(1, 1, 12, 8), cos, sin)[0, 0] for v in (q, k))
    products = turned_q @ turned_k.T
    for distance in (-5, 0, 3):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-5)
    assert (products[0, 1] - products[1, 0]).abs() > 1e-3  # the direction matters


def test_rotation_keeps_lengths_and_leaves_position_zero_alone() -> None:
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, *rotary_table(5, 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().min(dim=-1).values.max() > 0
