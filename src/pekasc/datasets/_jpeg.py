"""Large JPEG images as a source of regions: decoded when first read, the least recent forgotten when there are many."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from pekasc.datasets._assemble import block_mean

# decoded images that are held at a time, in bytes: two of 276 MB; decoding one again takes a second
_MAX_DECODED = 600_000_000
_STRIP = 256
_LOCK = threading.RLock()
_DECODED: list[weakref.ref[Jpeg]] = []


class Jpeg:
    """A JPEG file of which any rectangle can be had.

    A JPEG can only be decoded as a whole. The pixels are kept from the first read on, as long as this object lives
    and no more than 0.6 GB of images is decoded at once.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path) -> None:
        from PIL import Image, UnidentifiedImageError

        self.path = Path(path).resolve()
        try:
            with _LOCK, _any_size(), Image.open(self.path) as image:
                self.width, self.height = image.size
        except UnidentifiedImageError as error:
            raise ValueError(f"{self.path} is no image that can be read.") from error
        stat = self.path.stat()
        self.token = (str(self.path), stat.st_mtime_ns, stat.st_size)
        self._pixels: np.ndarray | None = None

    def region(self, x0: int, y0: int, width: int, height: int, factor: int) -> np.ndarray:
        """Return a rectangle of the image made smaller by `factor`, uint8 (3, y, x)."""
        pixels = self._decode()
        part = pixels[:, y0 * factor : (y0 + height) * factor, x0 * factor : (x0 + width) * factor]
        return np.ascontiguousarray(part) if factor == 1 else block_mean(part, factor)

    def _decode(self) -> np.ndarray:
        with _LOCK:
            if self._pixels is not None:
                return self._pixels
            alive = [(ref, jpeg) for ref in _DECODED if (jpeg := ref()) is not None and jpeg._pixels is not None]
            held = 3 * self.width * self.height + sum(
                jpeg._pixels.nbytes for _, jpeg in alive if jpeg._pixels is not None
            )
            while alive and held > _MAX_DECODED:
                _, oldest = alive.pop(0)
                held -= 0 if oldest._pixels is None else oldest._pixels.nbytes
                oldest._pixels = None
            self._pixels = pixels = _pixels(self.path)
            _release()
            _DECODED[:] = [ref for ref, _ in alive] + [weakref.ref(self)]
            return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # another process decodes for itself


def _pixels(path: Path) -> np.ndarray:
    """Return the pixels of an image, uint8 (3, y, x), copied strip by strip: a whole copy would double the memory."""
    from PIL import Image

    with _any_size(), Image.open(path) as image:
        out = np.empty((image.height, image.width, 3), dtype=np.uint8)
        for y in range(0, image.height, _STRIP):
            strip = image.crop((0, y, image.width, min(y + _STRIP, image.height)))
            out[y : y + _STRIP] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return np.moveaxis(out, -1, 0)


def _release() -> None:
    """Hand the decoder's memory back: the C library keeps it per thread, 0.4 GB for each that ever decoded."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc has it, other C libraries do not
        ctypes.CDLL(None).malloc_trim(0)


class _any_size:
    """Let PIL open images above its limit, which guards web servers; the limit is put back."""

    def __enter__(self) -> None:
        from PIL import Image

        self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None

    def __exit__(self, *_: object) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = self.limit
