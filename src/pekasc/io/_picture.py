"""PNG and JPEG files as dask arrays: one level in one chunk (rows of 1 GB), decoded when it is computed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import dask.array as da
import numpy as np
from dask.base import tokenize

from pekasc.io._limits import check_size, warn_of_large_chunk
from pekasc.io._orientation import check_orientation
from pekasc.tiling import Alpha, on_white, split_channels

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_LARGEST_CHUNK = 2**30  # codecs of zarr take less than 2 GB at once
_PNG_PARTS = 10**6
_ORIENTATION = 274
_GREY = "It is greyscale, and H&E is read from its colours. If it is no H&E, pekasc has no use for it."
_CONVERT = "Convert it, for instance with `PIL.Image.open(file).convert('RGB').save('new.png')`."


class _Picture:
    """A picture, (3, y, x) uint8, with the interface that dask needs; can be pickled."""

    ndim = 3
    dtype = np.dtype(np.uint8)

    def __init__(self, path: str, stamp: tuple[int, int], size: tuple[int, int]) -> None:
        self.path, self.stamp = path, stamp
        self.shape = (3, *size)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        return np.ascontiguousarray(self._pixels()[index])

    def _pixels(self) -> np.ndarray:
        stat = Path(self.path).stat()
        if (stat.st_mtime_ns, stat.st_size) != self.stamp:
            raise OSError(f"the file {self.path!r} has changed since it was read: read it again")
        try:
            with Path(self.path).open("rb") as file:
                image = _opened(file)
                # a palette, or a colour that stands for transparent
                if "transparency" in image.info:
                    image = image.convert("RGBA")
                elif image.mode == "P":
                    image = image.convert("RGB")
                pixels = np.asarray(image)
        except Exception as error:
            raise OSError(f"The image {self.path!r} is damaged: {error}") from error
        if pixels.shape[:2] != self.shape[1:] or pixels.shape[2:] not in ((3,), (4,)) or pixels.dtype != np.uint8:
            raise OSError(f"The image {self.path!r} is damaged: it holds {pixels.dtype} of shape {pixels.shape}.")
        out = np.empty(self.shape, np.uint8)
        split_channels(on_white(pixels, Alpha.UNASSOCIATED), out)
        return out


def _opened(file: BinaryIO) -> Any:
    """Return Pillow's image of an open file.

    Pillow's limit for decompression bombs is one number for all files; here, the size of the file justifies that of the
    picture, see `check_size`, and the plugins are asked directly.
    """
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    kind = PngImageFile if file.read(len(_PNG)) == _PNG else JpegImageFile
    file.seek(0)
    return kind(file)


def is_picture(path: Path) -> bool:
    """Tell from its first bytes whether a file is PNG or JPEG."""
    with path.open("rb") as file:
        start = file.read(len(_PNG))
    return start == _PNG or start.startswith(_JPEG)


def picture_levels(path: Path) -> list[da.Array]:
    """Return a PNG or JPEG as the one level of a slide, a dask array (3, y, x) of uint8.

    Raises
    ------
    ValueError
        If it is damaged, is not RGB of 8 bit, is to be turned before it is shown, or would be larger than the size of
        the file justifies.
    """
    path = path.resolve()
    stat = path.stat()
    what = f"The image {str(path)!r}"
    with path.open("rb") as file:
        exif = _check_png(file, stat.st_size, what) if file.read(len(_PNG)) == _PNG else None
        file.seek(0)
        try:
            image = _opened(file)
            width, height = image.size
            mode = image.mode
            orientation = image.getexif().get(_ORIENTATION) if exif is None else _orientation(exif)
        except Exception as error:
            raise ValueError(f"{what} cannot be read: {error}") from error
    if mode not in ("RGB", "RGBA", "P"):
        how = _GREY if mode in ("1", "L", "LA", "I", "I;16") else f"Its colours are {mode}. {_CONVERT}"
        raise ValueError(f"{what} must be RGB of uint8. {how}")
    if orientation is not None:
        check_orientation(orientation, what)
    check_size(height, width, stat.st_size, what)
    warn_of_large_chunk(path.name, 3 * height * width)
    stamp = (stat.st_mtime_ns, stat.st_size)
    level = _Picture(str(path), stamp, (height, width))
    name = f"pekasc-picture-{tokenize(str(path), stamp)}"
    rows = max(1, _LARGEST_CHUNK // (3 * width))
    return [da.from_array(level, chunks=(3, min(rows, height), width), name=name, meta=np.empty((0, 0, 0), np.uint8))]


def _check_png(file: BinaryIO, size: int, what: str) -> bytes:
    """Check the chunks of a PNG from its second on, and return its Exif data.

    Pillow reads 16 bit as 8 without a word, and finds Exif data after the pixels only by decoding them.
    """
    at, exif = len(_PNG), b""
    for number in range(_PNG_PARTS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            raise ValueError(f"{what} is cut short: it has {size} bytes and no end. Download it again.")
        length, kind = struct.unpack(">I4s", head)
        if at + 12 + length > size:
            raise ValueError(f"{what} is cut short: it has {size} bytes, and a part ends at {at + 12 + length}.")
        if number == 0 and kind != b"IHDR":
            raise ValueError(f"{what} is damaged: its header is missing.")
        if kind == b"IHDR":
            depth = file.read(length)[8:9]
            if depth == b"\x10":
                raise ValueError(
                    f"{what} must be RGB of uint8, but has 16 bits per channel. Convert it to 8 bit, for instance "
                    "`(pixels >> 8).astype('uint8')`, where all 16 bits are used."
                )
        elif kind == b"acTL":
            raise ValueError(f"{what} is an animation, not one picture.")
        elif kind == b"eXIf":
            exif = file.read(length)
        elif kind == b"IEND":
            return exif
        at += 12 + length
    raise ValueError(f"{what} is damaged: it has more than {_PNG_PARTS} parts.")


def _orientation(exif: bytes) -> int | None:
    from PIL.Image import Exif

    if not exif:
        return None
    found = Exif()
    found.load(exif)
    return found.get(_ORIENTATION)
