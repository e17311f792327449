"""Streams, batches and caches keep order, errors and memory in hand."""

from __future__ import annotations

import gc
import logging
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

from pekasc.tiling import ArrayTiles, ImagePyramid, TileGeometry, TileReader, TileSpec, TileStream, batches, cached

RNG = np.random.default_rng(2)
IMAGES = [RNG.integers(0, 256, (3, 200, 260), dtype=np.uint8) for _ in range(3)]


def reader(image: Any, n: int, px: int = 16) -> TileReader:
    centres = np.random.default_rng(n).uniform(0, 250, (n, 2))
    return TileReader(ImagePyramid([image], [(1, 1)]), TileGeometry(centres, np.eye(2) * 1.2, TileSpec(px, 1.0)))


def stream() -> TileStream:
    return TileStream([reader(im, n) for im, n in zip(IMAGES, (7, 0, 12), strict=True)])


class Source:
    """Ten tiles, tile i filled with i; fails, or says when it is read."""

    n, tile_px = 10, 4
    reading_order = np.arange(10)[::-1]

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.asked: list[list[int]] = []
        self.threads: set[int] = set()

    def read(self, index: np.ndarray) -> np.ndarray:
        self.asked.append(index.tolist())
        self.threads.add(threading.get_ident())
        if self.bad in index:
            raise OSError(f"tile {self.bad} is broken")
        return np.broadcast_to(index.astype(np.uint8)[:, None, None, None], (len(index), 4, 4, 3)).copy()


def tile_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("pekasc-tiles")]


def test_stream_numbers_the_tiles_one_reader_after_the_other() -> None:
    readers = [reader(im, n) for im, n in zip(IMAGES, (7, 0, 12), strict=True)]
    tiles = TileStream(readers)
    assert tiles.n == 19
    assert tiles.tile_px == 16
    index = np.random.default_rng(0).permutation(19)
    expected = np.concatenate([r.read(np.arange(r.n)) for r in readers])
    assert np.array_equal(tiles.read(index), expected[index])
    assert tiles.reading_order[:7].tolist() == readers[0].reading_order.tolist()
    assert tiles.reading_order[7:].tolist() == (readers[2].reading_order + 7).tolist()
    with pytest.raises(IndexError, match="no tile 19: tiles are numbered from 0 to 18"):
        tiles.read(np.array([19]))


def test_stream_holds_the_chunks_of_one_reader() -> None:
    readers = [reader(da.from_array(im, chunks=(3, 64, 64)), 9) for im in IMAGES]
    tiles = TileStream(readers)
    for positions, _ in batches(tiles, 4, prefetch=0):
        assert len(positions) <= 4
        assert sum(r._source.held_bytes > 0 for r in readers) == 1


def test_stream_refuses_mixed_tiles() -> None:
    with pytest.raises(ValueError, match=r"one tile size, got \[8, 16\]"):
        TileStream([reader(IMAGES[0], 3), reader(IMAGES[0], 3, px=8)])
    with pytest.raises(ValueError, match="got no reader"):
        TileStream([])


def test_array_tiles_read_copies() -> None:
    array = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    tiles = ArrayTiles(array)
    read = tiles.read(np.array([4, 0]))
    assert np.array_equal(read, array[[4, 0]])
    read[:] = 0
    assert array.any()
    with pytest.raises(ValueError, match=r"\(n, tile_px, tile_px, 3\), got \(5, 8, 8\)"):
        ArrayTiles(array[..., 0])
    with pytest.raises(TypeError, match="must be uint8, got float32"):
        ArrayTiles(array.astype(np.float32))
    with pytest.raises(IndexError, match="no tile 5"):
        tiles.read(np.array([5]))


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 99])
def test_batches_keep_the_order_asked(prefetch: int, batch_size: int) -> None:
    source = Source()
    seen = list(batches(source, batch_size, prefetch=prefetch))
    assert np.concatenate([p for p, _ in seen]).tolist() == list(range(10))[::-1]
    assert all((tiles[:, 0, 0, 0] == positions).all() for positions, tiles in seen)
    assert [len(p) for p, _ in seen] == [min(batch_size, 10 - i) for i in range(0, 10, batch_size)]
    index = np.array([5, 5, 2, 9, 0])
    seen = list(batches(source, 2, index=index, prefetch=prefetch))
    assert np.concatenate([p for p, _ in seen]).tolist() == index.tolist()
    assert (threading.get_ident() in source.threads) == (prefetch == 0)
    assert not tile_threads()


def test_batches_of_nothing() -> None:
    assert list(batches(Source(), 4, index=np.array([], int))) == []


def test_batches_read_ahead_no_further_than_asked() -> None:
    source = Source()
    iterator = batches(source, 1, prefetch=3)
    next(iterator)
    # reading goes on in the background; closing waits for what was started
    iterator.close()  # type: ignore[attr-defined]
    assert 1 <= len(source.asked) <= 4
    assert not tile_threads()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer_after_the_batches_before(prefetch: int) -> None:
    seen = []
    with pytest.raises(OSError, match="tile 3 is broken"):
        for positions, _ in batches(Source(bad=3), 2, prefetch=prefetch):
            seen.append(positions.tolist())
    assert seen == [[9, 8], [7, 6], [5, 4]]
    assert not tile_threads()


def test_the_thread_ends_when_the_consumer_stops() -> None:
    for positions, _ in batches(Source(), 2):
        if 6 in positions:
            break
    del positions, _
    gc.collect()
    assert not tile_threads()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be a positive integer, got 0"),
        ({"batch_size": 2.5}, TypeError, "got 2.5 of type float"),
        ({"batch_size": 2, "prefetch": -1}, ValueError, "`prefetch` must be a positive integer, got -1"),
        ({"batch_size": 2, "index": np.array([10])}, IndexError, "no tile 10"),
    ],
)
def test_batches_check_at_the_call(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        batches(Source(), **kwargs)


def test_cached_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    tiles = stream()
    with caplog.at_level(logging.INFO, logger="pekasc.tiling"):
        kept = cached(tiles, max_memory=10**9)
    assert "19 tiles of 16 px in memory" in caplog.text
    index = np.random.default_rng(0).permutation(19)
    assert np.array_equal(kept.read(index), tiles.read(index))
    assert cached(kept, max_memory=1) is kept


def test_cached_in_a_file_that_goes_away(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiles = stream()
    with caplog.at_level(logging.INFO, logger="pekasc.tiling"):
        kept = cached(tiles, max_memory=19 * 16 * 16 * 3 - 1)
    assert "temporary file" in caplog.text
    assert len(list(tmp_path.glob("pekasc-tiles-*/*"))) == 1
    index = np.random.default_rng(0).permutation(19)
    read = kept.read(index)
    assert np.array_equal(read, tiles.read(index))
    assert type(read) is np.ndarray
    del kept
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_cached_reads_every_tile_once_in_reading_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pekasc.tiling._stream._CACHE_STEP_BYTES", 4 * 4 * 4 * 3)
    source = Source()
    kept = cached(source, max_memory=10**6)
    assert source.asked == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]
    assert kept.read(np.arange(10))[:, 0, 0, 0].tolist() == list(range(10))


def test_cached_says_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(OSError, match=r"10 tiles take .* Set TMPDIR .* or raise `Compute.max_memory`"):
        cached(Source(), max_memory=1)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_cached_leaves_no_file_behind_when_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="tile 3 is broken"):
        cached(Source(bad=3), max_memory=1)
    gc.collect()
    assert list(tmp_path.iterdir()) == []
