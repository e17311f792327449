"""Tile specification, corners, fraction inside the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import shapely

from pekasc.tiling import TileGeometry, TileSpec


def rotation(degrees: float, scale: float = 1.0) -> np.ndarray:
    a = np.deg2rad(degrees)
    return scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


@pytest.mark.parametrize(
    ("tile_px", "mpp", "error", "match"),
    [
        (0, 0.5, ValueError, r"`tile_px` must be a positive integer, got 0"),
        (-3, 0.5, ValueError, r"`tile_px` must be a positive integer, got -3"),
        (22.4, 0.5, TypeError, r"`tile_px` must be a positive integer, got 22.4 of type float"),
        (True, 0.5, TypeError, r"got True of type bool"),
        (224, 0.0, ValueError, r"`mpp` must be a positive number, got 0.0"),
        (224, float("nan"), ValueError, r"`mpp` must be a positive number, got nan"),
        (224, float("inf"), ValueError, r"got inf"),
        (224, "0.5", TypeError, r"`mpp` must be a positive number, got '0.5' of type str"),
    ],
)
def test_spec_refuses_what_is_no_tile(tile_px: Any, mpp: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        TileSpec(tile_px, mpp)


def test_spec_holds_plain_numbers() -> None:
    spec = TileSpec(np.int64(112), np.float32(0.5))  # type: ignore[arg-type]
    assert type(spec.tile_px) is int
    assert type(spec.mpp) is float
    assert spec.side_um == 56.0
    assert spec == TileSpec(112, 0.5)


@pytest.mark.parametrize(
    ("centres", "matrix", "match"),
    [
        ([[1.0, 2.0, 3.0]], np.eye(2), r"shape \(n, 2\), got \(1, 3\)"),
        ([[1.0, 2.0], [np.nan, 1.0]], np.eye(2), r"1 centres that are not finite, the first at row 1"),
        ([[1.0, 2.0]], np.eye(3), r"shape \(2, 2\), got \(3, 3\)"),
        ([[1.0, 2.0]], np.ones((2, 2)), r"invertible, got \[\[1.0, 1.0\], \[1.0, 1.0\]\]"),
        ([[1.0, 2.0]], [[np.inf, 0], [0, 1]], r"finite"),
    ],
)
def test_geometry_refuses_bad_arrays(centres: Any, matrix: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TileGeometry(np.array(centres), np.array(matrix), TileSpec(8, 1.0))


def test_geometry_leaves_the_callers_arrays_alone() -> None:
    centres, matrix = np.ones((3, 2)), np.eye(2)
    geometry = TileGeometry(centres, matrix, TileSpec(8, 1.0))
    centres[:] = 7
    matrix[:] = 7
    assert (geometry.centres_px == 1).all()
    assert (geometry.um_to_px == np.eye(2)).all()


def test_no_tiles_are_fine() -> None:
    geometry = TileGeometry(np.empty((0, 2)), np.eye(2), TileSpec(8, 1.0))
    assert len(geometry) == 0
    assert geometry.corners().shape == (0, 4, 2)
    assert geometry.inside(10, 10).shape == (0,)


def test_corners_follow_rotation_and_anisotropy() -> None:
    # a quarter turn: the tile's right (x) is the image's down (y); 2 px per um along the image's y only
    matrix = np.array([[0.0, -1.0], [2.0, 0.0]])
    corners = TileGeometry(np.array([[100.0, 50.0]]), matrix, TileSpec(10, 1.0)).corners()
    # upper left of the tile is (-5, -5) um -> (5, -10) px
    np.testing.assert_allclose(corners[0], [[105, 40], [105, 60], [95, 60], [95, 40]])


def test_inside_is_a_closed_form_for_upright_tiles() -> None:
    centres = np.array([[50, 40], [0, 40], [100, 0], [100, 80], [2.5, 40], [-5, 40], [-50, -50], [105, 40]], float)
    inside = TileGeometry(centres, np.eye(2), TileSpec(10, 1.0)).inside(100, 80)
    assert inside.dtype == np.float32
    np.testing.assert_allclose(inside, [1, 0.5, 0.25, 0.25, 0.75, 0, 0, 0], atol=1e-7)


def test_a_tile_larger_than_the_image_counts_the_image() -> None:
    inside = TileGeometry(np.array([[5.0, 5.0]]), np.eye(2), TileSpec(100, 1.0)).inside(10, 10)
    np.testing.assert_allclose(inside, 0.01)


@pytest.mark.parametrize("matrix", [rotation(30), rotation(45, 2.0), rotation(90), np.array([[1.0, 0.4], [0.0, -1.3]])])
def test_inside_equals_polygon_clipping_at_any_affine(matrix: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform(-20, 120, (60, 2))
    geometry = TileGeometry(centres, matrix, TileSpec(16, 1.0))
    half = 8.0
    image = shapely.box(0, 0, 100, 90)
    expected = []
    for centre in centres:
        points = [centre + matrix @ p for p in ((-half, -half), (half, -half), (half, half), (-half, half))]
        square = shapely.Polygon(points)
        expected.append(square.intersection(image).area / square.area)
    inside = geometry.inside(100, 90)
    assert 0 < np.mean((inside > 0) & (inside < 1)) < 1
    np.testing.assert_allclose(inside, expected, atol=1e-6)


def test_inside_of_a_rotated_tile_agrees_with_counting_points() -> None:
    matrix = rotation(20)
    geometry = TileGeometry(np.array([[3.0, 4.0]]), matrix, TileSpec(20, 1.0))
    grid = (np.arange(1000) + 0.5) / 50 - 10
    points = np.stack(np.meshgrid(grid, grid), axis=-1) @ matrix.T + [3.0, 4.0]
    assert geometry.inside(100, 100)[0] == pytest.approx((points > 0).all(axis=-1).mean(), abs=1e-3)
