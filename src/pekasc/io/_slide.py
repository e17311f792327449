"""`io.read_slide`: read a whole slide image lazily."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pekasc import _assemble
from pekasc._keys import IMAGE_MPP, UNS, check_key, short_name
from pekasc._sections import check_mpp
from pekasc._settings import get_logger
from pekasc.io._tiff import tiff_levels
from pekasc.io._tiff_mpp import PixelSize, tiff_mpp

if TYPE_CHECKING:
    from os import PathLike

    from spatialdata import SpatialData

logger = get_logger(__name__)


def read_slide(path: str | PathLike[str], *, name: str | None = None, image_mpp: float | None = None) -> SpatialData:
    """Read a whole slide image (TIFF, OME-TIFF, SVS, NDPI and others that tifffile reads) lazily, with its pyramid.

    Pixels are decoded on access and never copied into the object. Add the spots of the section, in pixels of the slide,
    and its table to the returned object; :func:`pekasc.pp.tile` then reads tiles from the file. A slide opened with
    :func:`wsidata.open_wsi` can be used as ``sdata`` directly.

    Parameters
    ----------
    path
        The file.
    name
        Name of the image and of its coordinate system; by default the name of the file without extension.
    image_mpp
        Pixel size of the finest level in um; by default from the metadata of the file.

    Returns
    -------
    SpatialData with ``images[name]``, uint8 (c, y, x), multi-scale if the file is, in the coordinate system `name`,
    whose unit is a pixel of the finest level. ``attrs["pekasc"]["image_mpp"][name]`` is the pixel size in um, if known.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read, is truncated, or is not RGB of uint8.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.io.read_slide("slide.svs")  # doctest: +SKIP
    """
    from spatialdata import SpatialData

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The slide {str(file)!r} is not there.")
    name = short_name(file.name.split(".")[0]) if name is None else check_key(name, argument="name")
    levels = tiff_levels(file)
    found = tiff_mpp(file) if image_mpp is None else PixelSize(check_mpp(image_mpp, "`image_mpp`"))
    sdata = SpatialData(images={name: _assemble.multiscale(levels, name)})
    if found.mpp is not None:
        sdata.attrs[UNS] = {IMAGE_MPP: {name: found.mpp}}
    elif found.unused:
        logger.warning(
            "The pixel size of the slide %s is not known: %s. Give `image_mpp=` to `pekasc.pp.tile`.", file.name,
            "; ".join(found.unused),
        )  # fmt: skip
    else:
        logger.warning("The slide %s does not say its pixel size: give `image_mpp=` to `pekasc.pp.tile`.", file.name)
    height, width = levels[0].shape[1:]
    logger.info("slide %s: %d x %d px, %d levels, %s um/px.", name, width, height, len(levels), found.mpp or "unknown")
    return sdata
