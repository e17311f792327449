"""The new table of predictions, beside the one that its spots are from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from anndata import AnnData
from spatialdata.models import TableModel

from pekasc._keys import read_uns, write_uns


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
