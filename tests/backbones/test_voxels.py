"""Points to voxels and back: means, linear fields, order, place and scale, what is refused."""

from __future__ import annotations

import pytest
import torch

from coterie.backbones.voxels import check_clouds, devoxelise, place, voxelise
from coterie.core.errors import DataError

SIZE = 6


def clouds(batch: int = 2, points: int = 80) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(batch, points, 3, generator=rng, dtype=torch.float64)


def test_an_occupied_cell_holds_the_mean_of_its_points_and_an_empty_one_zero() -> None:
    x = clouds()
    voxels = voxelise(x, SIZE)
    assert voxels.means.shape == (2, SIZE**3, 3) and voxels.counts.sum().item() == 160
    for b in range(2):
        centred = x[b] - x[b].mean(0)
        near = ((centred / (2 * centred.norm(dim=1).max()) + 0.5) * SIZE).clamp(0, SIZE - 1)
        assert torch.allclose(voxels.coordinates[b], near)
        i, j, k = near.round().long().unbind(1)
        assert torch.equal(voxels.cells[b], i * SIZE * SIZE + j * SIZE + k)
        for cell in range(SIZE**3):
            inside = x[b][voxels.cells[b] == cell]
            assert voxels.counts[b, cell] == len(inside)
            wanted = inside.mean(0) if len(inside) else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(voxels.means[b, cell], wanted)


def test_a_linear_field_comes_back_exactly() -> None:
    axis = torch.arange(SIZE, dtype=torch.float64)
    at = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
    slope = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.7, 0.1]], dtype=torch.float64)
    field = at @ slope + 0.25
    at_centres = devoxelise(field[None], at[None], SIZE)
    torch.testing.assert_close(at_centres[0], field)
    anywhere = place(clouds(), SIZE)
    values = devoxelise(field.expand(2, -1, -1), anywhere, SIZE)
    torch.testing.assert_close(values, anywhere @ slope + 0.25)


def test_the_order_of_points_does_not_change_the_grid() -> None:
    x, order = clouds(), torch.randperm(80, generator=torch.Generator().manual_seed(1))
    before, after = voxelise(x, SIZE), voxelise(x[:, order], SIZE)
    torch.testing.assert_close(after.means, before.means)
    assert torch.equal(after.counts, before.counts)
    assert torch.allclose(after.coordinates, before.coordinates[:, order])


def test_place_and_scale_of_a_cloud_do_not_move_its_cells() -> None:
    x = clouds()
    moved = 7 * x + torch.tensor([3.0, -2.0, 1.0])
    torch.testing.assert_close(place(moved, SIZE), place(x, SIZE))
    found = place(x, SIZE)
    assert found.min() >= 0 and found.max() <= SIZE - 1


def test_half_precision_clouds_are_averaged_in_single() -> None:
    x = (100 + clouds(1, 400)).half()
    voxels = voxelise(x, 2)
    assert voxels.means.dtype == torch.float32
    for cell in voxels.cells[0].unique():
        exact = x[0][voxels.cells[0] == cell].double().mean(0)
        assert (voxels.means[0, cell] - exact).abs().max() < 1e-4


def test_gradients_reach_features_and_cells_but_not_coordinates() -> None:
    x = clouds(1, 10).requires_grad_(True)
    voxels = voxelise(x, SIZE)
    assert not voxels.coordinates.requires_grad
    (gradient,) = torch.autograd.grad(voxels.means.sum(), x)
    torch.testing.assert_close(
        gradient, 1 / voxels.counts[0, voxels.cells[0]].double()[None, :, None].expand(1, 10, 3)
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "cloud 1 holds NaN"), (float("inf"), "cloud 1 holds NaN or infinity")],
)
def test_a_cloud_that_is_not_finite_is_named(value: float, message: str) -> None:
    x = clouds(3)
    x[1, 5, 2] = value
    with pytest.raises(DataError, match=message):
        check_clouds(x)


def test_a_cloud_in_one_place_is_named() -> None:
    x = clouds(3)
    x[2] = 0.25
    with pytest.raises(DataError, match="cloud 2 has all its points in one place"):
        check_clouds(x)
    check_clouds(clouds())
