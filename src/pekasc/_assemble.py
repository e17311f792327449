"""Assemble a SpatialData from arrays, the same way for every data set: multi-scale images, spots, table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import dask.array as da
import numpy as np
import pandas as pd
from dask.base import tokenize

from pekasc._keys import BARCODE, write_uns
from pekasc._sections import pixel_size_records, record_on_images

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from scipy.sparse import csr_matrix
    from xarray import DataArray, DataTree

REGION, INSTANCE = "region", "spot_id"
_SMALLEST_PX = 1024  # the coarsest level of a pyramid fits a square of this side


class RegionSource(Protocol):
    """An image of which any rectangle can be read."""

    @property
    def height(self) -> int:
        """Height of the finest level in pixels."""
        ...

    @property
    def width(self) -> int:
        """Width of the finest level in pixels."""
        ...

    def region(self, x0: int, y0: int, width: int, height: int, factor: int) -> np.ndarray:
        """Return a rectangle of the image downscaled by `factor`, uint8 (3, y, x)."""
        ...


class LazyLevel:
    """One level of a pyramid with the interface that dask needs; slices are read on access and not kept."""

    ndim = 3
    dtype = np.dtype(np.uint8)

    def __init__(self, source: RegionSource, factor: int) -> None:
        self.source, self.factor = source, factor
        self.shape = (3, source.height // factor, source.width // factor)

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        y, x, kept = window(index, self.shape)
        if not len(y) or not len(x):
            return np.empty((3, len(y), len(x)), np.uint8)[kept]
        return self.source.region(x.start, y.start, len(x), len(y), self.factor)[kept]


def window(index: tuple[slice, slice, slice], shape: Sequence[int]) -> tuple[range, range, tuple[slice, slice, slice]]:
    """Return the rows and columns to read for slices (c, y, x), and what to keep of what was read.

    Raises
    ------
    IndexError
        If a step is negative.
    """
    c, y, x = index
    y0, y1, y_step = y.indices(shape[1])
    x0, x1, x_step = x.indices(shape[2])
    if y_step < 1 or x_step < 1:
        raise IndexError("steps backwards are not supported; flip what was read.")
    return range(y0, max(y0, y1)), range(x0, max(x0, x1)), (c, slice(None, None, y_step), slice(None, None, x_step))


def block_mean(image: np.ndarray, factor: int) -> np.ndarray:
    """Return the rounded mean of blocks of `factor` x `factor` pixels; incomplete blocks are dropped.

    Parameters
    ----------
    image
        uint8 (c, y, x).
    factor
        At most 16.
    """
    if factor == 1:
        return image
    height, width = image.shape[1] // factor, image.shape[2] // factor
    total = np.full((image.shape[0], height, width), factor * factor // 2, dtype=np.uint16)
    for i in range(factor):
        for j in range(factor):
            total += image[:, i : height * factor : factor, j : width * factor : factor]
    total //= factor * factor
    return total.astype(np.uint8)


def factors(height: int, width: int) -> list[int]:
    """Return the downscaling factors of a pyramid: 1, 2, 4, ... until a level fits 1024 x 1024 pixels."""
    out = [1, 2] if min(height, width) > 1 else [1]  # with one level, spatialdata would read back a single-scale image
    while max(height, width) // out[-1] > _SMALLEST_PX:
        out.append(2 * out[-1])
    return out


def lazy_levels(source: RegionSource, *, chunk_px: int, token: Any) -> list[da.Array]:
    """Return the pyramid of `source` as lazy dask arrays."""
    out = []
    for factor in factors(source.height, source.width):
        level = LazyLevel(source, factor)
        name = f"pekasc-image-{tokenize(token, factor, chunk_px)}"
        out.append(da.from_array(level, chunks=(3, chunk_px, chunk_px), name=name, meta=np.empty((0, 0, 0), np.uint8)))
    return out


def multiscale(levels: Sequence[da.Array], coordinate_system: str) -> DataTree | DataArray:
    """Return levels (c, y, x), finest first, as an image of SpatialData in pixels of the first.

    It is multi-scale if there are several levels.
    """
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity, set_transformation
    from xarray import DataArray, Dataset, DataTree

    if len(levels) == 1:
        return Image2DModel.parse(
            levels[0], dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={coordinate_system: Identity()}
        )
    nodes = {}
    _, height, width = levels[0].shape
    for i, level in enumerate(levels):
        coords = {"c": ["r", "g", "b"]}
        coords |= {
            axis: (np.arange(n) + 0.5) * (size / n)
            for axis, n, size in (("y", level.shape[1], height), ("x", level.shape[2], width))
        }
        nodes[f"scale{i}"] = Dataset({"image": DataArray(level, dims=("c", "y", "x"), coords=coords, name="image")})
    tree = DataTree.from_dict(nodes)
    set_transformation(tree, {coordinate_system: Identity()}, set_all=True)
    Image2DModel().validate(tree)
    return tree


def spots(centres_px: np.ndarray, radius_px: float, coordinate_system: str) -> GeoDataFrame:
    """Return circles around centres (n, 2), x and y in pixels of the finest level."""
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    return ShapesModel.parse(
        centres_px,
        geometry=0,
        radius=radius_px,
        index=pd.RangeIndex(len(centres_px)),
        transformations={coordinate_system: Identity()},
    )


def table(
    counts: csr_matrix,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    centres_px: np.ndarray,
    image_mpp: Mapping[str, float],
    images: Mapping[str, DataTree | DataArray],
) -> AnnData:
    """Return the table that annotates the spots of all sections.

    Parameters
    ----------
    counts
        Spots x genes.
    obs
        With columns section, patient, and barcode, or array_row and array_col, after which rows are named; the spots of
        a section in the order of its shapes.
    var
        One row a gene.
    centres_px
        Centres (n, 2) in pixels of the finest level.
    image_mpp
        Micrometers per pixel of each image.
    images
        The images by name, those that are there: pixel sizes are recorded for images of these sizes.
    """
    from anndata import AnnData
    from spatialdata.models import TableModel

    obs = obs.copy()
    for column in ("section", "patient"):
        obs[column] = pd.Categorical(obs[column], categories=list(dict.fromkeys(obs[column])))
    obs[REGION] = pd.Categorical([f"{s}_spots" for s in obs["section"]])
    obs[INSTANCE] = obs.groupby("section", observed=True).cumcount().to_numpy().astype(np.int64)
    if BARCODE in obs:
        names = obs[BARCODE]
    else:
        names = [f"{x}x{y}" for x, y in zip(obs["array_col"], obs["array_row"], strict=True)]
    obs.index = pd.Index([f"{section}_{name}" for section, name in zip(obs["section"], names, strict=True)])
    adata = AnnData(counts, obs=obs, var=var, obsm={"spatial": np.asarray(centres_px, dtype=np.float64)})
    records = pixel_size_records(images, image_mpp)
    record_on_images(images, records)
    for key, record in records.items():
        write_uns(adata, key, record)
    regions = [str(region) for region in obs[REGION].cat.categories]
    return TableModel.parse(adata, region=regions, region_key=REGION, instance_key=INSTANCE)
