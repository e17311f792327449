"""Chunked images: same tiles as in memory, each chunk decoded once, bounded memory, errors that name the chunk."""

from __future__ import annotations

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr

from pekasc.tiling import ImagePyramid, TileGeometry, TileReader, TileSpec

RNG = np.random.default_rng(1)
IMAGE = RNG.integers(0, 256, (3, 500, 700), dtype=np.uint8)
# a tile in every 100 px chunk and many anywhere, some outside
CENTRES = np.concatenate(
    [np.mgrid[50:700:100, 50:500:100].reshape(2, -1).T + RNG.uniform(-9, 9, (35, 2)), RNG.uniform(-10, 710, (50, 2))]
)
MATRIX = np.eye(2) * 1.3


def reader(image: Any, centres: Any = CENTRES, matrix: np.ndarray = MATRIX, px: int = 24, **kwargs: Any) -> TileReader:
    geometry = TileGeometry(np.array(centres, float), matrix, TileSpec(px, 1.0))
    return TileReader(ImagePyramid([image], [(1, 1)]), geometry, **kwargs)


class CountingImage:
    """A zarr-like array that counts how often each chunk is read."""

    def __init__(self, array: np.ndarray, chunk: int) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.chunks = (3, chunk, chunk)
        self.count: Counter[tuple[int, int]] = Counter()

    def __getitem__(self, key: tuple[slice, slice, slice]) -> np.ndarray:
        _, y, x = key
        assert y.start % self.chunks[1] == 0
        assert x.start % self.chunks[2] == 0
        self.count[y.start // self.chunks[1], x.start // self.chunks[2]] += 1
        return self.array[key]


def counting_dask(array: np.ndarray, chunk: int) -> tuple[da.Array, Counter[tuple[int, ...]]]:
    count: Counter[tuple[int, ...]] = Counter()
    lock = Lock()

    def decode(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        with lock:
            count[tuple(block_info[0]["chunk-location"][1:])] += 1
        return block

    lazy = da.from_array(array, chunks=(3, chunk, chunk)).map_blocks(
        decode, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    return lazy, count


@pytest.fixture
def stored(tmp_path: Path) -> zarr.Array:
    array = zarr.create_array(tmp_path / "image.zarr", shape=IMAGE.shape, chunks=(1, 128, 96), dtype="uint8")
    array[:] = IMAGE
    return array


@pytest.mark.parametrize("matrix", [MATRIX, np.eye(2) * 0.7, np.array([[1.1, -0.6], [0.6, 1.1]])])
@pytest.mark.parametrize("kind", ["dask", "dask channels apart", "dask uneven", "dask transposed", "zarr", "dask zarr"])
def test_chunked_images_give_the_tiles_of_the_image_in_memory(
    matrix: np.ndarray, kind: str, stored: zarr.Array
) -> None:
    image = {
        "dask": da.from_array(IMAGE, chunks=(3, 128, 128)),
        "dask channels apart": da.from_array(IMAGE, chunks=(1, 100, 200)),
        "dask uneven": da.from_array(IMAGE, chunks=((2, 1), (13, 487), (300, 1, 399))),
        "dask transposed": da.from_array(IMAGE.transpose(1, 2, 0), chunks=(90, 90, 3)).transpose(2, 0, 1),
        "zarr": stored,
        "dask zarr": da.from_zarr(stored),
    }[kind]
    index = RNG.permutation(len(CENTRES))
    expected = reader(IMAGE, matrix=matrix).read(index)
    assert np.array_equal(reader(image, matrix=matrix).read(index), expected)


def test_each_chunk_is_decoded_once_per_read() -> None:
    for image, count in (counting_dask(IMAGE, 100), (c := CountingImage(IMAGE, 100), c.count)):
        tiles = reader(image)
        tiles.read(RNG.permutation(len(CENTRES)))
        assert len(count) == 35  # every chunk is needed
        assert set(count.values()) == {1}
        tiles.read(np.arange(10))
        assert set(count.values()) == {1}  # and held for the next call
        tiles.release()
        tiles.read(np.array([0]))
        assert max(count.values()) == 2


def test_only_needed_chunks_are_decoded() -> None:
    image, count = counting_dask(IMAGE, 100)
    reader(image, [[250.0, 150.0], [300.0, 350.0], [5000.0, 0.0]], np.eye(2), 20).read(np.array([0, 1, 2]))
    assert set(count) == {(1, 2), (3, 2), (3, 3)}


def test_reading_in_batches_decodes_each_chunk_once_when_a_row_fits() -> None:
    image, count = counting_dask(IMAGE, 100)
    tiles = reader(image, max_memory=3 * 100 * 100 * 20)  # 20 of 35 chunks
    for i in range(0, len(CENTRES), 8):
        tiles.read(tiles.reading_order[i : i + 8])
    assert set(count.values()) == {1}


@pytest.mark.parametrize("chunks_held", [0.5, 1, 4, 9])
def test_memory_is_bounded_and_changes_no_tile(chunks_held: float) -> None:
    bound = int(chunks_held * 3 * 100 * 100)
    tiles = reader(CountingImage(IMAGE, 100), max_memory=bound)
    index = RNG.permutation(len(CENTRES))
    assert np.array_equal(tiles.read(index), reader(IMAGE).read(index))
    held = tiles._source.held_bytes
    # a chunk larger than the bound cannot be read in parts
    assert 0 < held <= max(bound, 3 * 100 * 100)
    tiles.release()
    assert tiles._source.held_bytes == 0


def test_a_held_chunk_does_not_hold_the_whole_image() -> None:
    # one block cut into chunks: what dask gives are views of the whole
    tiles = reader(da.from_array(IMAGE, chunks=-1).rechunk((3, 100, 100)))
    assert np.array_equal(tiles.read(np.arange(len(CENTRES))), reader(IMAGE).read(np.arange(len(CENTRES))))
    assert all(block.base is None for block in tiles._source._recent.values())


def test_threads_share_one_reader() -> None:
    image, count = counting_dask(IMAGE, 100)
    tiles, expected = reader(image), reader(IMAGE).read(np.arange(len(CENTRES)))
    orders = [RNG.permutation(len(CENTRES)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for order, got in zip(orders, pool.map(tiles.read, orders), strict=True):
            assert np.array_equal(got, expected[order])
    assert set(count.values()) == {1}


def test_reading_order_goes_chunk_by_chunk_and_is_stable() -> None:
    tiles = reader(da.from_array(IMAGE, chunks=(3, 100, 200)), RNG.uniform(0, 500, (300, 2)))
    assert np.array_equal(np.sort(tiles.reading_order), np.arange(300))
    assert tiles.reading_order.dtype == np.int64
    rng = np.random.default_rng(3)
    centres = rng.uniform(0, 500, (300, 2))
    order = reader(da.from_array(IMAGE, chunks=(3, 100, 200)), centres).reading_order
    expected = sorted(range(300), key=lambda i: (int(centres[i, 1] // 100), int(centres[i, 0] // 200), i))
    assert order.tolist() == expected


@pytest.mark.parametrize("order", ["reading_order", "canonical_order"])
def test_a_wide_image_is_read_in_strips(order: str) -> None:
    """Rows of chunks across all of it would not fit the memory for chunks: those of a strip do."""
    size, chunk = 40_000, 1_000
    made: Counter[tuple[int, int]] = Counter()

    def paint(block_info: Any = None) -> np.ndarray:
        (_, (y0, y1), (x0, x1)) = block_info[None]["array-location"]
        made[y0 // chunk, x0 // chunk] += 1
        return np.full((3, y1 - y0, x1 - x0), (y0 // chunk * 40 + x0 // chunk) % 251, dtype=np.uint8)

    chunks = ((3,), (chunk,) * 3, (chunk,) * (size // chunk))
    image = da.map_blocks(paint, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    # across every border between rows of chunks, so that a row of tiles needs two rows of chunks
    centres = np.stack(np.meshgrid(np.arange(500, size, 1000), [1000, 1400, 1600, 2000]), axis=-1).reshape(-1, 2)
    tiles = reader(image, centres, np.eye(2), 8, max_memory=3 * chunk**2 * 45)
    at = getattr(tiles, order)
    assert np.array_equal(np.sort(at), np.arange(len(centres)))
    assert (np.diff(centres[at][:, 0] // 16_384) >= 0).all()
    for i in range(0, len(at), 4):
        found = tiles.read(at[i : i + 4])
        for tile, (x, _) in zip(found, centres[at[i : i + 4]], strict=True):
            assert set(np.unique(tile)) <= {(y * 40 + x // chunk) % 251 for y in range(3)}
    assert set(made.values()) == {1}


def test_large_chunks_are_the_pixels_of_the_image() -> None:
    image = RNG.integers(0, 256, (3, 1300, 1500), dtype=np.uint8)
    centres = RNG.uniform(0, 1300, (40, 2))
    expected = reader(image, centres).read(np.arange(40))
    tiles = reader(da.from_array(image, chunks=(3, 1024, 1024)), centres)  # chunks of 3 MB, and smaller ones
    np.testing.assert_array_equal(tiles.read(np.arange(40)), expected)
    tiles.release()
    np.testing.assert_array_equal(tiles.read(np.arange(40)), expected)


def test_an_image_of_ten_thousand_million_pixels() -> None:
    """Offsets beyond 32 bits, from a lazy image of which two chunks are ever made."""
    made: list[tuple[int, ...]] = []

    def paint(block_info: Any = None) -> np.ndarray:
        (c0, c1), (y0, y1), (x0, x1) = block_info[None]["array-location"]
        made.append((y0, x0))
        c, y, x = np.ogrid[c0:c1, y0:y1, x0:x1]
        return ((c * 50 + y * 7 + x * 3) % 251).astype(np.uint8)

    chunk = 1000
    image = da.map_blocks(
        paint, chunks=((3,), (chunk,) * 100, (chunk,) * 100), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    assert image.size > 2**32
    tiles = reader(image, [[99_900.0, 99_970.0], [98_000.0, 99_500.0]], np.eye(2), 32).read(np.array([0, 1]))
    for tile, (x, y) in zip(tiles, ((99_900, 99_970), (98_000, 99_500)), strict=True):
        rows, columns = np.arange(y - 16, y + 16), np.arange(x - 16, x + 16)
        expected = (np.arange(3) * 50 + rows[:, None, None] * 7 + columns[None, :, None] * 3) % 251
        assert np.array_equal(tile, expected)
    assert sorted(made) == [(99_000, 97_000), (99_000, 98_000), (99_000, 99_000)]


def test_a_broken_chunk_is_named_with_the_tile(stored: zarr.Array, tmp_path: Path) -> None:
    parts = list((tmp_path / "image.zarr").glob("c/0/2/3"))
    assert len(parts) == 1
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    centres = [[50.0, 50.0], [340.0, 300.0], [60.0, 50.0]]
    for image in (stored, da.from_zarr(stored)):
        tiles = reader(image, centres)
        with pytest.raises(
            OSError,
            match=r"Tile 1 cannot be read: chunk \(2, 3\) of image level 0 \(rows 256:384, columns 288:384\)",
        ) as caught:
            tiles.read(np.array([2, 1, 0]))
        assert caught.value.__cause__ is not None
        # the rest can still be read
        assert np.array_equal(tiles.read(np.array([0, 2])), reader(IMAGE, centres).read(np.array([0, 2])))


def test_a_chunk_of_another_type_is_an_error() -> None:
    wrong = da.from_array(IMAGE, chunks=(3, 100, 100)).map_blocks(
        lambda b: b.astype(float), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    with pytest.raises(OSError, match=r"expected a uint8 array of shape \(3, 100, 100\), got float64"):
        reader(wrong).read(np.array([0]))


def test_readers_travel_to_other_processes() -> None:
    tiles = reader(da.from_array(IMAGE, chunks=(3, 100, 100)))
    expected = tiles.read(np.arange(5))
    copy = pickle.loads(pickle.dumps(tiles))
    assert copy._source.held_bytes == 0
    assert np.array_equal(copy.read(np.arange(5)), expected)
