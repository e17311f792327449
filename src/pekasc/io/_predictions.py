"""`io.attach_predictions`: bring stored predictions back after an object was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pekasc._keys import UNS
from pekasc._paths import folder_path
from pekasc._settings import get_logger

if TYPE_CHECKING:
    from os import PathLike

    from anndata import AnnData
    from spatialdata import SpatialData

logger = get_logger(__name__)


def attach_predictions(data: SpatialData | AnnData, *, store: str | PathLike[str] | None = None) -> None:
    """Bring predictions that :func:`pekasc.tl.predict_expression` left in a store back into their tables.

    Predictions with ``store=`` are not written with the object. After :func:`spatialdata.read_zarr`, this opens them
    again, lazily: nothing is read before it is needed.

    Parameters
    ----------
    data
        The object, a SpatialData or AnnData, as it was read.
    store
        Folder of the store, if it has moved since; by default where the records in the tables say.

    Returns
    -------
    None, and writes ``layers[key]`` of every table whose record names a store, as a dask array.

    Raises
    ------
    FileNotFoundError
        If a store is not where it was.
    KeyError
        If no table has predictions in a store.
    ValueError
        If the store holds other predictions, or the table has other rows or genes than it had.

    Examples
    --------
    >>> import pekasc as pk, spatialdata as sd
    >>> sdata = sd.read_zarr("slide.zarr")  # doctest: +SKIP
    >>> pk.io.attach_predictions(sdata)  # doctest: +SKIP
    """
    from anndata import AnnData

    from pekasc.models.features import stored_layer

    found = []
    tables = {"": data} if isinstance(data, AnnData) else dict(data.tables)
    for name, table in tables.items():
        for key, record in _stored(table):
            path = Path(record["store"]) if store is None else folder_path("store", store).absolute()
            shape = (table.n_obs, table.n_vars)
            found.append((name, key, stored_layer(path, record["array"], record["array_digest"], shape)))
    if not found:
        raise KeyError(
            f"No table has predictions in a store: {list(tables)}. Those of "
            "`pekasc.tl.predict_expression(..., store=...)` have."
        )
    for name, key, layer in found:
        tables[name].layers[key] = layer
        logger.hint(
            "%s: layers[%r] is %d x %d on its store.", f"Table {name!r}" if name else "AnnData", key, *layer.shape
        )


def _stored(table: AnnData) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the predictions of a table that are in a store: key and record."""
    records = table.uns.get(UNS, {})
    for key, record in records.items() if isinstance(records, Mapping) else ():
        if isinstance(record, Mapping) and {"store", "array", "array_digest", "n_predicted"} <= set(record):
            if record.get("kind") == "prediction":
                yield str(key), record
