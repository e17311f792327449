"""Pyramidal TIFF files as dask arrays: chunks are decoded when they are computed, and not kept."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize

from pekasc._settings import get_logger
from pekasc.tiling import split_channels

logger = get_logger(__name__)

_CHUNK_PX = 1024  # approximate side of a chunk, which is a multiple of the file's tiles
_UM_PER = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}
_MPP_LIMITS = (0.02, 20.0)
_SQUARE = 0.02
_OPEN_FILES = 16  # maximum number of files kept open
_LARGE_CHUNK = 512 * 2**20
_WHITE = 255


class _TiffLevel:
    """One level of a TIFF, (3, y, x) uint8, with the interface that dask needs; can be pickled."""

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
            if self.interleaved:
                pixels = np.moveaxis(_on_white(array[y, x]), -1, 0)
            else:
                pixels = np.moveaxis(_on_white(np.moveaxis(array[:, y, x], 0, -1)), -1, 0)
        except (OSError, RuntimeError, ValueError) as error:  # errors of decoders do not name the file
            raise OSError(
                f"The image {self.path!r} cannot be read at level {self.level}, rows {y.start}:{y.stop}, columns "
                f"{x.start}:{x.stop}; it is damaged there: {error}"
            ) from error
        return np.ascontiguousarray(pixels[c])


class _TiledTiffLevel(_TiffLevel):
    """A tiled level with interleaved channels, whose tiles can be decoded one by one."""

    def __init__(self, tile_px: tuple[int, int], *args: Any) -> None:
        super().__init__(*args)
        self.chunk_px = tile_px

    def read_chunk(self, y: int, x: int) -> np.ndarray:
        """Decode one tile of the file, (3, height, width), without zarr, so that threads decode in parallel."""
        number = y * -(-self.shape[2] // self.chunk_px[1]) + x
        try:
            pixels = _opened_file(self.path, self.stamp).tile(self.level, number)
        except (RuntimeError, ValueError) as error:
            raise OSError(f"tile {number} of {self.path!r} is damaged: {error}") from error
        out = np.empty((3, *self.chunk_px), np.uint8)
        if pixels is None:  # an empty tile, where nothing was scanned
            out[:] = _WHITE
            return out
        out = np.empty((3, *pixels.shape[:2]), np.uint8)
        split_channels(_on_white(pixels), out)
        return out


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """Return C-contiguous pixels (y, x, 3), blended with white where they are transparent."""
    if pixels.shape[-1] == 4:
        alpha = pixels[..., 3:]
        if (alpha < 255).any():
            share = alpha.astype(np.float32) / 255
            pixels = np.rint(share * pixels[..., :3] + (1 - share) * _WHITE).astype(np.uint8)
        pixels = pixels[..., :3]
    return np.ascontiguousarray(pixels)


class _File:
    """An open TIFF file for reading tiles, with one descriptor for all levels, closed with this object."""

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        import tifffile

        self._descriptor = os.open(path, os.O_RDONLY)
        stat = os.fstat(self._descriptor)
        if (stat.st_mtime_ns, stat.st_size) != stamp:
            raise OSError(f"the file {path!r} has changed since it was read: read it again")
        # only the pages are needed for decoding, so tifffile's own handle is closed
        with tifffile.TiffFile(path) as file:
            pages = [level.pages[0] for level in _series(file, path).levels]
            self._levels = [
                (page.keyframe.decode, page.dataoffsets, page.databytecounts, page.jpegtables, page.jpegheader)
                for page in pages
            ]

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def tile(self, level: int, number: int) -> np.ndarray | None:
        """Decode a tile, (y, x, c); None if it was never written."""
        decode, offsets, sizes, tables, header = self._levels[level]
        size = int(sizes[number])
        data = os.pread(self._descriptor, size, int(offsets[number]))
        if len(data) < size:
            raise ValueError(f"{len(data)} of {size} bytes are there")
        pixels = decode(data or None, number, jpegtables=tables, jpegheader=header)[0]
        return None if pixels is None else pixels[0]


@lru_cache(maxsize=_OPEN_FILES)
def _opened_file(path: str, stamp: tuple[int, int]) -> _File:
    return _File(path, stamp)


def _series(file: Any, path: str) -> Any:
    """Return the largest image of a TIFF with its pyramid; others are labels and overviews."""
    colour = [series for series in file.series if "S" in str(series.axes)]
    chosen = max(colour or file.series, key=lambda series: int(np.prod(series.shape)))
    others = [
        f"{series.name or i} {tuple(series.shape)}" for i, series in enumerate(file.series) if series is not chosen
    ]
    if others:
        logger.hint("%s: reading the largest image, %s; left out: %s.", path, tuple(chosen.shape), ", ".join(others))
    return chosen


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, stamp: tuple[int, int], level: int) -> Any:
    """Return a level as a zarr array; `stamp` invalidates the cache when the file changes."""
    import tifffile
    import zarr

    file = tifffile.TiffFile(path)
    return zarr.open_array(_series(file, path).aszarr(level=level), mode="r")


def tiff_levels(path: Path) -> list[da.Array]:
    """Return the levels of an RGB TIFF, finest first, as dask arrays (3, y, x) of uint8.

    Raises
    ------
    ValueError
        If the file is no TIFF, is truncated, or is not RGB of uint8.
    """
    import tifffile

    path = path.resolve()
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    try:
        with tifffile.TiffFile(path) as file:
            found = [
                (str(level.axes), tuple(level.shape), np.dtype(level.dtype), level.keyframe, _end(level))
                for level in _series(file, str(path)).levels
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
        if not _is_rgb(page):
            raise ValueError(
                f"The image {str(path)!r} (level {i}) holds colours that are not red, green and blue: "
                f"{page.photometric.name}, compression {page.compression.name}. Convert it to RGB, for instance with "
                "`vips`, or open it with wsidata."
            )
        if tile_bytes(page) > _LARGE_CHUNK:
            logger.warning(
                "The image %s has no tiles: %.1f GB are decoded at once to look at any part of it. Write it as a tiled "
                "pyramid.", path.name, tile_bytes(page) / 1e9,
            )  # fmt: skip
        if end > stat.st_size:
            raise ValueError(
                f"The image {str(path)!r} is cut short: it has {stat.st_size} bytes, level {i} ends at {end}. "
                "Download it again."
            )
        how = (str(path), stamp, i, axes, shape)
        tiled = axes == "YXS" and page.is_tiled and page.chunks[2:] == shape[2:]
        level = _TiledTiffLevel((page.chunks[0], page.chunks[1]), *how) if tiled else _TiffLevel(*how)
        # several tiles of the file per dask chunk; page.chunks includes the channels
        tile = [n for n in page.chunks if n > 4][:2]
        steps = tuple(n * max(1, _CHUNK_PX // n) for n in tile) if len(tile) == 2 else (_CHUNK_PX, level.shape[2])
        name = f"pekasc-tiff-{tokenize(str(path), stamp, i)}"
        arrays.append(da.from_array(level, chunks=(3, *steps), name=name, meta=np.empty((0, 0, 0), np.uint8)))
    return arrays


def _is_rgb(page: Any) -> bool:
    """Tell whether tifffile decodes the page to RGB."""
    from tifffile import COMPRESSION, PHOTOMETRIC

    if page.photometric == PHOTOMETRIC.RGB:
        return True
    # JPEG decoders convert YCbCr to RGB; Aperio's JPEG 2000 with YCbCr is not converted
    jpegs = {COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG2000}
    return page.photometric == PHOTOMETRIC.YCBCR and page.compression in jpegs


def tile_bytes(page: Any) -> int:
    """Return the size in bytes of one decoded chunk of the file."""
    return int(np.prod(page.chunks, dtype=np.int64))


def tiff_mpp(path: Path) -> float | None:
    """Return the pixel size in um of a TIFF's finest level from its metadata, or None if missing or implausible.

    It is in the OME metadata of an OME-TIFF, in the description of an Aperio slide, and else in the resolution tags.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = _series(file, str(path))
        page: Any = series.levels[0].keyframe
        text = page.description or ""
        found: list[float] = []
        if file.is_ome and file.ome_metadata:
            found = _ome_mpp(file.ome_metadata, file.series.index(series))
        elif match := re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", text):
            found = [float(match.group(1))]
        elif {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
            # without a unit the numbers are only a ratio
            unit = page.tags["ResolutionUnit"].value if "ResolutionUnit" in page.tags else 2
            if int(unit) in (2, 3):
                found = [1 / per_um for per_um in page.get_resolution(unit="micrometer") if per_um > 0]
    if not found or max(found) > (1 + _SQUARE) * min(found) or not _MPP_LIMITS[0] <= found[0] <= _MPP_LIMITS[1]:
        return None  # programs without a pixel size write defaults such as 72 dots per inch
    return found[0]


def _ome_mpp(metadata: str, image: int) -> list[float]:
    """Return the pixel sizes along x and y of one image of OME metadata, in um."""
    from xml.etree import ElementTree

    pixels = [e for e in ElementTree.fromstring(metadata).iter() if e.tag.endswith("}Pixels")]
    if image >= len(pixels):
        return []
    found = []
    for axis in "XY":
        value = pixels[image].get(f"PhysicalSize{axis}")
        factor = _UM_PER.get(pixels[image].get(f"PhysicalSize{axis}Unit", "µm"))
        if value is not None and factor is not None:
            found.append(float(value) * factor)
    return found


def _end(level: Any) -> int:
    """Return the offset in the file after the last byte of a level."""
    page = level.keyframe
    return int(np.max(np.add(page.dataoffsets, page.databytecounts))) if len(page.dataoffsets) else 0
