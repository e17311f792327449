"""Large JPEG images as a source of regions: decoded when first read, the least recent forgotten when there are many."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pekasc.datasets._assemble import block_mean

if TYPE_CHECKING:
    from PIL import Image

# decoded images that are held at a time, in bytes: three of 276 MB; decoding one again takes a second
_MAX_DECODED = 900_000_000
_STRIP = 256
_LOCK = threading.RLock()
_DECODED: list[weakref.ref[Jpeg]] = []


class Jpeg:
    """A JPEG file of which any rectangle can be had.

    A JPEG can only be decoded as a whole. The pixels are kept from the first read on, as long as this object lives
    and no more than 0.9 GB of images is decoded at once.

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
        from PIL import Image

        with _LOCK:
            if self._pixels is not None:
                return self._pixels
            with _any_size(), Image.open(self.path) as image:
                pixels = _pixels(image)
            alive = [(ref, jpeg) for ref in _DECODED if (jpeg := ref()) is not None and jpeg._pixels is not None]
            held = pixels.nbytes + sum(jpeg._pixels.nbytes for _, jpeg in alive if jpeg._pixels is not None)
            while alive and held > _MAX_DECODED:
                _, oldest = alive.pop(0)
                held -= 0 if oldest._pixels is None else oldest._pixels.nbytes
                oldest._pixels = None
            _DECODED[:] = [ref for ref, _ in alive] + [weakref.ref(self)]
            self._pixels = pixels
            return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # another process decodes for itself


def _pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of an opened image, uint8 (3, y, x), strip by strip: a whole copy would double the memory."""
    out = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for y in range(0, image.height, _STRIP):
        strip = image.crop((0, y, image.width, min(y + _STRIP, image.height)))
        out[y : y + _STRIP] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return np.moveaxis(out, -1, 0)


class _any_size:
    """Let PIL open images above its limit, which guards web servers; the limit is put back."""

    def __enter__(self) -> None:
        from PIL import Image

        self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None

    def __exit__(self, *_: object) -> None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = self.limit
