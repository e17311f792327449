"""`pp.tile_grid`: tiles on a slide without spots, on a grid or for given shapes, on tissue only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import get_transformation

from pekasc._keys import (
    GRID,
    TILE_INSIDE,
    TILES,
    check_key,
    read_uns,
    tile_shapes_name,
    write_uns,
)
from pekasc._sections import (
    Section,
    images_of,
    pixel_size_records,
    resolve_sections,
    shape_centres,
    slide_section,
    tissue_of_slide,
)
from pekasc._settings import get_logger
from pekasc.pp._tile import make_tiles
from pekasc.pp._tile_quality import Quality, measure
from pekasc.tiling import (
    TileSpec,
    cell_corners,
    check_grid,
    grid_positions,
)

logger = get_logger(__name__)

_MOST = 50_000_000  # tiles of a slide


def tile_grid(
    sdata: SpatialData,
    image_name: str,
    *,
    tile_px: int = 224,
    mpp: float = 0.5,
    stride_um: float | None = None,
    shape: str = "square",
    shapes: str | None = None,
    tissue: Any = "detect",
    min_tissue: float | None = 0.5,
    min_sharpness: float | str | None = "auto",
    max_pen: float | None = 0.1,
    image_mpp: float | None = None,
    um_coordinate_system: str | None = None,
    table_added: str = "grid",
) -> None:
    """Tile a slide without spots on a grid, on tissue only, or one tile for each of given shapes.

    The table that is made has one row a tile and no genes: :func:`pekasc.tl.predict_expression` with
    ``table_name="grid"`` puts an adapter's genes into it. Tiles without enough tissue, out of focus or with pen marks
    get no row; how many, and for which reason, is logged and kept.

    Parameters
    ----------
    sdata
        An object with the image, such as :func:`pekasc.io.read_slide` gives it.
    image_name
        Name of the image.
    tile_px
        Pixels along the side of a tile. For an adapter: ``adapter.spec.tile_px``.
    mpp
        Micrometers per tile pixel. For an adapter: ``adapter.spec.mpp``.
    stride_um
        Distance between neighbouring tiles in um; by default the side of a tile.
    shape
        ``"square"``, or ``"hexagon"``, whose six neighbours are equally far.
    shapes
        Name of shapes (cells, bins, annotations, another tool's tiles), for each of which a tile is made around its
        centroid, instead of a grid.
    tissue
        ``"detect"`` finds it with :func:`squidpy.experimental.im.detect_tissue` in a coarse version of the slide; the
        name of shapes or labels; a mask of the whole image, (height, width) at any resolution; or False to take all of
        it for tissue. Sharpness and pen are checked all the same, unless `min_sharpness` and `max_pen` are None.
    min_tissue
        Least fraction of a tile on tissue, taken at 8 x 8 points; None keeps all.
    min_sharpness
        Least sharpness of a tile (energy of the Laplacian over that of the gradient, at 1 um per pixel);
        ``"auto"`` is four robust standard deviations below the slide's own median, on a logarithmic scale; None keeps
        all.
    max_pen
        Largest fraction of a tile in the colour of green, blue or black ink; None keeps all.
    image_mpp
        Pixel size of level 0 in um; by default as recorded by the reader.
    um_coordinate_system
        Name of a coordinate system in um, from which the pixel size follows.
    table_added
        Name of the table; one of an earlier run of this call for the same image is replaced.

    Returns
    -------
    None, and writes

    ``sdata.shapes["{image}_grid"]``
        The cells of the grid as polygons that fill the plane, in pixels of the image; with `shapes`, nothing.
    ``sdata.shapes["{image}_grid_tiles"]``
        The tiles as squares (with `shapes`: ``"{shapes}_tiles"``).
    ``sdata.tables[table_added]``
        One row a tile and no genes: ``obs["tissue_fraction"]``, ``["sharpness"]`` and ``["pen_fraction"]`` (NaN where
        not asked for), ``["grid_row"]`` and ``["grid_col"]`` of a grid, ``["tile_inside"]``;
        ``obsm["spatial"]``, centres in pixels of the image.
    ``table.uns["pekasc"]["grid"]``
        The arguments, the thresholds, and the numbers of tiles left out by reason.

    Raises
    ------
    KeyError
        If the image, shapes, labels or a coordinate system do not exist.
    TypeError
        If an argument has a wrong type.
    ValueError
        If the pixel size is unknown or contradictory, there is no tissue, a mask belongs to another image, no tile is
        left, or a name is taken.

    References
    ----------
    Focus: energies of the Laplacian and the gradient, Pertuz et al., Pattern Recognition 2013.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=1.0)
    >>> pk.pp.tile_grid(sdata, "P1S1_he", tile_px=56, mpp=2.0, stride_um=100)
    >>> sdata["grid"].n_vars
    0
    """
    check_key(table_added, argument="table_added")
    spec = TileSpec(tile_px, mpp)
    check_grid(
        shape=shape, shapes=shapes, stride_um=stride_um, min_tissue=min_tissue, min_sharpness=min_sharpness,
        max_pen=max_pen,
    )  # fmt: skip
    before = _before(sdata, table_added, image_name)
    slide = slide_section(
        sdata, image_name, image_mpp=image_mpp, um_coordinate_system=um_coordinate_system,
        but=table_added if before else None,
    )  # fmt: skip
    region = f"{image_name}_{table_added}" if shapes is None else shapes
    _check_names(sdata, table_added, region, before, shapes)
    mask = tissue_of_slide(sdata, slide, tissue)
    stride = spec.side_um if stride_um is None else float(stride_um)
    candidates = _grid(slide, stride, shape) if shapes is None else _given(sdata, slide, shapes)
    quality = measure(slide, spec, candidates.centres_px, mask, min_tissue, min_sharpness, max_pen)
    kept = np.flatnonzero(quality.keep)
    if not kept.size:
        raise ValueError(
            f"No tile is left on image {image_name!r} of {quality.keep.size}: {_counts(quality.left_out)}. Lower the "
            "thresholds (`min_tissue`, `min_sharpness`, `max_pen`; None keeps all), or give `tissue=`."
        )
    logger.hint(
        "image %s: %d of %d tiles kept%s.", image_name, kept.size, quality.keep.size,
        f"; left out: {_counts(quality.left_out)}" if any(quality.left_out.values()) else "",
    )  # fmt: skip
    image = images_of(sdata)[image_name]
    table = _table(region, candidates, quality, kept, slide, image)
    record = {
        "image": image_name, "shape": shape if shapes is None else "", "shapes": shapes or "",
        "stride_um": stride if shapes is None else 0.0,
        "tissue": tissue if isinstance(tissue, str) else ("all" if mask is None else "mask"),
        "thresholds": quality.thresholds, "n_candidates": quality.keep.size, "left_out": quality.left_out,
    }  # fmt: skip
    write_uns(table, GRID, record, kind="grid")
    frame = sdata.shapes[shapes] if shapes is not None else _cells(candidates, kept, slide, stride, shape, image)
    # tiles are made on an object of their own, so that an error leaves `sdata` as it was
    working = SpatialData(images={image_name: image}, shapes={region: frame}, tables={table_added: table})
    sections = resolve_sections(
        working, table_name=table_added, images={region: image_name}, image_mpp=image_mpp,
        um_coordinate_system=um_coordinate_system,
    )  # fmt: skip
    made = make_tiles(working, sections, spec, table.n_obs, TILES, um_coordinate_system)
    table.obs[TILE_INSIDE] = made.inside
    write_uns(table, TILES, made.record, kind="tiles")
    _write(sdata, table_added, table, {**({region: frame} if shapes is None else {}), **made.squares}, before)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Where tiles could be: centres in level-0 pixels and in um, ids, and row and column of a grid."""

    centres_px: np.ndarray
    centres_um: np.ndarray
    ids: np.ndarray | None = None
    grid: np.ndarray | None = None


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)


def _before(sdata: SpatialData, table_added: str, image_name: str) -> set[str]:
    """Return the names that an earlier run of this call for the same image gave; empty if there was none."""
    record = read_uns(sdata.tables[table_added], GRID) if table_added in sdata.tables else None
    if not isinstance(record, Mapping) or record.get("image") != image_name:
        return set()
    cells = f"{image_name}_{table_added}"
    if record.get("shapes"):
        return {table_added, tile_shapes_name(str(record["shapes"]), TILES)}
    return {table_added, cells, tile_shapes_name(cells, TILES)}


def _check_names(sdata: SpatialData, table_added: str, region: str, before: set[str], shapes: str | None) -> None:
    """Check that no name is taken, but for those of an earlier run of this call for the same image."""
    if shapes is not None and shapes not in sdata.shapes:
        make = ""
        if shapes in sdata.labels:
            make = f" These are labels: `sdata.shapes['cells'] = spatialdata.to_polygons(sdata.labels[{shapes!r}])`."
        elif shapes in sdata.points:
            make = f" These are points: `sdata.shapes['cells'] = spatialdata.to_circles(sdata.points[{shapes!r}], 5)`."
        raise KeyError(f"`shapes={shapes!r}` not found. Available shapes: {list(sdata.shapes)}.{make}")
    wanted = [table_added, tile_shapes_name(region, TILES), *([region] if shapes is None else [])]
    taken = {name.lower(): (kind, name) for kind, name, _ in sdata.gen_elements()}
    for name in wanted:
        kind, existing = taken.get(name.lower(), ("", ""))
        if existing and existing not in before:
            instead = "Take another `table_added=`"
            if shapes is not None and name != table_added:
                instead = f"Give the shapes under another name, `sdata.shapes['other'] = sdata.shapes[{shapes!r}]`"
            raise ValueError(
                f"The name {name!r} is taken by `sdata.{kind}[{existing!r}]`, which was not made by this call for this "
                f"image. {instead}, or delete it."
            )


def _grid(slide: Section, stride: float, shape: str) -> _Candidates:
    width, height = slide.size_px
    px_to_um = np.linalg.inv(slide.um_to_px)
    n = width * height * slide.mpp**2 / stride**2
    if n > _MOST:
        raise ValueError(
            f"`stride_um={stride:g}` makes {n:.2g} tiles of the image {slide.image_name!r} ({width} x {height} px of "
            f"{slide.mpp:.4g} um), more than {_MOST:,}: take a larger one."
        )
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]]) @ px_to_um.T
    at, grid = grid_positions(corners.min(axis=0), corners.max(axis=0), stride, shape)
    px = at @ slide.um_to_px.T
    inside = ((px >= 0) & (px <= [width, height])).all(axis=1)  # of a slide that is turned
    if not inside.any():  # a slide smaller than half a stride
        px, inside = np.array([[width / 2, height / 2]]), np.ones(1, dtype=bool)
        at, grid = px @ px_to_um.T, np.zeros((1, 2), np.int64)
    return _Candidates(px[inside], at[inside], grid=grid[inside])


def _given(sdata: SpatialData, slide: Section, shapes: str) -> _Candidates:
    centres_px, ids = shape_centres(sdata, shapes, slide.image_name)
    return _Candidates(centres_px, centres_px @ np.linalg.inv(slide.um_to_px).T, ids=ids)


def _cells(
    candidates: _Candidates, kept: np.ndarray, slide: Section, stride: float, shape: str, image: Any
) -> GeoDataFrame:
    """Return the cells of a grid as polygons in pixels of the image, which lie in its coordinate systems."""
    corners = cell_corners(candidates.centres_um[kept], stride, shape) @ slide.um_to_px.T
    frame = GeoDataFrame(geometry=shapely.polygons(corners), index=np.arange(kept.size))
    return ShapesModel.parse(frame, transformations=dict(get_transformation(image, get_all=True)))


def _table(
    region: str, candidates: _Candidates, quality: Quality, kept: np.ndarray, slide: Section, image: Any
) -> AnnData:
    """Return a table of the tiles that are kept, without genes."""
    ids = np.arange(kept.size) if candidates.ids is None else candidates.ids[kept]
    obs = pd.DataFrame(
        {
            "region": pd.Categorical([region] * kept.size), "tile_id": ids, "tissue_fraction": quality.tissue[kept],
            "sharpness": quality.sharpness[kept], "pen_fraction": quality.pen[kept],
        },
        index=[f"{region}_{i}" for i in ids],
    )  # fmt: skip
    if candidates.grid is not None:
        obs["grid_row"], obs["grid_col"] = candidates.grid[kept].T
    table = AnnData(obs=obs, obsm={"spatial": candidates.centres_px[kept]})
    for key, record in pixel_size_records({slide.image_name: image}, {slide.image_name: slide.mpp}).items():
        write_uns(table, key, record)
    return TableModel.parse(table, region=region, region_key="region", instance_key="tile_id")


def _write(
    sdata: SpatialData, table_added: str, table: AnnData, shapes: Mapping[str, GeoDataFrame], before: set[str]
) -> None:
    for name in (before - set(shapes)) & set(sdata.shapes):  # of an earlier run with other arguments
        del sdata.shapes[name]
    for name, frame in shapes.items():
        if name in sdata.shapes:
            del sdata.shapes[name]
        sdata.shapes[name] = frame
    if table_added in sdata.tables:
        del sdata.tables[table_added]
    sdata.tables[table_added] = table
