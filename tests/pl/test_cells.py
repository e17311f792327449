from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.image import AxesImage

from pekasc.pl import _cells
from pekasc.pl._cells import Cells, box_around, draw_cells
from pekasc.tiling import cell_corners

NORM = Normalize(0, 10)


def _grid(n_x: int = 5, n_y: int = 4) -> np.ndarray:
    x, y = np.meshgrid(100 + 30.0 * np.arange(n_x), 50 + 30.0 * np.arange(n_y))
    return np.column_stack([x.ravel(), y.ravel()])


def _axes() -> plt.Axes:
    ax = plt.figure(figsize=(4, 4), dpi=50).add_axes((0, 0, 1, 1))
    ax.set_aspect("equal")
    return ax


def test_square_grid_is_an_image_in_micrometers() -> None:
    centres, values = _grid(), np.arange(20.0)
    keep = np.random.default_rng(0).permutation(20)[:17]  # in any order, three cells without a tile
    values[3] = np.nan
    drawn = draw_cells(_axes(), Cells(centres[keep], 30.0), values[keep], norm=NORM, cmap="magma")
    assert isinstance(drawn, AxesImage)
    expected = np.full(20, np.nan)
    expected[keep] = values[keep]
    np.testing.assert_array_equal(drawn.get_array().filled(np.nan), expected.reshape(4, 5))
    assert drawn.get_extent() == [85, 235, 155, 35]
    assert drawn.norm is NORM and drawn.get_cmap().name == "magma" and drawn.get_interpolation() == "nearest"


@pytest.mark.parametrize("shape", ["square", "hexagon"])
def test_other_grids_are_polygons_at_their_places(shape: str) -> None:
    centres, values = _grid(), np.arange(20.0)
    centres[7] += 4  # not on a square grid
    values[3] = np.nan
    ax = _axes()
    drawn = draw_cells(ax, Cells(centres, 30.0, shape), values, norm=NORM, cmap="magma")
    assert isinstance(drawn, PolyCollection) and drawn.get_rasterized()
    known = np.arange(20) != 3
    np.testing.assert_array_equal(drawn.get_offsets(), centres[known])
    np.testing.assert_array_equal(drawn.get_array(), values[known])
    (path,) = drawn.get_paths()
    np.testing.assert_allclose(path.vertices[:-1], cell_corners(np.zeros((1, 2)), 30.0, shape)[0])


def test_both_ways_paint_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    centres = _grid()
    values = np.random.default_rng(1).integers(0, 3, 20).astype(float)
    values[[2, 11]] = np.nan
    pictures = []
    for limit in (10**6, 0):
        monkeypatch.setattr(_cells, "_MAX_PIXELS", limit)
        ax = _axes()
        ax.axis("off")
        kind = draw_cells(
            ax, Cells(centres, 30.0), values, norm=Normalize(-0.5, 2.5), cmap=ListedColormap(["red", "lime", "blue"])
        )
        assert isinstance(kind, AxesImage if limit else PolyCollection)
        ax.set(xlim=(75, 245), ylim=(165, 25))
        ax.figure.canvas.draw()
        pictures.append(np.asarray(ax.figure.canvas.buffer_rgba())[..., :3])
    assert (pictures[0] != 255).any(axis=-1).mean() > 0.4
    assert (pictures[0] != pictures[1]).any(axis=-1).mean() < 0.03  # borders of cells


def test_few_tiles_far_apart_make_no_huge_image() -> None:
    centres = np.array([[0.0, 0.0], [1e6, 1e6]])
    assert isinstance(draw_cells(_axes(), Cells(centres, 1.0), np.ones(2), norm=NORM, cmap="magma"), PolyCollection)


def test_outlines_of_tiles_of_several_parts() -> None:
    triangle = np.array([[0.0, 0], [3, 0], [0, 3], [0, 0]])
    cells = Cells(
        np.zeros((3, 2)), outlines=[triangle, triangle + 10, triangle + 20, triangle + 30], owner=np.array([0, 1, 1, 2])
    )
    drawn = draw_cells(_axes(), cells, np.array([5.0, 6.0, np.nan]), norm=NORM, cmap="magma")
    np.testing.assert_array_equal(drawn.get_array(), [5, 6, 6])
    np.testing.assert_array_equal([path.vertices[0, 0] for path in drawn.get_paths()], [0, 10, 20])
    low, high = cells.bounds()
    assert low.tolist() == [0, 0] and high.tolist() == [33, 33]


def test_bounds_are_those_of_whole_cells() -> None:
    low, high = Cells(_grid(), 30.0).bounds()
    assert low.tolist() == [85, 35] and high.tolist() == [235, 155]
    low, high = Cells(_grid(), 30.0, "hexagon").bounds()
    np.testing.assert_allclose(high, [235, 140 + 30 / np.sqrt(3)])
    assert box_around(np.array([[0.0, 0], [100, 50]]), np.array([-100.0, 0])) == (-106, -6, 106, 56)
