"""Slides that OpenSlide reads and pekasc does not: other formats than TIFF, and kinds of TIFF that are refused."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pekasc._sections import OnWhite
from pekasc._settings import get_logger
from pekasc.io._levels import TiledLevel, as_dask
from pekasc.io._power import Power, read_power
from pekasc.io._refusal import NotReadHere
from pekasc.io._tiff_mpp import PixelSize, pixel_size

if TYPE_CHECKING:
    import dask.array as da

logger = get_logger(__name__)

_INSTALL = "pip install 'pekasc[slides]'"
_TILE_PX = 512
_OPEN_FILES = 16  # maximum number of slides kept open
_OF_NO_SCANNER = "generic-tiff"


class _OpenSlideLevel(TiledLevel):
    """One level of a slide that OpenSlide reads, in squares of 512 px."""

    def __init__(self, path: str, stamp: tuple[int, int], level: int, shape: tuple[int, int], scale: float) -> None:
        super().__init__(path, stamp, level, shape, (_TILE_PX, _TILE_PX))
        self._scale = scale

    def _tile(self, y: int, x: int) -> np.ndarray:
        top, left = y * _TILE_PX, x * _TILE_PX
        height, width = min(_TILE_PX, self.shape[1] - top), min(_TILE_PX, self.shape[2] - left)
        reader = _opened_slide(self.path, self.stamp)
        try:
            # the corner is in pixels of the finest level
            corner = round(left * self._scale), round(top * self._scale)
            pixels = reader.get_region(*corner, width, height, level=self.level)
        except Exception as error:
            _opened_slide.cache_clear()  # after an error, OpenSlide gives nothing but that error
            raise OSError(f"OpenSlide cannot read {self.path!r} at {corner}: {error}") from error
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


@lru_cache(maxsize=_OPEN_FILES)
def _opened_slide(path: str, stamp: tuple[int, int]) -> OnWhite:
    from wsidata.reader import OpenSlideReader

    stat = Path(path).stat()
    if (stat.st_mtime_ns, stat.st_size) != stamp:
        raise OSError(f"the file {path!r} has changed since it was read: read it again")
    return OnWhite(OpenSlideReader(path))


def read_with_openslide(path: Path, refusal: NotReadHere) -> tuple[list[da.Array], PixelSize, Power | None]:
    """Return levels, pixel size and objective of a slide that pekasc refused to read by itself.

    Parameters
    ----------
    path
        The file, of several the one that is opened.
    refusal
        Why it was refused; the log says so.

    Raises
    ------
    ValueError
        If OpenSlide is not installed, does not know the format of a scanner, or cannot open the file.
    """
    try:
        from openslide import OpenSlide
        from wsidata.reader import OpenSlideReader  # noqa: F401 (the levels need it)
    except ImportError as error:
        raise ValueError(
            f"{refusal.why} OpenSlide may read it, by the extra that is not installed: `{_INSTALL}` ({error}). "
            f"{refusal.advice}"
        ) from refusal
    path = path.resolve()
    scanner = OpenSlide.detect_format(str(path))
    if scanner is None or scanner == _OF_NO_SCANNER:
        raise ValueError(f"{refusal.why} OpenSlide does not know its format either. {refusal.advice}") from refusal
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    try:
        slide = OpenSlide(str(path))
    except Exception as error:
        raise ValueError(
            f"The slide {str(path)!r} is of the format {scanner!r}, but OpenSlide cannot open it: {error}. Some "
            "formats have several files, which must all be there."
        ) from error
    with slide:
        properties, beside = dict(slide.properties), list(slide.associated_images)
        sizes, scales = list(slide.level_dimensions), list(slide.level_downsamples)
    logger.hint(
        "slide %s: read by OpenSlide (%s), since pekasc does not: %s%s",
        path.name, scanner, refusal.why, f" Left out: {', '.join(beside)}." if beside else "",
    )  # fmt: skip
    levels = [
        as_dask(_OpenSlideLevel(str(path), stamp, i, (height, width), scale), (_TILE_PX, _TILE_PX), "openslide")
        for i, ((width, height), scale) in enumerate(zip(sizes, scales, strict=True))
    ]
    where = "properties (openslide.mpp)"
    found = pixel_size(where, [properties.get(f"openslide.mpp-{axis}") for axis in "xy"])
    return levels, found, read_power(properties.get("openslide.objective-power"), "properties (objective-power)")
