"""Windows of a grid of tokens, and attention inside them."""

from __future__ import annotations

import itertools

import pytest
import torch

from coterie.core.errors import ConfigError
from coterie.nn.attention import SelfAttention
from coterie.nn.windows import Windows

WIDTH = 12


def attention(windows: Windows | None) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(WIDTH, 3, windows=windows).double()


def tokens(count: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, count, WIDTH, generator=rng, dtype=torch.float64)


def members(windows: Windows) -> list[list[int]]:
    """Token numbers of each window, found by walking over the grid."""
    found: dict[tuple[int, ...], list[int]] = {}
    places = itertools.product(*(range(size) for size in windows.grid))
    for number, place in enumerate(places):
        found.setdefault(tuple(at // windows.side for at in place), []).append(number)
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize(
    ("grid", "side"), [((6,), 2), ((4, 6), 2), ((4, 4, 4), 2), ((2, 4, 6), 2), ((4, 4, 4), 4)]
)
def test_windows_hold_neighbours_and_join_undoes_split(grid: tuple[int, ...], side: int) -> None:
    windows = Windows(grid, side)
    x = tokens(torch.Size(grid).numel())
    cut = windows.split(x)
    wanted = torch.cat([torch.stack([one[ids] for ids in members(windows)]) for one in x])
    assert torch.equal(cut, wanted) and torch.equal(windows.join(cut), x)


def test_attention_in_windows_is_attention_of_each_window_alone() -> None:
    windows = Windows((4, 4, 4), 2)
    layer, plain, x = attention(windows), attention(None), tokens(64)
    y = layer(x)
    for ids in members(windows):
        torch.testing.assert_close(y[:, ids], plain(x[:, ids]))


def test_a_window_as_large_as_the_grid_is_global_attention() -> None:
    x = tokens(64)
    torch.testing.assert_close(attention(Windows((4, 4, 4), 4))(x), attention(None)(x))


def test_windows_do_not_hear_each_other() -> None:
    windows = Windows((4, 4), 2)
    layer, x = attention(windows), tokens(16)
    first, *others = members(windows)
    changed = x.clone()
    changed[:, first[1]] += 1.0
    before, after = layer(x), layer(changed)
    assert all((before[:, i] != after[:, i]).any() for i in first)
    assert all(torch.equal(before[:, ids], after[:, ids]) for ids in others)


def test_padding_is_not_read_inside_windows() -> None:
    windows = Windows((4, 4), 2)
    layer, x = attention(windows), tokens(16)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, [0, 7]] = False
    loud = torch.where(mask[:, :, None], x, torch.full_like(x, 50.0))
    assert torch.equal(layer(x, mask)[mask], layer(loud, mask)[mask])
    assert not torch.equal(layer(x)[mask], layer(x, mask)[mask])


@pytest.mark.parametrize(("grid", "side"), [((4, 6), 4), ((4, 4), 0)])
def test_windows_that_do_not_fit_are_refused(grid: tuple[int, ...], side: int) -> None:
    with pytest.raises(ConfigError, match=rf"window: {side} .*divisor of the grid"):
        Windows(grid, side)
