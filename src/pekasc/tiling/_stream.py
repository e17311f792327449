"""Sources of tiles: several sections, arrays, subsets; batches read ahead; a cache for many passes."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from pekasc._settings import get_logger
from pekasc.tiling._geometry import check_positive
from pekasc.tiling._patches import PatchReader
from pekasc.tiling._reader import TileReader, check_index

logger = get_logger(__name__)

_CACHE_STEP_BYTES = 32 * 2**20
_Part = TypeVar("_Part")


class TileSource(Protocol):
    """A source of tiles by index."""

    @property
    def n(self) -> int:
        """Number of tiles."""
        ...

    @property
    def tile_px(self) -> int:
        """Pixels along the side of a tile."""
        ...

    @property
    def reading_order(self) -> np.ndarray:
        """(n,) int64, all tiles in the order that is fastest to read."""
        ...

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        ...

    def release(self) -> None:
        """Drop decoded chunks that are kept between calls."""
        ...


class TileStream:
    """Concatenated tiles of several readers.

    Decoded chunks are kept for one reader at a time, so that memory does not grow with the number of sections.

    Parameters
    ----------
    readers
        One reader per section, all with the same tile size.
    """

    def __init__(self, readers: Sequence[TileReader | PatchReader]) -> None:
        sizes = sorted({reader.tile_px for reader in readers})
        if len(sizes) != 1:
            raise ValueError(f"A stream needs readers of one tile size, got {sizes if sizes else 'no reader'}.")
        self.readers = list(readers)
        self.tile_px = sizes[0]
        self.offsets = np.concatenate([[0], np.cumsum([reader.n for reader in readers])]).astype(np.int64)
        self.n = int(self.offsets[-1])
        orders = [reader.reading_order + offset for reader, offset in zip(readers, self.offsets, strict=False)]
        self.reading_order = np.concatenate(orders)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        index = check_index(index, self.n)
        tiles = np.empty((len(index), self.tile_px, self.tile_px, 3), np.uint8)
        owner = np.searchsorted(self.offsets, index, side="right") - 1
        for i in np.unique(owner).tolist():
            for j, other in enumerate(self.readers):
                if j != i:
                    other.release()
            own = owner == i
            tiles[own] = self.readers[i].read(index[own] - self.offsets[i])
        return tiles

    def release(self) -> None:
        """Forget the decoded chunks kept between calls."""
        for reader in self.readers:
            reader.release()


class ArrayTiles:
    """Tiles that are an array already.

    Parameters
    ----------
    array
        (n, tile_px, tile_px, 3) uint8, in memory or mapped from a file.
    """

    def __init__(self, array: np.ndarray) -> None:
        if array.ndim != 4 or array.shape[1] != array.shape[2] or array.shape[3] != 3 or array.shape[1] == 0:
            raise ValueError(f"Tiles must have shape (n, tile_px, tile_px, 3), got {array.shape}.")
        if array.dtype != np.uint8:
            raise TypeError(f"Tiles must be uint8, got {array.dtype}.")
        self.array = array
        self.n = len(array)
        self.tile_px = int(array.shape[1])
        self.reading_order = np.arange(self.n, dtype=np.int64)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        # np.array: plain memory, not a view of a memory-mapped file
        return np.array(self.array[check_index(index, self.n)])

    def release(self) -> None:
        """Do nothing: there is nothing to decode."""


class TileSubset:
    """A subset of the tiles of a source.

    Parameters
    ----------
    source
        The source.
    index
        Indices of the tiles in the source, in the order of the subset.
    """

    def __init__(self, source: TileSource, index: np.ndarray) -> None:
        self.source, self.index = source, check_index(index, source.n)
        self.n, self.tile_px = len(self.index), source.tile_px
        rank = np.empty(source.n, dtype=np.int64)
        rank[source.reading_order] = np.arange(source.n)
        self.reading_order = np.argsort(rank[self.index], kind="stable")

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        return self.source.read(self.index[check_index(index, self.n)])

    def release(self) -> None:
        """Drop the decoded chunks of the source."""
        self.source.release()


def batches(
    source: TileSource, batch_size: int, *, index: np.ndarray | None = None, prefetch: int = 2
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over tiles in batches, reading ahead in one background thread.

    Batches are in the order of `index`. The thread ends with the iterator.

    Parameters
    ----------
    source
        The source of the tiles.
    batch_size
        Tiles per batch; the last batch may be smaller.
    index
        Indices of the tiles; by default all, in the order that is fastest to read.
    prefetch
        Number of batches to read ahead; 0 reads on demand, without a thread.

    Returns
    -------
    Iterator over pairs: indices (k,) int64 and tiles (k, tile_px, tile_px, 3) uint8.
    """
    check_positive(batch_size, "batch_size", integer=True)
    if prefetch != 0:
        check_positive(prefetch, "prefetch", integer=True)
    positions = source.reading_order if index is None else check_index(index, source.n)
    return read_parts(source, in_batches([positions], batch_size), prefetch=prefetch)


def in_batches(chunks: Iterable[np.ndarray], batch_size: int) -> list[np.ndarray]:
    """Split chunks of tiles into batches; no batch spans two chunks."""
    return [chunk[i : i + batch_size] for chunk in chunks for i in range(0, len(chunk), batch_size)]


def read_parts(
    source: TileSource, parts: list[np.ndarray], *, prefetch: int = 2
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate over given batches of tiles, reading ahead as :func:`batches` does."""
    return read_ahead(source.read, parts, prefetch)


def read_ahead(
    read: Callable[[_Part], np.ndarray], parts: Sequence[_Part], prefetch: int = 2
) -> Iterator[tuple[_Part, np.ndarray]]:
    """Iterate over pairs of a part and ``read(part)``, reading ahead in one background thread (see `batches`)."""
    if prefetch == 0:
        yield from ((part, read(part)) for part in parts)
        return
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pekasc-tiles")
    try:
        ahead = deque(pool.submit(read, part) for part in parts[:prefetch])
        for i, part in enumerate(parts):
            tiles = ahead.popleft().result()
            if i + prefetch < len(parts):
                ahead.append(pool.submit(read, parts[i + prefetch]))
            yield part, tiles
            # do not keep them alive while waiting for the next
            del tiles
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class TilesOfSome:
    """The tiles of this process, indexed among those of all processes.

    Parameters
    ----------
    source
        The tiles of this process.
    index
        Their indices among all tiles.
    n
        Number of all tiles.
    """

    def __init__(self, source: TileSource, index: np.ndarray, n: int) -> None:
        self.source, self.n, self.tile_px = source, n, source.tile_px
        self._at = np.full(n, -1, dtype=np.int64)
        self._at[index] = np.arange(len(index))
        self.reading_order = np.asarray(index)[source.reading_order]

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        at = self._at[check_index(index, self.n)]
        if (at < 0).any():
            raise IndexError(f"Tile {int(np.asarray(index)[at < 0][0])} belongs to another process.")
        return self.source.read(at)

    def release(self) -> None:
        """Forget the decoded chunks of the source."""
        self.source.release()


class _TemporaryTiles(ArrayTiles):
    """Tiles in a temporary file, deleted with this object."""

    def __init__(self, array: np.ndarray, folder: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(array)
        self._folder = folder


def check_temporary_room(size: int, what: str, folder: str | Path | None = None) -> None:
    """Check that a folder, by default the temporary one, has `size` bytes of free disk space.

    Raises
    ------
    OSError
        If it has not.
    """
    name, where = "folder", "Set `Compute.cache` to a folder with room"
    if folder is None:
        folder, name, where = tempfile.gettempdir(), "temporary folder", "Set TMPDIR to a folder with room"
    # the folder is made when it is needed
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise OSError(
            f"{what} take {size / 1e9:.1f} GB, and the {name} {str(folder)!r} has {free / 1e9:.1f} GB left. "
            f"{where}, or raise `Compute.max_memory`."
        )


def cached(source: TileSource, *, max_memory: int) -> TileSource:
    """Read all tiles once, and keep them for many passes.

    Parameters
    ----------
    source
        The source of the tiles.
    max_memory
        Bytes of memory for the tiles; more are kept in a temporary file, deleted with the result.

    Returns
    -------
    A source of the same tiles.

    Raises
    ------
    OSError
        If the temporary folder has not enough disk space.
    """
    check_positive(max_memory, "max_memory", integer=True)
    if isinstance(source, ArrayTiles):
        return source
    shape = (source.n, source.tile_px, source.tile_px, 3)
    size = int(np.prod(shape, dtype=np.int64))
    in_memory = size <= max_memory
    tiles: Any
    if in_memory:
        logger.info("Keeping %d tiles of %d px in memory (%.0f MB).", source.n, source.tile_px, size / 1e6)
        tiles = np.empty(shape, np.uint8)
    else:
        check_temporary_room(size, f"{source.n} tiles")
        folder = tempfile.TemporaryDirectory(prefix="pekasc-tiles-")
        logger.info(
            "Keeping %d tiles of %d px in a temporary file (%.0f MB, more than max_memory=%.0f MB).",
            source.n,
            source.tile_px,
            size / 1e6,
            max_memory / 1e6,
        )
        tiles = np.memmap(Path(folder.name) / "tiles.uint8", dtype=np.uint8, mode="w+", shape=shape)
    step = max(1, _CACHE_STEP_BYTES // (3 * source.tile_px**2))
    for positions, part in batches(source, step, prefetch=0):
        tiles[positions] = part
    return ArrayTiles(tiles) if in_memory else _TemporaryTiles(tiles, folder)
