"""`io.read_slide`: read a whole slide image lazily."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pekasc import _assemble
from pekasc._keys import (
    IMAGE_MPP_SOURCE,
    OBJECTIVE_POWER,
    UNS,
    check_key,
    element_name,
    slide_stem,
)
from pekasc._paths import is_zarr
from pekasc._sections import check_mpp, pixel_size_records, record_on_images
from pekasc._settings import get_logger
from pekasc.io._openslide import read_with_openslide
from pekasc.io._picture import is_picture, picture_levels
from pekasc.io._power import Power, check_power, tiff_power
from pekasc.io._refusal import NotReadHere
from pekasc.io._tiff import tiff_levels
from pekasc.io._tiff_mpp import PixelSize, tiff_mpp
from pekasc.io._tiff_scenes import choose_scene, find_scene

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    import dask.array as da
    from spatialdata import SpatialData

logger = get_logger(__name__)


def read_slide(
    path: str | PathLike[str],
    *,
    name: str | None = None,
    image_mpp: float | None = None,
    scene: int | str | None = None,
) -> SpatialData:
    """Read an H&E image (TIFF and formats made of it, PNG, JPEG) lazily, with its pyramid.

    TIFF is read as OME-TIFF, SVS, NDPI and others that tifffile knows have it, with tiles or strips, with samples
    together or in planes. Three channels of an OME-TIFF are red, green and blue
    if they are named so or have no names. What was never scanned is white, and so is what is transparent by an alpha
    channel (TIFF's ExtraSamples says of which kind it is, or that a fourth channel is none). PNG and JPEG are one level
    without tiles, and say no pixel size; a palette of a PNG is resolved. Other formats of scanners (MRXS, VMS, DICOM,
    ...), and kinds of TIFF that are not read here (BIF, JPEG 2000 of YCbCr), are read by OpenSlide, if the extra is
    installed (``pip install "pekasc[slides]"``); the log says so.

    Pixels are decoded on access and never copied into the object. Add the spots of the section, in pixels of the slide,
    and its table to the returned object; :func:`pekasc.pp.tile` then reads tiles from the file. A slide opened with
    :func:`wsidata.open_wsi` can be used as ``sdata`` directly.

    Parameters
    ----------
    path
        The file. What it holds decides how it is read, not its name (but for ``.ndpi``).
    name
        Name of the image and of its coordinate system; by default the name of the file without the ending of its
        format (``a.1`` of ``a.1.ome.tif``). What SpatialData does not store in a name is replaced by ``_``, and a
        digest is added, so that different names stay different. Files of one name in two folders need names.
    image_mpp
        Pixel size of the finest level in um; by default from the metadata of the file: OME metadata, ``MPP`` in an
        Aperio description, ImageJ's metadata and resolution tags, which must agree within 2 %, and fit to the power
        of the objective.
    scene
        Which of several scenes (large images of a TIFF; labels, macros and thumbnails are none) is read: its index or
        its name; by default the largest. The log says which there are, and which is read. A scene that was asked for is
        in the default name of the image: ``a.1_0``.

    Returns
    -------
    SpatialData with ``images[name]``, uint8 (c, y, x), multi-scale if the file is, in the coordinate system `name`,
    whose unit is a pixel of the finest level. ``attrs["pekasc"]`` holds, each by `name`, ``["image_mpp"]``, the pixel
    size in um, ``["image_mpp_source"]``, where it is from, and ``["objective_power"]``, all as far as they are known.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    TypeError
        If `scene` is neither an index nor a name.
    ValueError
        If `path` is empty or a folder; if there is no such scene; if the file is of no format that is read here,
        truncated or damaged (also where it says a size that its bytes do not justify); if it is not RGB of uint8
        (greyscale, 16 bit, CMYK, fluorescence, a TIFF with a palette); if it asks to be turned or mirrored before it is
        shown (TIFF's or Exif's orientation); or, without `image_mpp`, if its metadata says two pixel sizes, or one that
        is not within a factor of 2 of what the objective's power makes likely: 10 um by the power, 0.25 um at 40x.
    OSError
        When pixels are computed that are damaged in the file, or if the file has changed since.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.io.read_slide("slide.svs")  # doctest: +SKIP
    """
    from spatialdata import SpatialData

    file = _file(path)
    name = _name(file.name, scene) if name is None else check_key(name, argument="name")
    given = None if image_mpp is None else PixelSize(check_mpp(image_mpp, "`image_mpp`"), source="`image_mpp`")
    power = None
    if is_picture(file):
        if scene is not None:
            find_scene([""], scene, file.name)
        levels, found = picture_levels(file), given or PixelSize(None)
    else:
        levels, found, power = _read(file, scene, given)
    if power is not None and found.mpp is not None and given is None:
        check_power(power, found.mpp, found.source, file.name)
    sdata = SpatialData(images={name: _assemble.multiscale(levels, name)})
    _record(sdata, name, file.name, levels, found, power)
    return sdata


def _read(
    file: Path, scene: int | str | None, given: PixelSize | None
) -> tuple[list[da.Array], PixelSize, Power | None]:
    """Return levels, pixel size and objective of a TIFF, or of what OpenSlide reads."""
    image = None
    try:
        image = choose_scene(file, scene)
        return tiff_levels(file, image), given or tiff_mpp(file, image), tiff_power(file, image)
    except NotReadHere as refusal:
        if image is not None and scene is not None:
            raise  # OpenSlide has its own idea of which image of a TIFF is the slide
        levels, found, power = read_with_openslide(file, refusal)
    if scene is not None:
        find_scene([""], scene, file.name)
    return levels, given or found, power


def _record(
    sdata: SpatialData, name: str, file_name: str, levels: Sequence[da.Array], found: PixelSize, power: Power | None
) -> None:
    """Write what the file says of the image into the object, and log it."""
    height, width = levels[0].shape[1:]
    record: dict[str, dict[str, Any]] = {}
    if found.mpp is not None:
        record = pixel_size_records({name: sdata.images[name]}, {name: found.mpp})
        record_on_images({name: sdata.images[name]}, record)
        record[IMAGE_MPP_SOURCE] = {name: found.source.strip("`")}
    if power is not None:
        record[OBJECTIVE_POWER] = {name: power.value}
    if record:
        sdata.attrs[UNS] = record
    lens = "" if power is None else f", objective {power.value:g}x by its {power.where}"
    size = "of unknown pixel size" if found.mpp is None else f"of {found.mpp:.4g} um by {_say(found.source)}"
    logger.hint("slide %s: %d x %d px %s%s, %d levels.", name, width, height, size, lens, len(levels))
    if found.mpp is not None and found.unused:
        logger.info("slide %s: not used for its pixel size: %s.", name, "; ".join(found.unused))
    if found.mpp is None:
        why = f"The slide {file_name} does not say its pixel size"
        if found.unused:
            why = f"The pixel size of the slide {file_name} is not known: {'; '.join(found.unused)}"
        if power is not None:
            why += f" (the power of its objective, {power.value:g}x, is none)"
        logger.warning("%s. Give `image_mpp=` to `pekasc.pp.tile` or `pekasc.pp.tile_grid`.", why)


def _say(source: str) -> str:
    return source if source.startswith("`") else f"its {source}"


def _name(file_name: str, scene: int | str | None) -> str:
    """Return the name of a slide, after its file and the scene that was asked for."""
    stem = slide_stem(file_name) if scene is None else f"{slide_stem(file_name)}_{scene}"
    name = element_name(stem)
    if name != stem:
        logger.hint("slide %s: its name is %r, since SpatialData cannot store %r as one.", file_name, name, stem)
    return name


def _file(path: str | PathLike[str]) -> Path:
    """Return the path of a file that is there."""
    if path == "":
        raise ValueError("`path` must be the path of an image file, got an empty string.")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` must be the path of an image file, got {type(path).__name__}.")
    file = Path(path).expanduser()
    if file.is_dir():
        if file.suffix == ".zarr" or is_zarr(file):
            raise ValueError(f"`path` is a zarr folder, {str(file)!r}: read it with `spatialdata.read_zarr`.")
        raise ValueError(f"`path` must be an image file, but {str(file)!r} is a folder.")
    if not file.is_file():
        raise FileNotFoundError(f"The slide {str(file)!r} is not there.")
    return file
