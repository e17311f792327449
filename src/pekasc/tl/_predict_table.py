"""The new table of predictions, beside the one that its spots are from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import TableModel

from pekasc._keys import GRID, bound_keys, check_key, kriging_sd_key, read_uns, write_uns


def keep_others(table: AnnData, replaced: AnnData) -> None:
    """Give a table the features and other targets, with their records, of the table whose place it takes."""
    for name, values in replaced.obsm.items():
        if name not in table.obsm:
            table.obsm[name] = values
            record = read_uns(replaced, name)
            if isinstance(record, Mapping):
                write_uns(table, name, record)


def new_table_of(table: AnnData, values: np.ndarray | None, genes: list[str], *, log: bool) -> AnnData:
    attrs = table.uns[TableModel.ATTRS_KEY]
    shape = None if values is not None else (table.n_obs, len(genes))
    new = AnnData(X=None if values is None else values.copy(), obs=table.obs.copy(), shape=shape)
    new.var_names = genes
    for name in ("spatial",):
        if name in table.obsm:
            new.obsm[name] = np.array(table.obsm[name])
    # same spots, so the same tiles and pixel sizes; records of other predictions are of layers that are not here
    new.uns["pekasc"] = {
        key: record
        for key, record in table.uns.get("pekasc", {}).items()
        if not (isinstance(record, Mapping) and record.get("kind") in ("prediction", "features"))
    }
    if log:
        new.uns["log1p"] = {"base": None}  # as scanpy.pp.log1p writes it
    region = attrs["region"]
    return TableModel.parse(
        new,
        region=region if isinstance(region, str) else list(region),
        region_key=attrs["region_key"],
        instance_key=attrs["instance_key"],
    )


def without_genes(table: AnnData, key: str) -> bool:
    """Tell whether a table has no genes of its own: those of a grid that was predicted before are the adapter's."""
    ours = {key, *bound_keys(key), kriging_sd_key(key)}
    of_grid = read_uns(table, GRID) is not None and table.X is None
    return table.n_vars == 0 or (of_grid and {name for name in table.layers if name is not None} <= ours)


def check_table_added(sdata: SpatialData, table_added: str, key_added: str) -> None:
    """Check that the name of a new table is free, or was made by an earlier run of the call."""
    check_key(table_added, argument="table_added")
    # SpatialData does not tell names apart by case
    taken = {name.lower() for _, name, _ in sdata.gen_elements()}
    if table_added in sdata.tables:
        record = read_uns(sdata.tables[table_added], key_added)
        if isinstance(record, Mapping) and record.get("table_added") == table_added:
            return  # an earlier run of this call made it
    if table_added.lower() in taken:
        raise ValueError(
            f"`table_added={table_added!r}` is the name of an element that is there already and was not made by this "
            "call: choose another name, or delete it."
        )
