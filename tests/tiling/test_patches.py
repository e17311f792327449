"""Stored patches as a source of tiles: arrays only."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from pekasc.tiling import ImagePyramid, PatchFile, PatchReader, TileGeometry, TileReader, TileSpec, TileStream, batches

SIDE = 24


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3)).astype(np.uint8)


@pytest.fixture
def file(tmp_path: Path, pixels: np.ndarray) -> PatchFile:
    with h5py.File(tmp_path / "x.h5", "w") as h5:
        h5.create_dataset("img", data=pixels, chunks=(3, SIDE, SIDE, 3))
        h5["barcode"] = np.array([f"b{i}" for i in range(len(pixels))], dtype="S")[:, None]
    return PatchFile(tmp_path / "x.h5")


def reader(file: PatchFile, rows: np.ndarray, tile_px: int = SIDE) -> PatchReader:
    return PatchReader(file, rows, TileSpec(tile_px, SIDE / tile_px), np.ones(len(rows), np.float32))


@pytest.mark.parametrize("rows", [[3], [5, 4, 3], [0, 19, 7, 7, 8, 2], []])
def test_rows_in_any_order(file: PatchFile, pixels: np.ndarray, rows: list[int]) -> None:
    index = np.array(rows, dtype=np.int64)
    np.testing.assert_array_equal(file.read(index), pixels[index])


def test_stream_of_patches_and_image(file: PatchFile, pixels: np.ndarray) -> None:
    rows = np.random.default_rng(1).permutation(20)[:12]
    image = np.moveaxis(pixels[0], -1, 0)
    geometry = TileGeometry(np.array([[SIDE / 2, SIDE / 2]]), np.eye(2), TileSpec(SIDE, 1.0))
    stream = TileStream([reader(file, rows), TileReader(ImagePyramid([image], [(1, 1)]), geometry)])
    np.testing.assert_array_equal(stream.read(np.arange(13)), np.concatenate([pixels[rows], pixels[:1]]))
    # the cheapest order is that of the file
    np.testing.assert_array_equal(rows[stream.reading_order[:12]], np.sort(rows))
    for positions, tiles in batches(stream, 5):
        np.testing.assert_array_equal(tiles, stream.read(positions))


@pytest.mark.parametrize("tile_px", [6, 10, 24, 30])
def test_resampling_is_that_of_the_image_reader(file: PatchFile, pixels: np.ndarray, tile_px: int) -> None:
    found = reader(file, np.arange(20), tile_px)
    spec = TileSpec(tile_px, SIDE / tile_px)
    geometry = TileGeometry(np.array([[SIDE / 2, SIDE / 2]]), np.eye(2), spec)
    for tile, patch in zip(found.read(np.arange(20)), pixels, strict=True):
        pyramid = ImagePyramid([np.ascontiguousarray(np.moveaxis(patch, -1, 0))], [(1, 1)])
        np.testing.assert_array_equal(tile, TileReader(pyramid, geometry).read(np.array([0]))[0])
    assert found.upsampling == max(1, tile_px / SIDE)


def test_another_process_can_read(file: PatchFile, pixels: np.ndarray) -> None:
    again = pickle.loads(pickle.dumps(reader(file, np.arange(20))))
    np.testing.assert_array_equal(again.read(np.array([4, 2])), pixels[[4, 2]])


def test_the_id_is_that_of_the_content(file: PatchFile, tmp_path: Path) -> None:
    assert PatchFile(file.path).id == file.id
    with h5py.File(file.path, "a") as h5:
        h5["img"][10] = 0
    assert PatchFile(file.path).id != file.id


@pytest.mark.parametrize(("shape", "dtype"), [((4, 8, 8), np.uint8), ((4, 8, 6, 3), np.uint8), ((4, 8, 8, 3), float)])
def test_patches_must_be_square_rgb(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as h5:
        h5["img"] = np.zeros(shape, dtype)
        h5["barcode"] = np.array([b"a", b"b", b"c", b"d"])
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(n, side, side, 3\)"):
        PatchFile(tmp_path / "x.h5")


def test_rows_that_are_not_there(file: PatchFile) -> None:
    with pytest.raises(IndexError, match="no tile 20"):
        reader(file, np.array([20]))
    with pytest.raises(FileNotFoundError, match="are not there"):
        PatchFile(file.path.with_name("nothing.h5"))
