"""Tiles against independent resampling: area averages, copies, rotations, interpolation, pyramid levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.transform import downscale_local_mean

from pekasc.tiling import ImagePyramid, TileGeometry, TileReader, TileSpec

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (3, 300, 340), dtype=np.uint8)
TURNS = {
    "none": (np.array([[1.0, 0.0], [0.0, 1.0]]), lambda t: t),
    "flip x": (np.array([[-1.0, 0.0], [0.0, 1.0]]), lambda t: t[:, ::-1]),
    "flip y": (np.array([[1.0, 0.0], [0.0, -1.0]]), lambda t: t[::-1]),
    "half turn": (np.array([[-1.0, 0.0], [0.0, -1.0]]), lambda t: t[::-1, ::-1]),
    "transpose": (np.array([[0.0, 1.0], [1.0, 0.0]]), lambda t: t.transpose(1, 0, 2)),
    "quarter turn": (np.array([[0.0, -1.0], [1.0, 0.0]]), lambda t: np.rot90(t, 1)),
    "quarter turn back": (np.array([[0.0, 1.0], [-1.0, 0.0]]), lambda t: np.rot90(t, -1)),
}


def reader(image: Any, centres: Any, um_to_px: np.ndarray, tile_px: int, mpp: float = 1.0, **kwargs: Any) -> TileReader:
    geometry = TileGeometry(np.array(centres, float), um_to_px, TileSpec(tile_px, mpp))
    return TileReader(ImagePyramid([image], [(1, 1)]), geometry, **kwargs)


def one_tile(image: Any, centre: Any, um_to_px: np.ndarray, tile_px: int, mpp: float = 1.0) -> np.ndarray:
    return reader(image, [centre], um_to_px, tile_px, mpp).read(np.array([0]))[0]


def rotation(degrees: float, scale: float = 1.0) -> np.ndarray:
    a = np.deg2rad(degrees)
    return scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


def area_means(image: np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
    """Exact area averages of piecewise constant pixels from the integral image, which is linear within a pixel."""
    total = np.pad(image.astype(float), ((0, 0), (1, 0), (1, 0))).cumsum(axis=1).cumsum(axis=2)
    y, x = np.meshgrid(y_edges, x_edges, indexing="ij")
    at_edges = np.stack([ndimage.map_coordinates(t, [y, x], order=1) for t in total], axis=-1)
    sums = np.diff(np.diff(at_edges, axis=0), axis=1)
    return sums / np.diff(y_edges)[:, None, None] / np.diff(x_edges)[None, :, None]


def rotated_means(image: np.ndarray, centre: Any, um_to_px: np.ndarray, tile_px: int, samples: int = 25) -> np.ndarray:
    """Area averages by brute force: nearest pixels at many points of every output pixel."""
    steps = (np.arange(tile_px * samples) + 0.5) / samples - tile_px / 2
    column, row = np.meshgrid(steps, steps)
    x = centre[0] + um_to_px[0, 0] * column + um_to_px[0, 1] * row
    y = centre[1] + um_to_px[1, 0] * column + um_to_px[1, 1] * row
    points = image[:, np.floor(y).astype(int), np.floor(x).astype(int)].astype(float)
    return points.reshape(3, tile_px, samples, tile_px, samples).mean(axis=(2, 4)).transpose(1, 2, 0)


# --- copies ---


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("mpp", [1.0, 0.69])
def test_whole_pixel_shift_is_a_copy_in_every_orientation(turn: str, mpp: float) -> None:
    matrix, turned = TURNS[turn]
    # pixels 50..81 and 120..151; a pixel size that is no binary fraction must not smear
    tile = one_tile(NOISE, (136.0, 66.0), matrix / mpp, 32, mpp)
    assert np.array_equal(tile, turned(NOISE[:, 50:82, 120:152].transpose(1, 2, 0)))


def test_odd_tiles_are_centred_on_pixel_centres() -> None:
    tile = one_tile(NOISE, (100.5, 60.5), np.eye(2), 5)
    assert np.array_equal(tile, NOISE[:, 58:63, 98:103].transpose(1, 2, 0))


def test_rounding_in_coordinates_does_not_blur() -> None:
    tile = one_tile(NOISE, (136.0 + 1e-9, 66.0 - 1e-9), np.eye(2) * (1 + 1e-12), 32)
    assert np.array_equal(tile, NOISE[:, 50:82, 120:152].transpose(1, 2, 0))


# --- area averages ---


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_integer_downscaling_equals_block_means(factor: int) -> None:
    side = 24 * factor
    tile = one_tile(NOISE, (20 + side / 2, 30 + side / 2), np.eye(2) * factor, 24)
    crop = NOISE[:, 30 : 30 + side, 20 : 20 + side].transpose(1, 2, 0)
    means = downscale_local_mean(crop.astype(float), (factor, factor, 1))
    assert np.array_equal(tile, np.floor(means + 0.5).astype(np.uint8))
    pil = np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((24, 24), Image.Resampling.BOX))
    assert np.abs(tile.astype(int) - pil).max() <= 1


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("scale", [1.0, 1.4554, 2.9])
def test_fractional_downscaling_is_the_exact_area_average(turn: str, scale: float) -> None:
    matrix, turned = TURNS[turn]
    centre = (151.37, 140.81)
    edges = (np.arange(41) - 20) * scale
    expected = turned(area_means(NOISE, centre[0] + edges, centre[1] + edges))
    tile = one_tile(NOISE, centre, matrix * scale, 40)
    # rounding alone is left
    assert np.abs(tile - expected).max() < 0.501


def test_axes_of_different_scale_are_averaged_each_by_its_own() -> None:
    x_edges, y_edges = 100.2 + (np.arange(21) - 10) * 3.3, 90.6 + (np.arange(21) - 10) * 1.7
    tile = one_tile(NOISE, (100.2, 90.6), np.diag([3.3, 1.7]), 20)
    assert np.abs(tile - area_means(NOISE, x_edges, y_edges)).max() < 0.501


def test_constant_image_stays_constant() -> None:
    for grey in (0, 7, 200, 255):
        image = np.full((3, 200, 200), grey, np.uint8)
        for matrix in (np.eye(2) * 1.4554, np.eye(2) * 0.7, rotation(33, 1.3), rotation(33, 0.6), np.diag([1.3, 0.6])):
            assert (one_tile(image, (99.3, 98.2), matrix, 40) == grey).all()


@pytest.mark.parametrize("degrees", [5, 30, 45, 200])
@pytest.mark.parametrize("scale", [1.0, 1.4554, 2.2])
def test_rotated_tiles_approach_the_area_average(degrees: float, scale: float) -> None:
    matrix, centre = rotation(degrees, scale), (151.37, 140.81)
    expected = rotated_means(NOISE, centre, matrix, 32)
    error = np.abs(one_tile(NOISE, centre, matrix, 32) - expected)
    # independent noise in every pixel is the worst case, tissue is ten times smoother
    assert error.mean() < 2
    smooth = ndimage.gaussian_filter(NOISE.astype(float), (0, 1.5, 1.5))
    smooth = np.clip(128 + 4 * (smooth - 128), 0, 255).astype(np.uint8)
    error = np.abs(one_tile(smooth, centre, matrix, 32) - rotated_means(smooth, centre, matrix, 32))
    assert error.mean() < 0.6  # rounding alone gives 0.25
    assert error.max() < 4


def test_shear_and_flip_together() -> None:
    matrix, centre = np.array([[1.2, 0.5], [0.3, -1.6]]), (150.2, 140.7)
    error = np.abs(one_tile(NOISE, centre, matrix, 32) - rotated_means(NOISE, centre, matrix, 32))
    assert error.mean() < 2


def test_a_turn_by_almost_nothing_changes_almost_nothing() -> None:
    # the two kernels meet: no jump in sharpness where the axes stop being aligned
    straight = one_tile(NOISE, (151.37, 140.81), rotation(0, 1.4554), 32)
    turned = one_tile(NOISE, (151.37, 140.81), rotation(0.01, 1.4554), 32)
    assert np.abs(straight.astype(int) - turned).max() <= 2


@pytest.mark.parametrize("matrix", [np.eye(2), np.eye(2) * 1.7, rotation(25, 1.7), rotation(40, 0.6), np.eye(2) * 0.6])
def test_positions_are_right_to_a_fraction_of_a_pixel(matrix: np.ndarray) -> None:
    """A linear ramp averages to its value at the centre of each output pixel."""
    y, x = np.mgrid[0:300, 0:340] + 0.5
    # slopes that are no simple fractions: rounding of the image averages out over the tile
    image = np.stack([0.4713 * x, 0.5331 * y, 20 + 0.3117 * x + 0.2071 * y]).round().astype(np.uint8)
    centre, offset = np.array([160.3, 150.8]), np.arange(40) + 0.5 - 20
    column, row = np.meshgrid(offset, offset)
    px = centre[0] + matrix[0, 0] * column + matrix[0, 1] * row
    py = centre[1] + matrix[1, 0] * column + matrix[1, 1] * row
    expected = np.stack([0.4713 * px, 0.5331 * py, 20 + 0.3117 * px + 0.2071 * py], axis=-1)
    difference = one_tile(image, centre, matrix, 40) - expected
    assert np.abs(difference).max() <= 1.0
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.15  # half a pixel would be 0.24


# --- upscaling ---


@pytest.mark.parametrize("matrix", [np.eye(2) * 0.7, np.diag([0.4, -0.9]), rotation(25, 0.6), rotation(90, 0.5)])
def test_upscaling_is_linear_interpolation(matrix: np.ndarray) -> None:
    centre, offset = (150.3, 140.8), np.arange(48) + 0.5 - 24
    column, row = np.meshgrid(offset, offset)
    x = centre[0] + matrix[0, 0] * column + matrix[0, 1] * row - 0.5
    y = centre[1] + matrix[1, 0] * column + matrix[1, 1] * row - 0.5
    expected = np.stack([ndimage.map_coordinates(c.astype(float), [y, x], order=1) for c in NOISE], axis=-1)
    assert np.abs(one_tile(NOISE, centre, matrix, 48) - expected).max() < 0.501


def test_upscaling_reaches_the_border_without_white() -> None:
    image = RNG.integers(0, 100, (3, 20, 20), dtype=np.uint8)
    tiles = reader(image, [[10.0, 10.0]], np.eye(2) * 0.5, 40).read(np.array([0]))
    expected = ndimage.zoom(image[0].astype(float), 2, order=1, mode="nearest", grid_mode=True)
    assert np.abs(tiles[0, :, :, 0] - expected).max() < 0.501


# --- outside of the image ---


@pytest.mark.parametrize("matrix", [np.eye(2), np.eye(2) * 2.0, np.eye(2) * 0.5, rotation(90), rotation(30, 1.5)])
def test_outside_is_white(matrix: np.ndarray) -> None:
    image = np.zeros((3, 300, 340), np.uint8)
    tiles = reader(image, [[0.0, 150.0], [-500.0, 150.0], [1e7, -1e7], [170.0, 300.0]], matrix, 40)
    read = tiles.read(np.arange(4))
    assert (read[1:3] == 255).all()
    # black inside, white outside: the mean is the fraction outside
    np.testing.assert_allclose(1 - read.mean(axis=(1, 2, 3)) / 255, tiles.inside, atol=0.01)
    assert tiles.inside[1] == 0


def test_pixels_cut_by_the_border_are_mixed_with_white_by_area() -> None:
    image = np.zeros((3, 100, 100), np.uint8)
    # 4 px pixels whose edges lie at -5, -1, 3, ...: the second is a quarter outside
    tile = one_tile(image, (15.0, 50.0), np.eye(2) * 4, 10)
    assert tile[5, :4, 0].tolist() == [255, 64, 0, 0]


# --- an independent library ---


@pytest.mark.parametrize("scale", [1.0, 1.7, 2.0, 3.3])
@pytest.mark.parametrize("turn", [0, 1, 2, 3, "flip"])
def test_tiles_are_those_of_pillow(scale: float, turn: Any) -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(3, 200, 220)), (0, 2, 2))
    image = np.clip(128 + 250 * smooth, 0, 255).astype(np.uint8)
    centre, px = np.array([101.37, 93.81]), 24
    matrix = np.diag([-1.0, 1.0]) if turn == "flip" else np.rint(rotation(90.0 * turn))
    half = px * scale / 2
    box = (centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half)
    picture = Image.fromarray(np.moveaxis(image, 0, -1))
    # Pillow's box filter weighs whole pixels: the image twelve times as large has the same content, and finer ones
    fine = picture.resize((picture.width * 12, picture.height * 12), Image.Resampling.NEAREST)
    upright = np.asarray(fine.resize((px, px), Image.Resampling.BOX, box=tuple(12 * v for v in box)))
    expected = upright[:, ::-1] if turn == "flip" else np.rot90(upright, turn)
    found = one_tile(image, centre, matrix * scale, px)
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < 1 and found.std() > 10


# --- levels ---


def pyramid(n_levels: int = 4) -> ImagePyramid:
    smooth = ndimage.gaussian_filter(RNG.normal(size=(3, 512, 640)), (0, 5, 5))
    levels = [np.clip(128 + 450 * smooth, 0, 255)]
    for _ in range(n_levels - 1):
        levels.append(downscale_local_mean(levels[-1], (1, 2, 2)))
    return ImagePyramid([np.rint(x).astype(np.uint8) for x in levels], [(2**i, 2**i) for i in range(n_levels)])


@pytest.mark.parametrize(
    ("mpp", "level", "upsampling"),
    [
        (0.2, 0, 1.25),
        (0.25, 0, 1),
        (0.4, 0, 1),
        (0.5, 1, 1),
        (0.5 - 1e-9, 1, 1),
        (0.9, 1, 1),
        (1.0, 2, 1),
        (50.0, 3, 1),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(mpp: float, level: int, upsampling: float) -> None:
    # 0.25 um per level-0 pixel, turned: sizes do not depend on the orientation
    geometry = TileGeometry(np.array([[300.0, 200.0]]), rotation(30, 4.0), TileSpec(8, mpp))
    tiles = TileReader(pyramid(), geometry)
    assert tiles.level == level
    assert tiles.upsampling == pytest.approx(upsampling)


def test_the_coarser_axis_decides_the_level() -> None:
    image = pyramid()
    geometry = TileGeometry(np.array([[300.0, 200.0]]), np.diag([4.0, 2.0]), TileSpec(8, 1.0))
    assert TileReader(image, geometry).level == 1


@pytest.mark.parametrize("matrix", [np.eye(2), rotation(20), rotation(-90)])
@pytest.mark.parametrize("mpp", [2.0, 2.9, 4.6])
def test_the_level_hardly_changes_the_tile(matrix: np.ndarray, mpp: float) -> None:
    image = pyramid()
    geometry = TileGeometry(np.array([[310.3, 240.9], [280.0, 250.0]]), matrix, TileSpec(48, mpp))
    coarse = TileReader(image, geometry)
    fine = TileReader(ImagePyramid(image.levels[:1], image.scales[:1]), geometry)
    assert coarse.level > fine.level == 0
    a, b = coarse.read(np.array([0, 1])).astype(float), fine.read(np.array([0, 1])).astype(float)
    assert b.std() > 20
    assert np.abs(a - b).mean() < 2
    assert abs((a - b).mean()) < 0.2


def test_levels_of_unequal_scale_keep_positions() -> None:
    y, x = np.mgrid[0:400, 0:600] + 0.5
    levels = [np.stack([0.4 * x, 0.6 * y, 0.2 * (x + y)])]
    levels.append(downscale_local_mean(levels[0], (1, 2, 4)))
    image = ImagePyramid([np.rint(v).astype(np.uint8) for v in levels], [(1, 1), (4, 2)])
    geometry = TileGeometry(np.array([[300.6, 200.3]]), np.eye(2), TileSpec(16, 5.0))
    tiles = TileReader(image, geometry)
    assert tiles.level == 1
    column, row = np.meshgrid(300.6 + 5 * (np.arange(16) - 7.5), 200.3 + 5 * (np.arange(16) - 7.5))
    expected = np.stack([0.4 * column, 0.6 * row, 0.2 * (column + row)], axis=-1)
    assert np.abs(tiles.read(np.array([0]))[0] - expected).max() < 1.1


@pytest.mark.parametrize(
    ("levels", "scales", "error", "match"),
    [
        ([], [], ValueError, "got 0 levels, 0 scales"),
        ([NOISE], [(1, 1), (2, 2)], ValueError, "got 1 levels, 2 scales"),
        ([NOISE[:1]], [(1, 1)], ValueError, r"Level 0 .* shape \(3, y, x\), got \(1, 300, 340\)"),
        ([NOISE[:, :0]], [(1, 1)], ValueError, r"got \(3, 0, 340\)"),
        ([NOISE.astype(np.uint16)], [(1, 1)], TypeError, "Level 0 of the image must be uint8, got uint16"),
        ([NOISE, NOISE[:, ::2, ::2]], [(1, 1), (2, -2)], ValueError, "positive"),
        ([NOISE], [(2, 2)], ValueError, r"scale \(1, 1\) by definition, got \(2.0, 2.0\)"),
    ],
)
def test_pyramid_refuses_bad_levels(levels: Any, scales: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ImagePyramid(levels, scales)


# --- index ---


def test_order_is_the_order_asked_and_repeats_are_allowed() -> None:
    centres = RNG.uniform(30, 270, (20, 2))
    tiles = reader(NOISE, centres, np.eye(2) * 1.3, 16)
    everything = tiles.read(np.arange(20))
    index = np.array([3, 19, 3, 0])
    assert np.array_equal(tiles.read(index), everything[index])
    assert tiles.read(np.array([], int)).shape == (0, 16, 16, 3)
    assert tiles.read(np.array([])).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        ([0, 5], IndexError, "no tile 5: tiles are numbered from 0 to 4"),
        ([-1], IndexError, "no tile -1"),
        ([0.5], TypeError, "integers, got float64"),
        ([True, False, True, False, True], TypeError, "integers, got bool"),
        ([[0, 1]], TypeError, r"shape \(1, 2\)"),
    ],
)
def test_index_is_checked(index: Any, error: type[Exception], match: str) -> None:
    tiles = reader(NOISE, np.full((5, 2), 50.0), np.eye(2), 8)
    with pytest.raises(error, match=match):
        tiles.read(np.array(index))


def test_max_memory_is_checked() -> None:
    with pytest.raises(ValueError, match="`max_memory` must be a positive integer, got 0"):
        reader(NOISE, [[50.0, 50.0]], np.eye(2), 8, max_memory=0)


def test_any_strides_of_the_image_give_the_same_tiles() -> None:
    centres = RNG.uniform(30, 270, (5, 2))
    expected = reader(NOISE, centres, np.eye(2) * 1.3, 16).read(np.arange(5))
    interleaved = np.ascontiguousarray(NOISE.transpose(1, 2, 0)).transpose(2, 0, 1)
    assert np.array_equal(reader(interleaved, centres, np.eye(2) * 1.3, 16).read(np.arange(5)), expected)
