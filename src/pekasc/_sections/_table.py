"""Tables: rows of every region, checks of names and ids, and writing results."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._digests import fingerprint
from pekasc._expression import check_structures
from pekasc._keys import SECTION, UNS
from pekasc._sections._pixel_size import bin_um
from pekasc._sections._slides import images_of
from pekasc._settings import get_logger
from pekasc.tiling import TileSpec

logger = get_logger(__name__)

_DEFAULT = "table"
_ATTRS = "spatialdata_attrs"
READ_SLIDE = "read one with `pekasc.io.read_slide`, or add it to `sdata.images`"


def get_table(data: SpatialData | AnnData, table_name: str = "table", spec: TileSpec | None = None) -> AnnData:
    """Return the table `table_name` of a SpatialData, or an AnnData as it is.

    `spec` is the size of the tiles that the call needs, for the error about a slide that has no table yet.

    Raises
    ------
    KeyError
        If there is no such table.
    TypeError
        If `data` is neither a SpatialData nor an AnnData.
    """
    if isinstance(data, AnnData):
        return _not_lazy(data)
    if not isinstance(data, SpatialData):
        raise TypeError(f"Expected a SpatialData or an AnnData, got {type(data).__name__}.{_how_to_read(data)}")
    return _not_lazy(data.tables[present_table(data, table_name, spec)])


def present_table(sdata: SpatialData, table_name: str, spec: TileSpec | None = None) -> str:
    """Return the name of the table: the only one, if the default name is asked for and there is none of it."""
    tables = list(sdata.tables)
    if table_name in tables:
        return table_name
    if table_name == _DEFAULT and len(tables) == 1:
        logger.hint("Using the only table, %r.", tables[0])
        return str(tables[0])
    if not tables:
        raise KeyError(_no_table(sdata, spec))
    raise KeyError(f"Table {table_name!r} not found in `sdata.tables`. Available tables: {tables}.{_choose(sdata)}")


def _no_table(sdata: SpatialData, spec: TileSpec | None) -> str:
    """Return the error about an object without tables: a slide that has no tiles yet, or one without images."""
    images = list(images_of(sdata))
    if not images:
        return f"There is no table, and there are no images: {READ_SLIDE}."
    size = "" if spec is None else f", tile_px={spec.tile_px}, mpp={spec.mpp:g}"
    others = "" if len(images) == 1 else f" (images: {examples(images, 5)})"
    return (
        f"There is no table: for a slide without spots run `pekasc.pp.tile_grid(sdata, {images[0]!r}{size})`{others} "
        "first, then this call with `table_name='grid'`."
    )


def _how_to_read(data: Any) -> str:
    """Return the line that reads an object, where the path of one was given, for an error."""
    if not isinstance(data, str | PathLike):
        return ""
    return f" Read it first: `sdata = spatialdata.read_zarr({str(data)!r})`."


def _choose(sdata: SpatialData) -> str:
    """Return what to do where there is no table of the default name, for an error."""
    tables = list(sdata.tables)
    used = [name for name in tables if sdata.tables[name].uns.get(UNS)]
    if used:
        return f" Name one of them with `table_name=` (used by pekasc so far: {used})."
    bins = [name for name in tables if bin_um(name)]
    if not bins:
        return " Name one of them with `table_name=`."
    # 8 um are the bins that Space Ranger's own analysis takes
    example = "square_008um" if "square_008um" in bins else bins[-1]
    return (
        " Name one of them with `table_name=`; bins of Visium HD are tiled with "
        f"`pekasc.pp.tile(sdata, table_name={example!r}, array='visium_hd')`."
    )


def _not_lazy(adata: AnnData) -> AnnData:
    if isinstance(adata.obs, pd.DataFrame):
        return adata
    raise TypeError(
        "The table was opened with `anndata.experimental.read_lazy`, and its rows are not in memory. "
        "Read it: `adata = adata.to_memory()`, then this call again."
    )


def check_spatialdata(data: Any) -> None:
    """Raise unless `data` is a SpatialData; for an AnnData with images in ``uns``, the error shows how to convert it.

    Raises
    ------
    TypeError
        If `data` is something else.
    """
    if isinstance(data, SpatialData):
        return
    message = f"Tiles need images: expected a SpatialData, got {type(data).__name__}.{_how_to_read(data)}"
    if isinstance(data, AnnData):
        message += _how_to_convert(data)
    raise TypeError(message)


def _how_to_convert(adata: AnnData) -> str:
    """Return the lines that make a SpatialData of an AnnData of scanpy or squidpy with images in ``uns``."""
    spatial = adata.uns.get("spatial")
    stored = spatial if isinstance(spatial, Mapping) else {}
    libraries = [name for name, value in stored.items() if isinstance(value, Mapping) and value.get("images")]
    if not libraries:
        return ' It has none in `adata.uns["spatial"]` either: read the section with its image, as spatialdata-io does.'
    if len(stored) == 1:
        return (
            f' Its images are in `adata.uns["spatial"][{libraries[0]!r}]`; convert it, then call again:\n'
            "    from spatialdata_io.experimental import from_legacy_anndata\n"
            "    sdata = from_legacy_anndata(adata)"
        )
    columns = [str(name) for name, column in adata.obs.items() if set(column) == set(libraries)]
    library = f"adata.obs[{columns[0]!r}]" if columns else "adata.obs[library_key]"
    which = "" if columns else " (`library_key`: the column of `obs` with the library of every spot)"
    return (
        f' It has {len(libraries)} libraries in `adata.uns["spatial"]`: {examples(libraries)}. Convert each on its own '
        f"and join them{which}, then call again:\n"
        "    import spatialdata\n"
        "    from spatialdata_io.experimental import from_legacy_anndata\n"
        "    parts = {}\n"
        f"    for name in {libraries!r}:\n"
        f"        part = adata[{library} == name].copy()\n"
        '        part.uns["spatial"] = {name: adata.uns["spatial"][name]}\n'
        "        parts[name] = from_legacy_anndata(part)\n"
        "    sdata = spatialdata.concatenate(parts, concatenate_tables=True)"
    )


def writable_table(data: SpatialData | AnnData, table_name: str = "table") -> AnnData:
    """Return the table to write results to; a view inside a SpatialData is replaced by a copy.

    Raises
    ------
    ValueError
        If `data` is an AnnData that is a view of another one.
    """
    table = get_table(data, table_name)
    if not table.is_view:
        return table
    if isinstance(data, AnnData):
        raise ValueError("`adata` is a view of another AnnData. Write `adata = adata.copy()` first.")
    check_structures(table)
    table = table.copy()
    table_name = present_table(data, table_name)
    # past the check of regions, which a view that lost all rows of one does not pass: it was there before
    data.tables.data[table_name] = table
    return table


def examples(values: Any, n: int = 3) -> str:
    """Return the first few of `values` for an error message."""
    values = list(values)
    shown = ", ".join(repr(v.item() if isinstance(v, np.generic) else v) for v in values[:n])
    return shown + (", ..." if len(values) > n else "")


def _duplicates(values: pd.Index) -> list[Any]:
    return list(values[values.duplicated()].unique())


def table_keys(adata: AnnData) -> tuple[list[str], str, str]:
    """Return the regions, the region key and the instance key of a table."""
    how = (
        "Parse it with "
        '`spatialdata.models.TableModel.parse(adata, region=..., region_key="region", instance_key="spot_id")`.'
    )
    if not annotates(adata):
        raise ValueError(f"The table does not say which element its rows belong to. {how}")
    attrs = adata.uns[_ATTRS]
    region, region_key, instance_key = (
        attrs.get(name) if isinstance(attrs, Mapping) else None for name in ("region", "region_key", "instance_key")
    )
    # one region is a string, several are a list, or an array after reading from disk
    regions = [region] if isinstance(region, str) else region
    if not isinstance(regions, list | tuple | np.ndarray) or not all(isinstance(name, str) for name in regions):
        regions = None
    if not (regions is not None and isinstance(region_key, str) and isinstance(instance_key, str)):
        raise ValueError(
            f"`table.uns[{_ATTRS!r}]` is damaged: it needs `region` (a name, or names), `region_key` and "
            f"`instance_key` (columns of `obs`), but is {str(attrs)[:200]}. {how}"
        )
    for key in (region_key, instance_key):
        if key not in adata.obs:
            raise KeyError(f"Column {key!r} not found in `table.obs`. Available columns: {list(adata.obs)}.")
    return [str(name) for name in regions], region_key, instance_key


def annotates(adata: AnnData) -> bool:
    """Tell whether a table says which elements its rows annotate."""
    attrs = adata.uns.get(_ATTRS)
    return attrs is not None and not (isinstance(attrs, Mapping) and not attrs)


def annotate_alike(new: AnnData, table: AnnData) -> None:
    """Let `new`, which holds rows of a table, annotate the elements that they annotate there."""
    if annotates(table):
        _, region_key, instance_key = table_keys(table)
        regions = [str(name) for name in new.obs[region_key].unique()]
        region = regions if len(regions) > 1 else regions[0]
        new.uns[_ATTRS] = {"region": region, "region_key": region_key, "instance_key": instance_key}


def region_rows(adata: AnnData) -> dict[str, np.ndarray]:
    """Return the positions of the rows of each region that has rows, in the order the table names its regions."""
    regions, region_key, _ = table_keys(adata)
    column = adata.obs[region_key]
    if column.isna().any():
        raise ValueError(
            f"{int(column.isna().sum())} rows of the table have no region in `obs[{region_key!r}]`. "
            "Give them one or leave them out."
        )
    codes, names = pd.factorize(column.astype(str))
    found = {str(name): np.flatnonzero(codes == i) for i, name in enumerate(names)}
    order = [r for r in regions if r in found]
    return {r: found[r] for r in [*order, *(r for r in found if r not in order)]}


def table_digest(adata: AnnData) -> str:
    """Return a digest of the rows and genes of a table in their order, whatever their regions and rows are called."""
    _, region_key, instance_key = table_keys(adata)
    codes, _ = pd.factorize(adata.obs[region_key].astype(str))
    ids = adata.obs[instance_key].astype(str)
    return fingerprint(codes, ids.to_list(), adata.var_names.to_list())


def check_table(adata: AnnData) -> None:
    """Check that rows, genes and the instance ids within each region are unique.

    Raises
    ------
    ValueError
        If the table has no rows, or if names or ids occur more than once.
    """
    if adata.n_obs == 0:
        raise ValueError("The table has no rows: give one with spots (was it filtered down to nothing?).")
    for names, what in ((adata.obs_names, "obs"), (adata.var_names, "var")):
        if not names.is_unique:
            raise ValueError(
                f"The table has duplicate {what} names: {examples(_duplicates(names))}. "
                f"Make them unique with `adata.{what}_names_make_unique()`."
            )
    if not annotates(adata):
        return
    _, _, instance_key = table_keys(adata)
    ids = adata.obs[instance_key]
    for region, rows in region_rows(adata).items():
        try:
            repeated = _duplicates(pd.Index(ids.iloc[rows]))
        except TypeError as error:
            raise ValueError(
                f"`obs[{instance_key!r}]` must hold ids, numbers or names, but has {examples(ids.iloc[rows])}."
            ) from error
        if repeated:
            raise ValueError(
                f"Region {region!r} has duplicate instance ids in `obs[{instance_key!r}]`: {examples(repeated)}. "
                "Every row of a region needs its own id: drop the rows that repeat one, or renumber rows and shapes."
            )


def section_labels(adata: AnnData) -> np.ndarray:
    """Return the section of every row.

    That is the region where the table annotates elements, else ``obs["section"]``, else one section for all.
    """
    if annotates(adata):
        _, region_key, _ = table_keys(adata)
        return adata.obs[region_key].astype(str).to_numpy(dtype=object)
    if SECTION in adata.obs:
        return adata.obs[SECTION].astype(str).to_numpy(dtype=object)
    return np.full(adata.n_obs, SECTION, dtype=object)


def in_tissue(column: pd.Series, section: str) -> np.ndarray:
    """Return whether each spot of a section lies on tissue, from its column ``in_tissue``.

    Raises
    ------
    ValueError
        If a value is neither 0 or 1, nor boolean.
    """
    values = pd.to_numeric(column.astype(str).replace({"True": "1", "False": "0"}), errors="coerce")
    if values.isna().any():
        raise ValueError(
            f"Section {section!r}: `obs['in_tissue']` must be 0 or 1, or boolean, but has "
            f"{examples(column[values.isna()].unique())}. Correct the column, or drop it to tile all spots."
        )
    return (values != 0).to_numpy(dtype=bool)


def grid_index(column: pd.Series, name: str, section: str) -> np.ndarray:
    """Return the grid indices of a section's spots from its column `name`, float64.

    Raises
    ------
    ValueError
        If a value is no finite number.
    """
    numbers = pd.to_numeric(column.astype(str), errors="coerce")
    numbers = numbers.where(np.isfinite(numbers))
    if numbers.isna().any():
        raise ValueError(
            f"`obs[{name!r}]` of section {section!r} must hold grid indices, but has "
            f"{examples(column[numbers.isna()].unique())}. Correct the column, or give `image_mpp=`."
        )
    return numbers.to_numpy(dtype=np.float64)


def by_row(features: np.ndarray, rows: np.ndarray, n_obs: int) -> np.ndarray:
    """Return `features` at table rows `rows`, NaN elsewhere."""
    out = np.full((n_obs, features.shape[1]), np.nan, dtype=np.float32)
    out[rows] = features
    return out
