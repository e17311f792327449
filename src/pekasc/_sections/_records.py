"""Recorded pixel sizes: a fact about an image of one size, taken only where the image is still that one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._keys import IMAGE_MPP, IMAGE_SIZE, IMAGE_SYSTEM, UNS, read_uns
from pekasc._sections._images import affine, coordinate_systems, image_size, levels_of, transform
from pekasc._sections._pixel_size import check_mpp
from pekasc._sections._slides import images_of, reader_mpp
from pekasc._settings import get_logger
from pekasc._warnings import warn_user

logger = get_logger(__name__)

_ROUNDING_PX = 1.0  # sizes of coarser levels are rounded
_SCALE = 0.02
_WHERE = {"recorded": "table.uns", "slide": "sdata.attrs", "image": "sdata.images[{0!r}].attrs"}


def recorded_pixel_sizes(sdata: SpatialData, table: AnnData | None, image_name: str, *, warn: bool) -> dict[str, float]:
    """Return the pixel sizes in um that readers recorded for an image, by where they did.

    A pixel size is recorded with the size of its image. An image that has another size now, and is by its
    transformations the same picture at another resolution, has pixels as much larger; a crop has the same pixels. With
    `warn`, a pixel size that is not used is warned of, since nothing else may be known.

    Raises
    ------
    TypeError, ValueError
        If what is recorded is no positive number.
    """
    out = {}
    image = images_of(sdata).get(image_name)
    records = {source: record for source, record in _records(sdata, table).items() if image_name in record[IMAGE_MPP]}
    if not records and image is not None:
        records = _own_record(image_name, image)
    for source, record in records.items():
        where = f'`{_WHERE[source].format(image_name)}["{UNS}"]["{IMAGE_MPP}"]'
        where += "`" if source == "image" else f"[{image_name!r}]`"
        mpp = check_mpp(record[IMAGE_MPP][image_name], where)
        size = _size(record[IMAGE_SIZE].get(image_name, (0, 0)), where)
        factor: float | None = 1.0
        if image is not None and image_name in record[IMAGE_SIZE]:  # the image of stored patches need not exist
            factor = _pixel_factor(image, size, record[IMAGE_SYSTEM].get(image_name))
        if factor is not None:
            out[source] = mpp * factor
            if factor != 1:
                logger.hint(
                    "image %s: %.4g um per pixel, %.4g times the %.4g um recorded for %d x %d px.",
                    image_name, mpp * factor, factor, mpp, *size,
                )  # fmt: skip
        elif warn and image is not None:
            width, height = image_size(image)
            warn_user(
                f"The pixel size of image {image_name!r}, {mpp:.4g} um in {where}, was recorded for {size[0]:.0f} x "
                f"{size[1]:.0f} px, and the image has {width} x {height} px now: it is not used. Give `image_mpp=`.",
            )
    of_reader = reader_mpp(sdata, image_name)
    if of_reader is not None:
        out["slide"] = check_mpp(of_reader, f"The pixel size of the slide {image_name!r}")
    return out


def _size(value: Any, where: str) -> np.ndarray:
    """Return a recorded width and height, float64."""
    array = np.asarray(value) if isinstance(value, np.ndarray | list | tuple) else np.empty(0)
    if array.shape != (2,) or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(
            f"{where} is recorded for an image of size {str(value)[:40]}, which is no width and "
            "height: delete both records, and give `image_mpp=`."
        )
    return array.astype(np.float64)


def pixel_size_records(images: Mapping[str, Any], image_mpp: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return what is recorded of pixel sizes, by key: um per pixel, and what images they belong to.

    Parameters
    ----------
    images
        The images by name, those that are there.
    image_mpp
        Micrometers per pixel of each image.
    """
    systems = {name: _pixel_system(image) for name, image in images.items()}
    return {
        IMAGE_MPP: dict(image_mpp),
        IMAGE_SIZE: {name: list(image_size(image)) for name, image in images.items()},
        IMAGE_SYSTEM: {name: system for name, system in systems.items() if system is not None},
    }


def record_on_images(images: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write :func:`pixel_size_records` into the images' own attributes too, in place.

    `spatialdata.concatenate` drops ``uns`` and ``attrs`` and keeps those. They do not reach the disk.
    """
    for name, image in images.items():
        own = {key: values[name] for key, values in records.items() if name in values}
        if IMAGE_MPP in own:
            levels_of(image)[0].attrs[UNS] = own


def _own_record(name: str, image: Any) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return what an image bears of its pixel size, as :func:`_records` does."""
    own = levels_of(image)[0].attrs.get(UNS)
    if not isinstance(own, Mapping) or IMAGE_MPP not in own:
        return {}
    keys = (IMAGE_MPP, IMAGE_SIZE, IMAGE_SYSTEM)
    return {"image": {key: {name: own[key]} if key in own else {} for key in keys}}


def _pixel_system(image: Any) -> str | None:
    """Return a coordinate system in which an image has one unit a pixel, from the origin; None if there is none."""
    return next((s for s in sorted(coordinate_systems(image)) if np.array_equal(affine(image, s), np.eye(3))), None)


def _records(sdata: SpatialData, table: AnnData | None) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return what is recorded in the table and in the object, by source: pixel sizes, sizes and coordinate systems."""
    attrs = sdata.attrs.get(UNS, {})
    found: dict[str, dict[str, Mapping[str, Any]]] = {"recorded": {}, "slide": {}}
    for key in (IMAGE_MPP, IMAGE_SIZE, IMAGE_SYSTEM):
        values = {
            "recorded": None if table is None else read_uns(table, key),
            "slide": attrs.get(key) if isinstance(attrs, Mapping) else None,
        }
        for source, value in values.items():
            found[source][key] = value if isinstance(value, Mapping) else {}
    return found


def _pixel_factor(image: Any, recorded: np.ndarray, system: str | None) -> float | None:
    """Return how much larger the pixels of an image are than those it was recorded with, or None if unknown.

    `system` is the coordinate system in which the recorded image had one unit a pixel, from the origin.
    """
    size = np.array(image_size(image), dtype=np.float64)
    if (size == recorded).all():
        return 1.0
    if system not in coordinate_systems(image):
        return None
    matrix = affine(image, str(system))
    per_px = np.linalg.norm(matrix[:2, :2], axis=0)
    corners = transform(matrix, np.array([[0, 0], [size[0], 0], [0, size[1]], size]))
    low, high = corners.min(axis=0), corners.max(axis=0)
    rounding = _ROUNDING_PX * np.maximum(per_px.max(), 1)
    if not _isotropic(per_px) or (low < -rounding).any() or (high > recorded + rounding).any():
        return None
    # an image of the same pixels, cut off at its origin with the same aspect, could as well be the whole picture at
    # another resolution whose transformation was not set
    if abs(per_px[0] - 1) <= _SCALE and (np.abs(low) <= rounding).all() and _isotropic(size / recorded):
        return None
    return float(np.sqrt(per_px.prod()))


def _isotropic(pair: np.ndarray) -> bool:
    return bool(abs(pair[0] / pair[1] - 1) <= _SCALE)
