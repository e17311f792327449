"""JPEG images as zarr pyramids in a cache: a JPEG can only be decoded as a whole, which is done once per file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pekasc import _assemble
from pekasc._digests import sha256
from pekasc._settings import get_logger

if TYPE_CHECKING:
    import dask.array as da

logger = get_logger(__name__)

_CHUNK_PX = 1024  # a multiple of every level's factor, so that strips hold whole blocks


def jpeg_levels(file: Path, *, cache: Path | None = None) -> list[da.Array]:
    """Return the pyramid of a JPEG file, uint8 (3, y, x), finest first, as dask arrays over zarr arrays.

    The first call writes the arrays, named by the hash of the file, and later calls open them. If several processes
    need them at the same time, one writes and the others wait.

    Parameters
    ----------
    file
        The image.
    cache
        Folder of the cache; by default ``pooch.os_cache("pekasc")``.

    Raises
    ------
    ValueError
        If the file is no JPEG, or truncated.
    OSError
        If the cache cannot be written.
    """
    import dask.array as da
    import pooch
    from filelock import FileLock

    data = file.read_bytes()
    folder = (Path(pooch.os_cache("pekasc")) if cache is None else cache) / "images"
    target = folder / f"{sha256(data)[:16]}.zarr"
    arrays = _opened(target)
    if arrays is None:
        pixels = _decoded(data, file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_suffix(".lock")):
                arrays = _opened(target)
                if arrays is None:
                    _write(pixels, target)
                    arrays = _opened(target)
                    size = sum(entry.stat().st_size for entry in target.rglob("*") if entry.is_file())
                    logger.hint("%s: decoded once and kept as zarr, %s (%.0f MB).", file, target, size / 1e6)
        except OSError as error:
            raise OSError(
                f"{file} is decoded once and kept as zarr in {folder}, where it cannot be written ({error}). Make room "
                "there, or let another folder be the user's cache (XDG_CACHE_HOME, on Linux)."
            ) from error
    return [da.from_zarr(array) for array in arrays or []]


def _opened(path: Path) -> list[Any] | None:
    """Return the arrays of a pyramid, finest first; None if it is missing or incomplete."""
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
        finest: Any = group["0"]
        arrays: list[Any] = [group[str(i)] for i in range(len(_assemble.factors(*finest.shape[1:])))]
    except (FileNotFoundError, KeyError, NotADirectoryError):
        return None
    # part of the cache may have been deleted; zarr would return black for missing chunks
    return arrays if all(array.nchunks_initialized == array.nchunks for array in arrays) else None


def _decoded(data: bytes, file: Path) -> np.ndarray:
    """Return the pixels (y, x, 3) of a JPEG file."""
    from imagecodecs import Jpeg8Error, jpeg8_decode

    # the decoder fills missing data with grey; an end marker is followed by a few bytes at most
    if data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-1024:]:
        raise ValueError(f"{file} is a truncated JPEG image. Copy or download it again.")
    try:
        return jpeg8_decode(data, outcolorspace="RGB")
    except Jpeg8Error as error:
        raise ValueError(f"{file} is no image that can be read: {error}.") from error


def _write(pixels: np.ndarray, target: Path) -> None:
    """Write the pyramid atomically: under another name first, then renamed to `target`."""
    import zarr

    part = target.with_suffix(".part")
    for left in (part, target):  # left by a killed process, or incomplete
        shutil.rmtree(left, ignore_errors=True)
    try:
        _fill(zarr.open_group(part, mode="w"), pixels)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(group: Any, pixels: np.ndarray) -> None:
    """Write all levels strip by strip, without a second copy of the finest in memory."""
    height, width, _ = pixels.shape
    strips: dict[int, list[np.ndarray]] = {factor: [] for factor in _assemble.factors(height, width)}
    arrays = [
        group.create_array(
            str(i),
            shape=(3, height // factor, width // factor),
            chunks=(3, _CHUNK_PX, _CHUNK_PX),
            dtype=np.uint8,
            config={"write_empty_chunks": True},  # so that a missing chunk means a damaged cache
        )
        for i, factor in enumerate(strips)
    ]
    for y in range(0, height, _CHUNK_PX):
        strip = np.ascontiguousarray(np.moveaxis(pixels[y : y + _CHUNK_PX], -1, 0))
        arrays[0][:, y : y + _CHUNK_PX] = strip
        for factor, coarse in strips.items():
            if factor > 1:
                coarse.append(_assemble.block_mean(strip, factor))
    for array, coarse in zip(arrays[1:], list(strips.values())[1:], strict=True):
        array[:] = np.concatenate(coarse, axis=1)
