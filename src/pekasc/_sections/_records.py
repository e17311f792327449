"""Recorded pixel sizes: a fact about an image of one size, taken only where the image is still that one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._keys import IMAGE_MPP, IMAGE_SIZE, UNS, read_uns
from pekasc._sections._images import affine, coordinate_systems, image_size, transform
from pekasc._sections._pixel_size import check_mpp
from pekasc._sections._slides import images_of, reader_mpp
from pekasc._settings import get_logger

logger = get_logger(__name__)

_ROUNDING_PX = 1.0  # sizes of coarser levels are rounded
_SCALE = 0.02


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
    attrs = sdata.attrs.get(UNS, {})
    attrs = attrs if isinstance(attrs, Mapping) else {}
    of_table = (None, None) if table is None else (read_uns(table, IMAGE_MPP), read_uns(table, IMAGE_SIZE))
    records = {
        "recorded": (*of_table, f'`table.uns["{UNS}"]["{IMAGE_MPP}"]'),
        "slide": (attrs.get(IMAGE_MPP), attrs.get(IMAGE_SIZE), f'`sdata.attrs["{UNS}"]["{IMAGE_MPP}"]'),
    }
    for source, (sizes_um, sizes_px, where) in records.items():
        if not isinstance(sizes_um, Mapping) or image_name not in sizes_um:
            continue
        mpp = check_mpp(sizes_um[image_name], f"{where}[{image_name!r}]`")
        sizes_px = sizes_px if isinstance(sizes_px, Mapping) else {}
        size = np.array(sizes_px.get(image_name, (0, 0)), dtype=np.float64)
        factor = _pixel_factor(images_of(sdata).get(image_name), size) if image_name in sizes_px else 1.0
        if factor is not None:
            out[source] = mpp * factor
            if factor != 1:
                logger.hint(
                    "image %s: %.4g um per pixel, %.4g times the %.4g um recorded for %d x %d px.",
                    image_name, mpp * factor, factor, mpp, *size,
                )  # fmt: skip
        elif warn:
            width, height = image_size(images_of(sdata)[image_name])
            warnings.warn(
                f"The pixel size of image {image_name!r}, {mpp:.4g} um in {where}`, was recorded for {size[0]:.0f} x "
                f"{size[1]:.0f} px, and the image has {width} x {height} px now: it is not used. Give `image_mpp=`.",
                UserWarning,
                stacklevel=5,
            )
    of_reader = reader_mpp(sdata, image_name)
    if of_reader is not None:
        out["slide"] = check_mpp(of_reader, f"The pixel size of the slide {image_name!r}")
    return out


def _pixel_factor(image: Any, then: np.ndarray) -> float | None:
    """Return how much larger the pixels of an image are than those of the one of `then`, or None if unknown."""
    if image is None:  # stored patches, whose image need not exist
        return 1.0
    now = np.array(image_size(image), dtype=float)
    if (now == then).all():
        return 1.0
    matrices = [affine(image, name) for name in sorted(coordinate_systems(image))]
    for matrix in matrices:
        per_px = np.linalg.norm(matrix[:2, :2], axis=0)
        if (np.abs(now * per_px - then) <= _ROUNDING_PX * np.maximum(per_px, 1)).all() and _isotropic(per_px):
            return float(np.sqrt(per_px.prod()))
    # an image cut off at its origin with the same aspect could as well be the whole picture at another resolution
    for matrix in matrices:
        per_px = np.linalg.norm(matrix[:2, :2], axis=0)
        corners = transform(matrix, np.array([[0, 0], [now[0], 0], [0, now[1]], now]))
        inside = (corners > -_ROUNDING_PX).all() and (corners < then + _ROUNDING_PX).all()
        whole = np.abs(corners.min(axis=0)).max() <= _ROUNDING_PX and _isotropic(now / then)
        if (np.abs(per_px - 1) <= _SCALE).all() and inside and not whole:
            return 1.0
    return None


def _isotropic(pair: np.ndarray) -> bool:
    return bool(abs(pair[0] / pair[1] - 1) <= _SCALE)
