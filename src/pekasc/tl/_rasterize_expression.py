"""`tl.rasterize_expression`: predicted genes of a grid as an image over the H&E."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import dask.array as da
import numpy as np
from anndata import AnnData
from dask import delayed
from spatialdata import SpatialData

from pekasc._expression import dense_layer, named_columns
from pekasc._keys import GRID, PEKA, TILES, check_free, check_key, packed, read_uns, write_uns
from pekasc._layers import missing_layer, no_values
from pekasc._sections import (
    Section,
    get_table,
    px_to_systems,
    raster_element,
    tiled_sections,
    tiled_table,
    um_to_px,
    writable_table,
)
from pekasc._settings import get_logger
from pekasc.tiling import Lattice, square_lattice

logger = get_logger(__name__)

_COARSEST_PX = 256  # side up to which a raster needs no coarser level
_BLOCK_BYTES = 32 * 2**20
_SAMPLE = 64  # rows by which most genes are known to have values


def rasterize_expression(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    layer: str = PEKA,
    table_name: str = "grid",
    key_added: str | None = None,
    fill: float = np.nan,
    key: str = TILES,
) -> None:
    """Make an image of predicted genes with one pixel for each tile of a grid, which lies over the H&E.

    napari-spatialdata and, with a number for `fill`, spatialdata-plot lay it over the image; ``sdata.write`` writes it
    as OME-NGFF.

    Parameters
    ----------
    sdata
        Slides that :func:`pekasc.pp.tile_grid` has tiled and :func:`pekasc.tl.predict_expression` has predicted.
    genes
        A gene, or several: the channels, in this order.
    layer
        Layer with the values, such as ``"peka"`` or ``"peka_lower"``.
    table_name
        Name of the table. Spots and bins on a square lattice work as well, those of Visium do not.
    key_added
        The images are ``"{region}_{key_added}"``; by default the name of the layer. Take one for each set of genes.
    fill
        Value of pixels without a prediction. napari and matplotlib leave NaN empty; spatialdata-plot refuses NaN in an
        image: for it, take a number below all predictions, such as -1, and a colour map that is white below 0.
    key
        Name of the tiles.

    Returns
    -------
    None, and writes for every region of the table

    ``images["{region}_{key_added}"]``
        (c, y, x) float32 at several scales: `c` are the names of the genes; a pixel is a tile, and its side the grid's
        stride. NaN, or `fill`, where nothing is predicted. Coarser levels are means of what is predicted; empty rows
        and columns at the end make them fit upon one another. Its transformations lead to all coordinate systems of the
        slide's image. Of a dask-backed layer, a block of genes is read when it is looked at or written, and never all.
    ``uns["pekasc"]["{key_added}_raster"]``
        The images with their genes, layer, and stride in um.

    Raises
    ------
    KeyError
        If the table, its tiles, the layer or a gene is not there.
    TypeError
        If `fill` is no number.
    ValueError
        If `genes` is empty, a gene has no predictions, tiles are not on a square grid, or the name of an image is
        taken.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=2, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, train=["P1S1_spots"], progress=False)
    >>> pk.pp.tile_grid(sdata, "P2S1_he", tile_px=56, mpp=2.0, stride_um=100)
    >>> pk.tl.predict_expression(sdata, adapter, table_name="grid", progress=False)
    >>> pk.tl.rasterize_expression(sdata, list(adapter.genes[:3]))
    >>> sdata["P2S1_he_grid_peka"]["scale0"]["image"].sizes["c"]
    3
    """
    if isinstance(fill, bool) or not isinstance(fill, Real):
        raise TypeError(f"`fill` must be a number, got {fill!r}.")
    key_added = check_key(layer if key_added is None else key_added)
    record_key = check_key(f"{key_added}_raster")
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name)
    grid = read_uns(table, GRID)
    _check_predicted(table, layer, table_name, grid)
    columns = named_columns(table, genes)
    check_free(table, record_key, "raster")
    sections, _ = tiled_sections(sdata, table_name=table_name, key=key)
    before = read_uns(table, record_key) or {}
    names = {section.name: check_key(f"{section.name}_{key_added}") for section in sections}
    _check_names(sdata, names, set((before.get("images") or {}).values()))
    lattices = [_lattice(section, grid) for section in sections]
    matrix = table.layers[layer]
    if not isinstance(matrix, da.Array):
        matrix = dense_layer(table, layer, columns)  # a copy: the layer may change
        columns_at = np.arange(columns.size)
    else:
        columns_at = columns
    channels = table.var_names[columns].astype(str).tolist()
    _check_values(matrix, columns_at, channels, [section.rows for section in sections], layer)
    elements = {
        names[section.name]: _element(sdata, section, lattice, matrix, columns_at, channels, float(fill))
        for section, lattice in zip(sections, lattices, strict=True)
    }
    record = {
        "images": names, "layer": layer, "genes": packed(channels),
        "stride_um": {section.name: lattice.stride for section, lattice in zip(sections, lattices, strict=True)},
    }  # fmt: skip
    for name in set((before.get("images") or {}).values()) & set(sdata.images):
        del sdata.images[name]
    for name, element in elements.items():
        sdata.images[name] = element
        size = element["scale0"]["image"].sizes
        logger.hint("images[%r]: %d genes, %d x %d px.", name, size["c"], size["x"], size["y"])
    write_uns(writable_table(sdata, table_name), record_key, record, kind="raster")


def _check_predicted(table: AnnData, layer: str, table_name: str, grid: Any) -> None:
    if isinstance(grid, Mapping) and grid.get("shape") == "hexagon":
        raise ValueError(
            f"The grid of table {table_name!r} is hexagonal, and pixels are square: tile with "
            '`pekasc.pp.tile_grid(..., shape="square")` for an image. `pekasc.pl.slide` draws hexagons and '
            "`pekasc.io.write_geojson` writes them."
        )
    if layer not in table.layers:
        raise missing_layer(table, layer, table_name)


def _check_names(sdata: SpatialData, names: Mapping[str, str], ours: set[str]) -> None:
    taken = {name.lower(): (kind, name) for kind, name, _ in sdata.gen_elements()}
    for name in names.values():
        kind, existing = taken.get(name.lower(), ("", ""))
        if existing and not (kind == "images" and existing in ours):
            raise ValueError(
                f"The name {name!r} is taken by `sdata.{kind}[{existing!r}]`, which was not made by this call. Take "
                "another `key_added=`, or delete it."
            )


def _lattice(section: Section, grid: Any) -> Lattice:
    stride = float(grid.get("stride_um") or 0) if isinstance(grid, Mapping) else 0.0
    try:
        return square_lattice(section.centres_um, stride or None)
    except ValueError as error:
        raise ValueError(
            f"Section {section.name!r} cannot become an image with one pixel for each tile: {error}. Tile it with "
            "`pekasc.pp.tile_grid(sdata, image_name, stride_um=...)` and predict that table."
        ) from error


def _check_values(
    matrix: Any, columns: np.ndarray, channels: Sequence[str], rows: Sequence[np.ndarray], layer: str
) -> None:
    """Raise if a gene has no value in any row; most are known by a few rows."""
    at = np.concatenate([index[:: max(1, index.size // _SAMPLE)] for index in rows])
    for index in (at, np.concatenate(rows)):
        unknown = np.flatnonzero(np.isnan(np.asarray(matrix[np.sort(index)][:, columns])).all(axis=0))
        if not unknown.size:
            return
        columns, channels = columns[unknown], [channels[int(i)] for i in unknown]
    raise no_values(layer, channels, "these sections")


def _element(
    sdata: SpatialData, section: Section, lattice: Lattice, matrix: Any, columns: np.ndarray, channels: Sequence[str],
    fill: float,
) -> Any:  # fmt: skip
    height, width = lattice.shape
    n_levels = 2
    while max(height, width) > _COARSEST_PX * 2 ** (n_levels - 1):
        n_levels += 1
    fit = 2 ** (n_levels - 1)
    shape = (-(-height // fit) * fit, -(-width // fit) * fit)
    block = max(1, _BLOCK_BYTES // (4 * max(shape[0] * shape[1], matrix.shape[0])))
    place = lattice.row * shape[1] + lattice.col
    parts = []
    for start in range(0, columns.size, block):
        values = matrix[:, columns[start : start + block]]  # lazy, if the layer is
        size = (min(block, columns.size - start), *shape)
        parts.append(da.from_delayed(delayed(_scatter)(values, section.rows, place, size), size, np.float32))
    to_px = um_to_px(section) @ lattice.to_positions()
    systems = {name: matrix @ to_px for name, matrix in px_to_systems(sdata, section).items()}
    return raster_element(da.concatenate(parts), channels, systems, n_levels, fill)


def _scatter(values: np.ndarray, rows: np.ndarray, place: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return an image, (c, y, x) float32, with the values of rows at their places; NaN elsewhere."""
    out = np.full((shape[0], shape[1] * shape[2]), np.nan, dtype=np.float32)
    out[:, place] = np.asarray(values)[rows].T
    return out.reshape(shape)
