"""Pyramidal TIFF files as lazy arrays: a chunk is decoded when it is computed, nothing is kept."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize

from pekasc.tiling import split_channels

_CHUNK_PX = 1024  # about; whole tiles of the file
_UM_PER = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}
_MPP_LIMITS = (0.02, 20.0)
_SQUARE = 0.02
_OPEN_FILES = 16  # levels held open at a time, however many slides there are


class _TiffLevel:
    """One level of a TIFF, (3, y, x) uint8, as dask wants an array; another process opens the file for itself."""

    ndim = 3
    dtype = np.dtype(np.uint8)

    def __init__(self, path: str, stamp: tuple[int, int], level: int, axes: str, shape: tuple[int, ...]) -> None:
        self.path, self.stamp, self.level = path, stamp, level
        self.interleaved = axes == "YXS"
        self.shape = (3, *shape[:2]) if self.interleaved else (3, *shape[1:])

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        c, y, x = index
        try:
            array = _opened(self.path, self.stamp, self.level)
            # alpha, where there is one, is left out
            pixels = np.moveaxis(array[y, x][..., :3], -1, 0) if self.interleaved else array[:3, y, x]
        except (OSError, RuntimeError, ValueError) as error:  # what decoders raise names no file
            raise OSError(
                f"The image {self.path!r} cannot be read at level {self.level}, rows {y.start}:{y.stop}, columns "
                f"{x.start}:{x.stop}; it is damaged there: {error}"
            ) from error
        return np.ascontiguousarray(pixels[c])


class _TiledTiffLevel(_TiffLevel):
    """A level in square tiles, red, green and blue pixel by pixel, each of which can be decoded alone."""

    def __init__(self, tile_px: tuple[int, int], *args: Any) -> None:
        super().__init__(*args)
        self.chunk_px = tile_px

    def read_chunk(self, y: int, x: int) -> np.ndarray:
        """Decode one tile of the file, (3, height, width), past zarr: threads do so at once."""
        file, page = _opened_page(self.path, self.stamp, self.level)
        number = y * -(-self.shape[2] // self.chunk_px[1]) + x
        size = int(page.databytecounts[number])
        try:
            data = os.pread(file.filehandle.fileno(), size, int(page.dataoffsets[number]))
            if len(data) < size:
                raise ValueError(f"{len(data)} of {size} bytes are there")
            head = page.keyframe
            pixels = head.decode(data or None, number, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(f"tile {number} of {self.path!r} is damaged: {error}") from error
        if pixels is None:  # left out when the file was written
            return np.full((3, *self.chunk_px), head.nodata, np.uint8)
        out = np.empty((3, *pixels.shape[1:3]), np.uint8)
        split_channels(np.ascontiguousarray(pixels[0, ..., :3]), out)
        return out


@lru_cache(maxsize=_OPEN_FILES)
def _opened_page(path: str, stamp: tuple[int, int], level: int) -> tuple[Any, Any]:
    """Return an open file and the page of a level; `stamp` makes a file that has changed another one."""
    import tifffile

    file = tifffile.TiffFile(path)
    return file, file.series[0].levels[level].pages[0]


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, stamp: tuple[int, int], level: int) -> Any:
    """Return a level as a zarr array; `stamp` makes a file that has changed another one."""
    import tifffile
    import zarr

    return zarr.open_array(tifffile.imread(path, aszarr=True, series=0, level=level), mode="r")


def tiff_levels(path: Path) -> list[da.Array]:
    """Return the levels of an RGB TIFF, finest first, as dask arrays (3, y, x) of uint8.

    Raises
    ------
    ValueError
        If the file is no TIFF, is cut short, or is not RGB of uint8.
    """
    import tifffile

    path = path.resolve()
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    try:
        with tifffile.TiffFile(path) as file:
            found = [
                (str(level.axes), tuple(level.shape), np.dtype(level.dtype), level.keyframe, _end(level))
                for level in file.series[0].levels
            ]
    except (tifffile.TiffFileError, IndexError, OSError) as error:
        raise ValueError(f"The image {str(path)!r} cannot be read as TIFF: {error}") from error
    arrays = []
    for i, (axes, shape, dtype, page, end) in enumerate(found):
        n_channels = dict(zip(axes, shape, strict=True)).get("S", 1)
        if axes not in ("YXS", "SYX") or n_channels not in (3, 4) or dtype != np.uint8:
            raise ValueError(
                f"The image {str(path)!r} (level {i}) must be RGB of uint8, but has axes {axes}, shape {shape}, "
                f"{dtype}."
            )
        if end > stat.st_size:
            raise ValueError(
                f"The image {str(path)!r} is cut short: it has {stat.st_size} bytes, level {i} ends at {end}. "
                "Download it again."
            )
        how = (str(path), stamp, i, axes, shape)
        tiled = axes == "YXS" and page.is_tiled and page.chunks[2:] == shape[2:]
        level = _TiledTiffLevel((page.chunks[0], page.chunks[1]), *how) if tiled else _TiffLevel(*how)
        # chunks of the file, (y, x, c), without the channels: several tiles at once
        tile = [n for n in page.chunks if n > 4][:2]
        steps = tuple(n * max(1, _CHUNK_PX // n) for n in tile) if len(tile) == 2 else (_CHUNK_PX, level.shape[2])
        name = f"pekasc-tiff-{tokenize(str(path), stamp, i)}"
        arrays.append(da.from_array(level, chunks=(3, *steps), name=name, meta=np.empty((0, 0, 0), np.uint8)))
    return arrays


def tiff_mpp(path: Path) -> float | None:
    """Return um per pixel of a TIFF's finest level as its file says, or None where that is nothing to believe.

    An OME-TIFF says it in its metadata, an Aperio slide in its description, others in the resolution tags.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.series[0].levels[0].keyframe
        text = page.description or ""
        found: list[float] = []
        if file.is_ome and file.ome_metadata:
            found = [float(m) for m in re.findall(r'PhysicalSize[XY]="([0-9.eE+-]+)"', file.ome_metadata)[:2]]
            named = re.search(r'PhysicalSizeXUnit="([^"]+)"', file.ome_metadata)
            factor = _UM_PER.get(named.group(1) if named else "µm")
            found = [] if factor is None else [value * factor for value in found]
        elif match := re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", text):
            found = [float(match.group(1))]
        elif {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
            # without a unit the numbers are only a ratio
            unit = page.tags["ResolutionUnit"].value if "ResolutionUnit" in page.tags else 2
            if int(unit) in (2, 3):
                found = [1 / per_um for per_um in page.get_resolution(unit="micrometer") if per_um > 0]
    if not found or max(found) > (1 + _SQUARE) * min(found) or not _MPP_LIMITS[0] <= found[0] <= _MPP_LIMITS[1]:
        return None  # 72 dots per inch and the like are what programs write that know nothing
    return found[0]


def _end(level: Any) -> int:
    """Return where the last byte of a level lies in the file."""
    page = level.keyframe
    return int(np.max(np.add(page.dataoffsets, page.databytecounts))) if len(page.dataoffsets) else 0
