"""Images of an object: those of a SpatialData, and the slide behind the reader of a WSIData."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from spatialdata import SpatialData

from pekasc.tiling import Alpha, on_white

SLIDE = "wsi"  # wsidata's own name for the slide


def images_of(sdata: SpatialData) -> Mapping[str, Any]:
    """Return the images of an object by name, with the slide of a :class:`wsidata.WSIData`, lazily, as ``"wsi"``.

    By default, wsidata does not attach the slide as an image; its shapes are in pixels of level 0. What OpenSlide
    leaves transparent, because it was never scanned, is white as in every other slide. The image that wsidata attaches
    has it black, and is not the one that is read.
    """
    reader = _reader(sdata)
    if reader is None or (SLIDE in sdata.images and not _is_openslide(reader)):
        return sdata.images
    from spatialdata.transformations import get_transformation, set_transformation
    from wsidata.reader import to_datatree

    slide = to_datatree(OnWhite(reader) if _is_openslide(reader) else reader)
    if SLIDE in sdata.images:
        set_transformation(slide, get_transformation(sdata.images[SLIDE], get_all=True), set_all=True)
    return {**sdata.images, SLIDE: slide}


def reader_mpp(sdata: SpatialData, image_name: str) -> Any:
    """Return the pixel size of the slide that wsidata's reader has open, or None."""
    reader = _reader(sdata)
    return reader.properties.mpp if reader is not None and image_name == SLIDE else None


def _reader(sdata: SpatialData) -> Any:
    # duck typing, since wsidata may not be installed
    reader = getattr(sdata, "reader", None)
    return reader if hasattr(reader, "get_region") and hasattr(reader, "properties") else None


def _is_openslide(reader: Any) -> bool:
    return getattr(reader, "name", None) == "openslide" and hasattr(reader, "translate_level")


class OnWhite:
    """A reader of wsidata with OpenSlide behind it, whose alpha channel wsidata drops; pickled as the reader is."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.properties = reader.properties

    def get_region(self, x: int, y: int, width: int, height: int, level: int = 0) -> np.ndarray:
        """Return a rectangle, (y, x, 3); its corner is in pixels of level 0."""
        level = int(self._reader.translate_level(level))
        image = self._reader.reader.read_region((int(x), int(y)), level, (int(width), int(height)))
        return on_white(np.asarray(image), Alpha.UNASSOCIATED)
