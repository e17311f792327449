"""Grids: spacing, coverage, numbering, and cells that fill the plane."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from scipy.spatial import cKDTree

from pekasc.tiling import cell_corners, grid_positions


def test_a_square_grid_covers_the_rectangle() -> None:
    at, index = grid_positions(np.array([10.0, 20]), np.array([410.0, 320]), 100)
    assert at.shape == (4 * 3, 2)
    np.testing.assert_array_equal(at[0], [60, 70])
    np.testing.assert_array_equal(at[-1], [360, 270])
    np.testing.assert_array_equal(index[:5], [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])


@pytest.mark.parametrize(("shape", "neighbours"), [("square", 4), ("hexagon", 6)])
def test_neighbours_are_a_stride_away(shape: str, neighbours: int) -> None:
    at, _ = grid_positions(np.zeros(2), np.array([1000.0, 900]), 55, shape)
    near = cKDTree(at).query(at, k=8)[0][:, 1:]
    assert near.min() == pytest.approx(55)
    inner = ((at > 150) & (at < [850, 750])).all(axis=1)
    assert (np.isclose(near[inner], 55).sum(axis=1) == neighbours).all()


@pytest.mark.parametrize("shape", ["square", "hexagon"])
def test_cells_fill_the_plane_once(shape: str) -> None:
    at, _ = grid_positions(np.zeros(2), np.array([800.0, 800]), 40, shape)
    cells = shapely.polygons(cell_corners(at, 40, shape))
    union = shapely.union_all(cells)
    assert shapely.area(cells).sum() == pytest.approx(shapely.area(union), rel=1e-6)
    assert shapely.contains(shapely.buffer(union, 1e-6), shapely.box(60, 60, 700, 700))
    centres = shapely.get_coordinates(shapely.centroid(cells))
    np.testing.assert_allclose(centres, at)


def test_less_than_a_stride_has_one_position_or_none() -> None:
    at, _ = grid_positions(np.zeros(2), np.array([30.0, 250]), 100)
    assert (at >= 0).all() and (at <= [30, 250]).all()
