"""Slides that an object reads from their file: the images of a SpatialData, and the one behind wsidata's reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spatialdata import SpatialData

from pekasc._keys import IMAGE_MPP, UNS

SLIDE = "wsi"  # what wsidata calls it where it attaches it


def images_of(sdata: SpatialData) -> Mapping[str, Any]:
    """Return the images of an object by name, and the slide of a :class:`wsidata.WSIData`, lazily, as ``"wsi"``.

    wsidata leaves the slide in its file unless it is asked to attach it; its shapes are in pixels of level 0.
    """
    reader = _reader(sdata)
    if reader is None or SLIDE in sdata.images:
        return sdata.images
    from wsidata.reader import to_datatree

    return {**sdata.images, SLIDE: to_datatree(reader)}


def recorded_mpp(sdata: SpatialData, image_name: str) -> Any:
    """Return the pixel size of an image that its reader wrote down, or None: of `io.read_slide`, or of wsidata."""
    reader = _reader(sdata)
    if reader is not None and image_name == SLIDE:
        return reader.properties.mpp
    record = sdata.attrs.get(UNS, {})
    return record.get(IMAGE_MPP, {}).get(image_name) if isinstance(record, Mapping) else None


def _reader(sdata: SpatialData) -> Any:
    # by what it can do: wsidata need not be installed
    reader = getattr(sdata, "reader", None)
    return reader if hasattr(reader, "get_region") and hasattr(reader, "properties") else None
