"""Chunks decoded without zarr's event loop are those that zarr decodes; what cannot be is left to zarr."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ZstdCodec

from pekasc.tiling import ImagePyramid, TileGeometry, TileReader, TileSpec
from pekasc.tiling._chunks import chunk_source
from pekasc.tiling._parallel import in_threads, n_threads

IMAGE = np.random.default_rng(4).integers(0, 200, (3, 150, 170), dtype=np.uint8)


def stored(folder: Path, image: np.ndarray = IMAGE, chunks: tuple[int, ...] = (3, 64, 64), **how: Any) -> zarr.Array:
    array = zarr.create_array(folder / "image", shape=image.shape, chunks=chunks, dtype=image.dtype, **how)
    array[:] = image
    return array


WAYS: dict[str, dict[str, Any]] = {
    "zstd": {"compressors": ZstdCodec(level=1)},
    "blosc": {"compressors": BloscCodec(cname="lz4")},
    "gzip": {"compressors": GzipCodec(level=1)},
    "none": {"compressors": None},
    "channel by channel": {"chunks": (1, 64, 64)},
    "format 2": {"zarr_format": 2},
    "format 2, nested": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["zarr", "dask"])
def test_all_chunks_are_those_of_zarr(tmp_path: Path, how: dict[str, Any], kind: str) -> None:
    array: Any = stored(tmp_path, **how)
    decoder = chunk_source(array if kind == "zarr" else da.from_zarr(array))
    assert decoder is not None
    for y in range(3):
        for x in range(3):
            expected = IMAGE[:, 64 * y : 64 * y + 64, 64 * x : 64 * x + 64]
            found = pickle.loads(pickle.dumps(decoder)).read_chunk(y, x)
            assert found.shape == (3, 64, 64)
            assert np.array_equal(found[:, : expected.shape[1], : expected.shape[2]], expected)


def test_what_was_never_written_is_the_fill_value(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "i", shape=(3, 50, 50), chunks=(3, 50, 50), dtype="uint8", fill_value=7)
    decoder = chunk_source(array)
    assert decoder is not None and (decoder.read_chunk(0, 0) == 7).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: da.from_zarr(a)[[2, 1, 0]],
        lambda a: da.from_zarr(a) + np.uint8(0),
        lambda a: da.from_zarr(a).rechunk((3, 50, 50)),
        lambda a: da.from_array(np.asarray(a)),
        np.asarray,
    ],
)
def test_changed_arrays_are_not_read_behind_their_back(tmp_path: Path, change: Any) -> None:
    assert chunk_source(change(stored(tmp_path))) is None


@pytest.mark.parametrize(
    "how",
    [
        {"shards": (3, 128, 128)},
        {"compressors": [ZstdCodec(), GzipCodec()]},
        {"zarr_format": 2, "order": "F"},
        {"filters": "transpose"},
    ],
)
def test_layouts_that_are_left_to_zarr(tmp_path: Path, how: dict[str, Any]) -> None:
    if how.get("filters") == "transpose":
        from zarr.codecs import TransposeCodec

        how = {"filters": [TransposeCodec(order=(2, 1, 0))]}
    array = stored(tmp_path, **how)
    assert chunk_source(array) is None
    geometry = TileGeometry([[60.0, 60.0]], np.eye(2), TileSpec(20, 1.0))
    tile = TileReader(ImagePyramid([array], [(1, 1)]), geometry).read(np.array([0]))[0]
    assert np.array_equal(tile, np.moveaxis(IMAGE[:, 50:70, 50:70], 0, -1))


def test_stored_chunks_count_not_those_of_dask(tmp_path: Path) -> None:
    array = da.from_zarr(stored(tmp_path), chunks=(3, 128, 128))
    decoder = chunk_source(array)
    assert decoder is not None and decoder.chunk_px == (64, 64)
    tiles = TileReader(ImagePyramid([array], [(1, 1)]), TileGeometry([[65.0, 66.0]], np.eye(2), TileSpec(20, 1.0)))
    assert np.array_equal(tiles.read(np.array([0]))[0], np.moveaxis(IMAGE[:, 56:76, 55:75], 0, -1))


def test_memory_stores_are_left_to_zarr() -> None:
    array = zarr.create_array({}, shape=(3, 50, 50), chunks=(3, 25, 25), dtype="uint8")
    assert chunk_source(array) is None


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no stream of any codec", lambda b: b""])
@pytest.mark.parametrize("compressors", [ZstdCodec(level=1), None])
def test_a_damaged_chunk_is_named_with_its_tile(tmp_path: Path, damage: Any, compressors: Any) -> None:
    array = stored(tmp_path, compressors=compressors)
    chunk = tmp_path / "image" / "c" / "0" / "1" / "2"
    chunk.write_bytes(damage(chunk.read_bytes()))
    geometry = TileGeometry([[20.0, 20.0], [150.0, 100.0]], np.eye(2), TileSpec(16, 1.0))
    tiles = TileReader(ImagePyramid([da.from_zarr(array)], [(1, 1)]), geometry)
    assert tiles.read(np.array([0])).shape == (1, 16, 16, 3)
    with pytest.raises(OSError, match=r"Tile 1 cannot be read: chunk \(1, 2\) of image level 0 \(rows 64:128, columns"):
        tiles.read(np.array([0, 1]))


def test_threads_keep_the_order_and_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_threads(lambda i: i * i, range(50)) == [i * i for i in range(50)]
    names = set(in_threads(lambda _: threading.current_thread().name, range(50)))
    assert (n_threads() == 1) or all(name.startswith("pekasc-decode") for name in names)

    def fail(i: int) -> None:
        if i >= 2:
            raise OSError(f"item {i}")

    with pytest.raises(OSError, match="item 2"):
        in_threads(fail, range(5))


def test_serializer_of_one_byte_values(tmp_path: Path) -> None:
    assert chunk_source(stored(tmp_path, serializer=BytesCodec())) is not None
