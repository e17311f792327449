"""Shapes of a section: those that the table annotates or, where it annotates labels, those that carry its ids."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData

from pekasc._sample import evenly_spaced
from pekasc._sections._images import coordinate_systems
from pekasc._sections._table import examples, region_rows, table_keys

# columns of Xenium's cells.parquet; with them, cell_area and nucleus_area are in square micrometers
_XENIUM = frozenset({"cell_area", "nucleus_area", "transcript_counts", "control_probe_counts"})
_AREA_TOLERANCE = 0.15  # boundaries are simplified to few vertices
_CELLS = 2000  # enough for the median of areas
_CELL_ID = "cell_id"


def shapes_of(sdata: SpatialData, table: AnnData, region: str) -> tuple[str, str]:
    """Return the shapes of a region of a table, and the column of ``obs`` with their ids.

    Raises
    ------
    KeyError
        If there is no such element.
    ValueError
        If the table annotates points, or labels to which no shapes belong.
    """
    if region in sdata.shapes:
        return region, table_keys(table)[2]
    if region in sdata.labels:
        own = _with_ids(sdata, table, region)
        if own is not None:
            return own
        raise ValueError(
            f"The table annotates the labels {region!r}; pekasc needs shapes, and no column of `obs` holds the ids of "
            f"any of {list(sdata.shapes)}. Make polygons with `sdata.shapes['{region}_shapes'] = "
            f"spatialdata.to_polygons(sdata.labels[{region!r}])` (or circles around "
            f"`spatialdata.get_centroids(sdata.labels[{region!r}])`) and parse the table again with that region."
        )
    if region in sdata.points:
        raise ValueError(
            f"The table annotates the points {region!r}; pekasc needs shapes. Make circles of them with "
            f"`spatialdata.to_circles(sdata.points[{region!r}], radius=...)` and parse the table again."
        )
    raise KeyError(
        f"The table annotates the region {region!r}, which is not in `sdata.shapes`. "
        f"Available shapes: {list(sdata.shapes)}."
    )


def _with_ids(sdata: SpatialData, table: AnnData, region: str) -> tuple[str, str] | None:
    """Return shapes whose index holds every value of a column of a labels' rows, and that column; None if none do.

    Shapes that the labels are named after come first, polygons before circles, cells before nuclei, which some lack.
    """
    rows = region_rows(table)[region]
    _, region_key, _ = table_keys(table)
    # two slides may number their cells alike
    systems = coordinate_systems(sdata.labels[region])
    there = {name: shapes for name, shapes in sdata.shapes.items() if systems & coordinate_systems(shapes)}
    for column in table.obs.columns.drop(region_key):
        values = table.obs[column].iloc[rows]
        if pd.api.types.is_float_dtype(values) or not values.is_unique:
            continue
        # numbers are ids only of shapes whose index has the column's name: label 1 need not be shape 1
        words = not pd.api.types.is_numeric_dtype(values)
        found = {
            name: (not region.startswith(f"{name}_"), "radius" in shapes, ("nucle" in name) != ("nucle" in region))
            for name, shapes in there.items()
            if (words or shapes.index.name == column) and pd.Index(values).isin(shapes.index).all()
        }
        best = [name for name, rank in found.items() if rank == min(found.values())]
        # what was derived from others, such as tiles, has their name before its own
        best = [name for name in best if not any(name.startswith(f"{other}_") for other in best)]
        if len(best) > 1:
            raise ValueError(
                f"The table annotates the labels {region!r}; pekasc needs shapes, and `obs[{column!r}]` holds the ids "
                f"of {' and of '.join(map(repr, best))}. Let the table annotate one of them: write its name to "
                f"`obs[{region_key!r}]` of these rows, then `sdata.set_table_annotates_spatialelement(table_name, "
                f"region=..., region_key={region_key!r}, instance_key={column!r})`."
            )
        if best:
            return best[0], str(column)
    return None


def check_cells(
    table: AnnData, rows: np.ndarray, shapes_name: str, shapes: GeoDataFrame, shape_ids: np.ndarray
) -> None:
    """Check that shapes with a column ``cell_id`` are those of the cells of `rows`, which `shape_ids` join them to.

    Nuclei of Xenium are numbered on their own: some cells have none, some have several.

    Raises
    ------
    ValueError
        If a shape says that it belongs to another cell.
    """
    if not (_CELL_ID in shapes and _CELL_ID in table.obs):
        return
    own, theirs = (_as_text(frame[_CELL_ID]) for frame in (table.obs.iloc[rows], shapes.loc[shape_ids]))
    known = own.notna().to_numpy() & theirs.notna().to_numpy()
    wrong = known & (own.fillna("").to_numpy() != theirs.fillna("").to_numpy())
    # where no cell has the same name in both, they are two ways of naming cells
    if not wrong.any() or not own[known].isin(_as_text(shapes[_CELL_ID]).dropna()).any():
        return
    first = int(np.flatnonzero(wrong)[0])
    raise ValueError(
        f"{int(wrong.sum())} of {len(rows)} rows are joined to the shape of another cell in {shapes_name!r}: "
        f"`obs[{_CELL_ID!r}]` is {own.iloc[first]!r}, and the shape {examples(shape_ids[[first]])} belongs to "
        f"{theirs.iloc[first]!r} (its column {_CELL_ID!r}). The shapes have numbers of their own: keep one a cell, "
        f"parse them again with `shapes.set_index({_CELL_ID!r})`, leave cells without one out of the table, and let it "
        f"annotate them with `instance_key={_CELL_ID!r}` (nuclei on the page on Xenium)."
    )


def _as_text(ids: pd.Series) -> pd.Series:
    """Return ids as text, missing ones as they are: 7, 7.0 and "7" are one."""
    if pd.api.types.is_float_dtype(ids) and (ids.dropna() % 1 == 0).all():
        ids = ids.astype("Int64")
    return ids.astype("string").astype(object)


def in_micrometers(
    table: AnnData, rows: np.ndarray, shapes_name: str, shapes: GeoDataFrame, shape_ids: np.ndarray
) -> bool:
    """Tell whether the own coordinates of shapes are in um: cells of Xenium have the areas that the table says.

    `shape_ids` are the shapes of `rows`. spatialdata-io keeps Xenium's coordinates, and scales them to pixels of the
    morphology image in the coordinate system "global".
    """
    if not _XENIUM <= set(table.obs):
        return False
    some = evenly_spaced(len(rows), _CELLS)
    column = "nucleus_area" if "nucle" in shapes_name else "cell_area"
    known = pd.to_numeric(table.obs[column].iloc[rows[some]], errors="coerce").to_numpy(dtype=np.float64)
    own = shapes.loc[shape_ids[some]]
    area = np.pi * own["radius"].to_numpy() ** 2 if "radius" in own else own.geometry.area.to_numpy()
    measured = known > 0
    return bool(measured.any() and abs(np.median(area[measured] / known[measured]) - 1) < _AREA_TOLERANCE)
