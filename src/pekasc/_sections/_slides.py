"""Images of an object: those of a SpatialData, and the slide behind the reader of a WSIData."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatialdata import SpatialData

SLIDE = "wsi"  # wsidata's own name for the slide


def images_of(sdata: SpatialData) -> Mapping[str, Any]:
    """Return the images of an object by name, with the slide of a :class:`wsidata.WSIData`, lazily, as ``"wsi"``.

    By default, wsidata does not attach the slide as an image; its shapes are in pixels of level 0.
    """
    reader = _reader(sdata)
    if reader is None or SLIDE in sdata.images:
        return sdata.images
    from wsidata.reader import to_datatree

    return {**sdata.images, SLIDE: to_datatree(reader)}


def reader_mpp(sdata: SpatialData, image_name: str) -> Any:
    """Return the pixel size of the slide that wsidata's reader has open, or None."""
    reader = _reader(sdata)
    return reader.properties.mpp if reader is not None and image_name == SLIDE else None


def _reader(sdata: SpatialData) -> Any:
    # duck typing, since wsidata may not be installed
    reader = getattr(sdata, "reader", None)
    return reader if hasattr(reader, "get_region") and hasattr(reader, "properties") else None
