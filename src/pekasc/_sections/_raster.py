"""Ways out: rasters of a section as images that lie over its image, and shapes in pixels of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine
from xarray import DataTree

from pekasc._sections._images import affine, coordinate_systems
from pekasc._sections._resolve import Section, shared_system
from pekasc._sections._slides import images_of


def px_to_systems(sdata: SpatialData, section: Section) -> dict[str, np.ndarray]:
    """Return the (3, 3) matrix from level-0 pixels to each coordinate system of a section's image.

    Without an image, as with stored patches, the systems are those of its shapes.
    """
    images = images_of(sdata)
    if section.image_name in images:
        image = images[section.image_name]
        return {name: affine(image, name) for name in sorted(coordinate_systems(image))}
    shapes = sdata.shapes[section.shapes_name]
    to_shapes = np.linalg.inv(section.shapes_to_px)
    return {name: affine(shapes, name) @ to_shapes for name in sorted(coordinate_systems(shapes))}


def um_to_px(section: Section) -> np.ndarray:
    """Return the (3, 3) matrix from positions of a section in um to level-0 pixels of its image."""
    matrix = np.eye(3)
    matrix[:2, :2] = section.um_to_px
    matrix[:2, 2] = (section.centres_px - section.centres_um @ section.um_to_px.T).mean(axis=0)
    return matrix


def raster_element(
    values: da.Array, channels: Sequence[str], matrices: Mapping[str, np.ndarray], n_levels: int, fill: float
) -> DataTree:
    """Return a multi-scale image element; every level has half the pixels of the one before, their mean without NaN.

    Parameters
    ----------
    values
        (c, y, x), whose height and width are multiples of ``2 ** (n_levels - 1)``.
    channels
        Names of the channels.
    matrices
        (3, 3) matrix from pixels to each coordinate system.
    n_levels
        Number of levels, at least 2.
    fill
        What stands for NaN, at every level.
    """
    axes = ("x", "y")
    chunks = dict(zip(("c", "y", "x"), values.chunksize, strict=True))
    element: Any = Image2DModel.parse(
        values, dims=("c", "y", "x"), c_coords=list(channels), chunks=chunks, scale_factors=[2] * (n_levels - 1),
        transformations={name: Affine(matrix, axes, axes) for name, matrix in matrices.items()},
    )  # fmt: skip
    if not np.isnan(fill):
        for level in element.values():
            image = level["image"]
            image.data = da.where(da.isnan(image.data), np.float32(fill), image.data)
    return element


def px_of_shapes(sdata: SpatialData, shapes_name: str, image_name: str | None) -> np.ndarray:
    """Return the (3, 3) matrix from shapes to level-0 pixels of an image: the only one that they share a system with.

    Raises
    ------
    ValueError
        If there is none, or there are several.
    """
    if image_name is None:
        systems = coordinate_systems(sdata.shapes[shapes_name])
        images = [name for name, image in images_of(sdata).items() if systems & coordinate_systems(image)]
        if len(images) != 1:
            raise ValueError(
                f"The shapes {shapes_name!r} share a coordinate system with {images or 'no image'}: name the image "
                "whose pixels are meant, `image_name=`."
            )
        image_name = images[0]
    return shared_system(sdata, shapes_name, image_name, None)[1]
