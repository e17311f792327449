"""Read windows of one image level chunk by chunk, with a bounded cache of decoded chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from mmap import mmap
from threading import Lock
from typing import Any, Protocol

import numpy as np

from pekasc.tiling._parallel import in_threads
from pekasc.tiling._zarr_chunks import ZarrChunks

Key = tuple[int, int]
Box = tuple[int, int, int, int]
Chunks = dict[Key, np.ndarray]

# side of a virtual chunk, which orders the tiles of an image without chunks
_VIRTUAL_CHUNK = 1024
_LARGE_BYTES = 2**20


class ChunkSource(Protocol):
    """An image whose chunks can be decoded one by one, in several threads in parallel."""

    @property
    def chunk_px(self) -> tuple[int, int]:
        """Height and width of a chunk."""
        ...

    def read_chunk(self, y: int, x: int) -> np.ndarray:
        """Decode the chunk in row `y` and column `x`, all channels; it may extend beyond the image's border."""
        ...


def chunk_source(array: Any) -> ChunkSource | None:
    """Return a decoder that reads an image's chunks directly, without dask; None if that is not possible.

    It is possible for zarr arrays in folders, for arrays with ``read_chunk`` and ``chunk_px``, and for dask arrays of
    one of these without further operations.
    """
    source = _behind(array)
    return source if hasattr(source, "read_chunk") else ZarrChunks.of(source)


def _behind(array: Any) -> Any:
    """Return the array behind ``dask.array.from_zarr`` or ``from_array``; None if there are further operations."""
    if not hasattr(array, "__dask_graph__"):
        return array
    from dask.array.core import getter, getter_nofancy

    layers = getattr(array.__dask_graph__(), "layers", {})
    name = f"original-{array.name}"
    if set(layers) != {name, array.name}:
        return None
    task = getattr(layers[array.name], "task", None)
    if getattr(task, "func", None) not in (getter, getter_nofancy):  # a custom `getitem=`
        return None
    source = dict(layers[name]).get(name)
    return source if getattr(source, "shape", None) == array.shape else None


class ChunkError(OSError):
    """A chunk of the image that cannot be read."""

    def __init__(self, key: Key, message: str) -> None:
        super().__init__(message)
        self.key = key


class ChunkedLevel:
    """One level of an image, (3, height, width) uint8, read by chunks of its y and x axes.

    Parameters
    ----------
    array
        numpy, dask, or anything zarr-like: ``shape``, ``dtype``, slicing, and ``chunks`` where it has some.
    level
        Number of the level, for messages.
    max_memory
        Bytes of decoded chunks to keep. One request for chunks may need `request_bytes`; a single chunk larger than
        `max_memory` is decoded and kept nevertheless, since it cannot be read in parts.
    """

    def __init__(self, array: Any, *, level: int, max_memory: int) -> None:
        self._array = array
        self._level = level
        self._max_memory = max_memory
        self._recent: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._lock = Lock()
        self._dask = hasattr(array, "__dask_graph__") and hasattr(array, "numblocks")
        self.in_memory = isinstance(array, np.ndarray)
        self._stored = None if self.in_memory else chunk_source(array)
        self.height, self.width = (int(s) for s in array.shape[1:])
        self.y_edges, self.x_edges = _chunk_edges(array, None if self._stored is None else self._stored.chunk_px)
        # lists, since bisect is ten times as fast as searchsorted for single values
        self._y_list, self._x_list = self.y_edges.tolist(), self.x_edges.tolist()
        # decoding may need a second copy of the chunks
        self.request_bytes = max(max_memory // 4, 1)

    def __getstate__(self) -> dict[str, Any]:
        # decoded chunks are not pickled
        state = self.__dict__.copy()
        state["_recent"] = OrderedDict()
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of decoded chunks held now."""
        return sum(block.nbytes for block in self._recent.values())

    def release(self) -> None:
        """Drop all decoded chunks."""
        with self._lock:
            self._recent.clear()

    def chunk_bytes(self, key: Key) -> int:
        """Size of a decoded chunk in bytes."""
        y0, y1, x0, x1 = self._chunk_box(key)
        return 3 * (y1 - y0) * (x1 - x0)

    def chunks_of(self, box: Box) -> list[Key]:
        """Return the keys of the chunks that a box (y0, y1, x0, x1) overlaps; none for an image in memory."""
        y0, y1, x0, x1 = box
        if self.in_memory or y1 <= y0 or x1 <= x0:
            return []
        rows = range(bisect_right(self._y_list, y0) - 1, bisect_right(self._y_list, y1 - 1))
        columns = range(bisect_right(self._x_list, x0) - 1, bisect_right(self._x_list, x1 - 1))
        return [(y, x) for y in rows for x in columns]

    def window(self, box: Box, chunks: Chunks) -> np.ndarray:
        """Return the pixels in a box (y0, y1, x0, x1), C-contiguous, from the chunks that `fetch` returned."""
        y0, y1, x0, x1 = box
        if self.in_memory:
            return np.ascontiguousarray(self._array[:, y0:y1, x0:x1])
        keys = self.chunks_of(box)
        if len(keys) == 1:
            top, _, left, _ = self._chunk_box(keys[0])
            return np.ascontiguousarray(chunks[keys[0]][:, y0 - top : y1 - top, x0 - left : x1 - left])
        window = np.empty((3, y1 - y0, x1 - x0), np.uint8)
        for key in keys:
            top, bottom, left, right = self._chunk_box(key)
            a, b, c, d = max(top, y0), min(bottom, y1), max(left, x0), min(right, x1)
            window[:, a - y0 : b - y0, c - x0 : d - x0] = chunks[key][:, a - top : b - top, c - left : d - left]
        return window

    def fetch(self, keys: Iterable[Key]) -> Chunks:
        """Return decoded chunks, from the cache or decoded now; the least recently used are dropped."""
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            missing = [key for key in wanted if key not in self._recent]
            found = {key: self._recent[key] for key in wanted if key in self._recent}
            for key in found:
                self._recent.move_to_end(key)
            self._make_room(sum(map(self.chunk_bytes, missing)))
            new = {key: _mapped(block) for key, block in self._decode(missing).items()}
            found.update(new)
            self._recent.update(new)
            self._make_room(0)
        return found

    def _make_room(self, need: int) -> None:
        held = self.held_bytes
        # keep the newest chunk even if it is larger than the limit, or it would be decoded again for every batch
        keep = 0 if need else 1
        while len(self._recent) > keep and held + need > self._max_memory:
            held -= self._recent.popitem(last=False)[1].nbytes

    def _chunk_box(self, key: Key) -> Box:
        y, x = key
        return self._y_list[y], self._y_list[y + 1], self._x_list[x], self._x_list[x + 1]

    def _decode(self, keys: list[Key]) -> Chunks:
        if self._stored is not None:
            return dict(zip(keys, in_threads(self._decode_one, keys), strict=True))
        if self._dask and len(keys) > 1:
            try:
                return dict(zip(keys, self._compute(keys), strict=True))
            except Exception:  # noqa: BLE001 a decoder may raise anything; one by one, the error names the chunk
                return {key: self._decode_one(key) for key in keys}
        return {key: self._decode_one(key) for key in keys}

    def _decode_one(self, key: Key) -> np.ndarray:
        try:
            if self._stored is not None:
                return self._read_stored(key)
            return self._compute([key])[0] if self._dask else self._slice(key)
        except Exception as error:
            y0, y1, x0, x1 = self._chunk_box(key)
            raise ChunkError(
                key,
                f"chunk {key} of image level {self._level} (rows {y0}:{y1}, columns {x0}:{x1}) cannot be read: "
                f"{type(error).__name__}: {error}",
            ) from error

    def _read_stored(self, key: Key) -> np.ndarray:
        assert self._stored is not None  # for the type checker
        y0, y1, x0, x1 = self._chunk_box(key)
        block = self._stored.read_chunk(*key)
        return block if block.shape[1:] == (y1 - y0, x1 - x0) else block[:, : y1 - y0, : x1 - x0].copy()

    def _slice(self, key: Key) -> np.ndarray:
        y0, y1, x0, x1 = self._chunk_box(key)
        return self._checked(np.asarray(self._array[:, y0:y1, x0:x1]), key)

    def _compute(self, keys: list[Key]) -> list[np.ndarray]:
        """Compute chunks of a dask array from their keys alone.

        Culling the graph to these keys takes microseconds for lazy layers, independent of the size of the image;
        slicing the array would add a layer of tasks for every tile. Chunks of one call share their dependencies.
        """
        from dask.local import get_sync
        from dask.optimization import cull
        from dask.threaded import get as get_threaded

        n_parts = self._array.numblocks[0]
        names = [(self._array.name, c, y, x) for y, x in keys for c in range(n_parts)]
        graph = self._array.__dask_graph__()
        tasks = dict(graph.cull(set(names))) if hasattr(graph, "cull") else cull(graph, names)[0]
        get = get_threaded if len(names) > 1 else get_sync
        parts = [np.asarray(part) for part in get(tasks, names)]
        blocks = []
        for i, key in enumerate(keys):
            own = parts[i * n_parts : (i + 1) * n_parts]
            blocks.append(self._checked(own[0] if n_parts == 1 else np.concatenate(own), key))
        return blocks

    def _checked(self, block: np.ndarray, key: Key) -> np.ndarray:
        y0, y1, x0, x1 = self._chunk_box(key)
        if block.shape != (3, y1 - y0, x1 - x0) or block.dtype != np.uint8:
            raise ValueError(
                f"expected a uint8 array of shape {(3, y1 - y0, x1 - x0)}, got {block.dtype} of shape {block.shape}"
            )
        # copy views, which would keep their base, possibly the whole image, in memory
        return block if block.base is None else block.copy()


def _mapped(block: np.ndarray) -> np.ndarray:
    """Return a large chunk in memory of its own, which the system gets back when the chunk is dropped.

    On the heap, chunks of several threads would leave holes, which the process keeps: half as much again.
    """
    if block.nbytes < _LARGE_BYTES:
        return block
    out = np.frombuffer(mmap(-1, block.nbytes), dtype=np.uint8).reshape(block.shape)
    out[:] = block
    return out


def _chunk_edges(array: Any, stored_px: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    chunks = getattr(array, "chunks", None) if stored_px is None else (0, *stored_px)
    edges = []
    for axis in (1, 2):
        size = int(array.shape[axis])
        chunk = chunks[axis] if chunks else _VIRTUAL_CHUNK
        if isinstance(chunk, tuple):
            edges.append(np.concatenate([[0], np.cumsum(chunk, dtype=np.int64)]))
        else:
            edges.append(np.append(np.arange(0, size, int(chunk), dtype=np.int64), size))
    return edges[0], edges[1]
