"""Read the tiles of one section from an image pyramid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from pekasc.tiling import _resample
from pekasc.tiling._chunks import Box, ChunkedLevel, ChunkError, Chunks, Key
from pekasc.tiling._geometry import TileGeometry, aligned_axes, check_positive
from pekasc.tiling._parallel import in_threads, n_threads
from pekasc.tiling._stain import StainMap

# relative difference up to which sizes are equal, since pixel sizes are rounded decimals
_SAME_SIZE = 1e-6
MAX_MEMORY = 256 * 2**20
_SQUARE_PX = 1024
_STRIP_PX = 16 * _SQUARE_PX  # tiles of a wider image are read strip by strip: fewer chunks lie between two rows
_LEAST_PART = 4  # minimum number of tiles per thread


class ImagePyramid:
    """An RGB image at one or several resolutions.

    Parameters
    ----------
    levels
        Arrays (3, y, x) of uint8, the finest first: numpy, dask or zarr-like.
    scales
        Level-0 pixels per pixel of each level, (x, y); (1, 1) first.

    Raises
    ------
    TypeError
        If a level is not uint8.
    ValueError
        If a level does not have shape (3, y, x), or the scales do not fit the levels.
    """

    def __init__(self, levels: Sequence[Any], scales: Sequence[tuple[float, float]]) -> None:
        if not levels or len(levels) != len(scales):
            raise ValueError(
                f"An image needs one scale for each level, got {len(levels)} levels, {len(scales)} scales."
            )
        for i, level in enumerate(levels):
            if len(level.shape) != 3 or level.shape[0] != 3 or 0 in level.shape:
                raise ValueError(f"Level {i} of the image must have shape (3, y, x), got {tuple(level.shape)}.")
            if np.dtype(level.dtype) != np.uint8:
                raise TypeError(f"Level {i} of the image must be uint8, got {level.dtype}.")
        self.levels = list(levels)
        self.scales = [(float(sx), float(sy)) for sx, sy in scales]
        if not np.isfinite(self.scales).all() or np.min(self.scales) <= 0:
            raise ValueError(f"Scales must be positive, got {self.scales}.")
        if self.scales[0] != (1.0, 1.0):
            raise ValueError(f"The first level has scale (1, 1) by definition, got {self.scales[0]}.")

    @property
    def height(self) -> int:
        """Height of level 0 in pixels."""
        return int(self.levels[0].shape[1])

    @property
    def width(self) -> int:
        """Width of level 0 in pixels."""
        return int(self.levels[0].shape[2])


class TileReader:
    """Read the tiles of one section, decoding each image chunk once per call.

    For tiles aligned with the image's axes, downscaling is the exact area average, a whole-pixel shift at scale 1 a
    copy, and upscaling linear interpolation. For rotated tiles, the area average is taken over samples. Pixels outside
    of the image are white. Values are rounded to the nearest grey level.

    Parameters
    ----------
    pyramid
        The image.
    geometry
        The tiles.
    max_memory
        Bytes of decoded chunks kept between calls.
    label
        Name of the section and its image, for messages.
    stain
        Map that brings the colours of the section to a reference.

    Attributes
    ----------
    n
        Number of tiles.
    tile_px
        Pixels along the side of a tile.
    inside
        (n,) float32, fraction of each tile inside the image.
    level
        Level of the pyramid that is read: the coarsest whose pixels are not larger than the tile's.
    upsampling
        Pixel size of level 0 relative to that of the tiles if no level is fine enough, else 1.
    reading_order
        (n,) int64, the tiles sorted by the image chunk of their centre, of a wide image within vertical strips.
    canonical_order
        (n,) int64, the tiles sorted by such strips and large squares of the image: nearly as fast to read, and
        independent of the image's chunks and of the order of the tiles.
    """

    def __init__(
        self, pyramid: ImagePyramid, geometry: TileGeometry, *, max_memory: int = MAX_MEMORY, label: str = "",
        stain: StainMap | None = None,
    ) -> None:  # fmt: skip
        check_positive(max_memory, "max_memory", integer=True)
        self.n = len(geometry)
        self.label, self.stain = label, stain
        self.tile_px = geometry.spec.tile_px
        self.inside = geometry.inside(pyramid.width, pyramid.height)
        self.level, self.upsampling = _choose_level(pyramid, geometry)
        self.max_memory = int(max_memory)
        scale = np.array(pyramid.scales[self.level])
        self._source = ChunkedLevel(pyramid.levels[self.level], level=self.level, max_memory=self.max_memory)
        centres = geometry.centres_px / scale
        self._set_map(geometry.px_per_tile_px / scale[:, None], centres)
        self.reading_order = self._order_by_chunk(centres)
        self._rank = np.argsort(self.reading_order)
        x, y = np.round(centres, 3).T
        squares = x // _SQUARE_PX, y // _SQUARE_PX, x // _STRIP_PX
        self.canonical_order = np.lexsort((x, y, *squares)).astype(np.int64)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles.

        Parameters
        ----------
        index
            Indices of the tiles, in any order.

        Returns
        -------
        (k, tile_px, tile_px, 3) uint8, in the order of `index`.

        Raises
        ------
        IndexError
            If a tile does not exist.
        OSError
            If an image chunk cannot be read; the message names it and the tile.
        """
        index = check_index(index, self.n)
        tiles = np.empty((len(index), self.tile_px, self.tile_px, 3), np.uint8)
        boxes = self._boxes(index)
        for positions, keys in self._groups(index, boxes):
            try:
                chunks = self._source.fetch(keys)
            except ChunkError as error:
                tile = next(int(index[p]) for p in positions if error.key in self._source.chunks_of(boxes[p]))
                where = f" of {self.label}" if self.label else ""
                raise OSError(f"Tile {tile}{where} cannot be read: {error}") from error.__cause__
            # few and large parts, since submitting one costs as much as half a tile
            step = max(_LEAST_PART, -(-len(positions) // n_threads()))
            parts = [positions[i : i + step] for i in range(0, len(positions), step)]
            in_threads(partial(self._resample_all, index=index, boxes=boxes, chunks=chunks, tiles=tiles), parts)
        return tiles

    def release(self) -> None:
        """Drop the decoded chunks, and the colours of the stain map, kept between calls."""
        self._source.release()
        if self.stain is not None:
            self.stain.release()

    def _set_map(self, matrix: np.ndarray, centres: np.ndarray) -> None:
        """Set the map from tile pixels to pixels of the level: ``corner + matrix @ (column, row)``."""
        self._axes = aligned_axes(matrix, self.tile_px)
        if self._axes is not None:
            matrix = np.where(np.eye(2, dtype=bool) == (self._axes == "straight"), matrix, 0.0)
        self._matrix = matrix
        self._corners = centres - matrix @ np.full(2, self.tile_px / 2)
        steps = np.linalg.norm(matrix, axis=0)
        if steps.min() < 1 - _SAME_SIZE:
            # upscaling: one sample as wide as a pixel is linear interpolation
            self._samples, self._sample_box = (1, 1), 1.0
        else:
            # samples of at most 2/3 pixel differ by 0.1 grey levels from the exact area average on tissue
            self._samples = (ceil(1.5 * steps[0]), ceil(1.5 * steps[1]))
            self._sample_box = float(np.sqrt(abs(np.linalg.det(matrix)) / np.prod(self._samples)))

    def _order_by_chunk(self, centres: np.ndarray) -> np.ndarray:
        edges = (self._source.x_edges, self._source.y_edges)
        columns, rows = (np.searchsorted(e, c, side="right") for e, c in zip(edges, centres.T, strict=True))
        # lexsort: by strips first, then rows, then columns; ties keep the order of the tiles
        return np.lexsort((columns, rows, centres[:, 0] // _STRIP_PX)).astype(np.int64)

    def _boxes(self, index: np.ndarray) -> list[Box]:
        """Return boxes (y0, y1, x0, x1) of the pixels that the tiles need, clipped to the image."""
        span = self._matrix * self.tile_px
        low = self._corners[index] + np.minimum(span, 0).sum(axis=1)
        high = self._corners[index] + np.maximum(span, 0).sum(axis=1)
        margin = 1 if self._axes is None or np.abs(self._matrix).sum(axis=1).min() < 1 else 0
        size = np.array([self._source.width, self._source.height])
        low = np.clip(np.floor(low + _resample.SNAP_PX) - margin, 0, size).astype(np.int64)
        high = np.clip(np.ceil(high - _resample.SNAP_PX) + margin, 0, size).astype(np.int64)
        return [(y0, y1, x0, x1) for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist(), strict=True)]

    def _groups(self, index: np.ndarray, boxes: list[Box]) -> Iterator[tuple[list[int], list[Key]]]:
        """Group tiles in reading order such that the chunks of a group fit in the memory of one request."""
        if self._source.in_memory:
            yield list(range(len(index))), []
            return
        positions: list[int] = []
        keys: dict[Key, None] = {}
        size = 0
        for p in np.argsort(self._rank[index], kind="stable").tolist():
            new = [key for key in self._source.chunks_of(boxes[p]) if key not in keys]
            more = sum(map(self._source.chunk_bytes, new))
            if positions and size + more > self._source.request_bytes:
                yield positions, list(keys)
                positions, keys, size = [], {}, 0
                new = self._source.chunks_of(boxes[p])
                more = sum(map(self._source.chunk_bytes, new))
            positions.append(p)
            keys.update(dict.fromkeys(new))
            size += more
        if positions:
            yield positions, list(keys)

    def _resample_all(
        self, positions: list[int], *, index: np.ndarray, boxes: list[Box], chunks: Chunks, tiles: np.ndarray
    ) -> None:
        for p in positions:
            self._resample(self._source.window(boxes[p], chunks), boxes[p], int(index[p]), tiles[p])
            if self.stain is not None:
                self.stain.recolour(tiles[p].reshape(-1, 3))

    def _resample(self, window: np.ndarray, box: Box, tile: int, out: np.ndarray) -> None:
        y0, _, x0, _ = box
        # positions relative to the window, in double precision
        x, y = self._corners[tile] - (x0, y0)
        if window.size == 0:
            out[:] = _resample.WHITE
        elif self._axes is None:
            nx, ny = self._samples
            _resample.resample_affine(window, x, y, self._matrix, nx, ny, self._sample_box, out)
        else:
            swapped = self._axes == "swapped"
            x_step, y_step = self._matrix.sum(axis=1)
            first = np.array([x, y]) + np.minimum([x_step, y_step], 0)
            first_px = np.rint(first)
            shift = np.abs(first - first_px).max() + np.abs(np.abs([x_step, y_step]) - 1).max() * self.tile_px
            if shift < _resample.SNAP_PX:
                steps = int(np.sign(x_step)), int(np.sign(y_step))
                x_px, y_px = first_px.astype(np.int64).tolist()
                _resample.copy_axes(window, x_px, steps[0], y_px, steps[1], swapped, out)
            else:
                _resample.resample_axes(window, x, x_step, y, y_step, swapped, out)


def check_index(index: Any, n: int) -> np.ndarray:
    """Check indices of tiles, and return them as int64."""
    array = np.atleast_1d(np.asarray(index))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"Tiles are chosen by a list of integers, got {array.dtype} of shape {array.shape}.")
    array = array.astype(np.int64)
    if array.size and (array.min() < 0 or array.max() >= n):
        wrong = array[(array < 0) | (array >= n)][0]
        raise IndexError(f"There is no tile {wrong}: tiles are numbered from 0 to {n - 1}.")
    return array


def _choose_level(pyramid: ImagePyramid, geometry: TileGeometry) -> tuple[int, float]:
    """Return the coarsest level whose pixels are not larger than the tile's, and the upsampling (1 if there is one)."""
    mpp = geometry.spec.mpp
    # lengths in micrometers of one level-0 pixel along x and y
    pixel_um = np.linalg.norm(np.linalg.inv(geometry.um_to_px), axis=0)
    sizes = [float((pixel_um * scale).max()) for scale in pyramid.scales]
    fine = [i for i, size in enumerate(sizes) if size <= mpp * (1 + _SAME_SIZE)]
    if fine:
        return max(fine, key=lambda i: sizes[i]), 1.0
    return 0, sizes[0] / mpp
