"""`io.attach_predictions`: bring stored predictions back after an object was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pekasc._keys import UNS, bound_keys, kriging_sd_key
from pekasc._paths import folder_path
from pekasc._sections import table_digest
from pekasc._settings import get_logger

if TYPE_CHECKING:
    from os import PathLike

    from anndata import AnnData
    from spatialdata import SpatialData

logger = get_logger(__name__)


def attach_predictions(data: SpatialData | AnnData, *, store: str | PathLike[str] | None = None) -> None:
    """Bring predictions that :func:`pekasc.tl.predict_expression` left in a store back into their tables.

    Predictions with ``store=`` are not written with the object. After :func:`spatialdata.read_zarr`, this opens them
    again, lazily: nothing is read before it is needed. A table that was subset or reordered before it was written
    holds its predictions itself, and is left as it is.

    Parameters
    ----------
    data
        The object, a SpatialData or AnnData, as it was read.
    store
        Folder of the store, if it has moved since; by default where the records in the tables say.

    Returns
    -------
    None, and writes ``layers[key]`` of every table whose record names a store, as a dask array, and what
    belongs to them: the intervals around them, if the adapter was calibrated, and the standard deviation of the pull to
    measured spots.

    Raises
    ------
    FileNotFoundError
        If a store is not where it was.
    KeyError
        If no table has predictions in a store.
    ValueError
        If the store holds other predictions, or the table has other rows or genes than it had, or in another order.

    Examples
    --------
    >>> import pekasc as pk, spatialdata as sd
    >>> sdata = sd.read_zarr("slide.zarr")  # doctest: +SKIP
    >>> pk.io.attach_predictions(sdata)  # doctest: +SKIP
    """
    from anndata import AnnData

    from pekasc.models.features import StoredLayer, stored_layer

    found, inside = [], []
    tables = {"": data} if isinstance(data, AnnData) else dict(data.tables)
    for name, table in tables.items():
        for key, record in _stored(table):
            if not isinstance(table.layers.get(key, None), StoredLayer | None):
                inside.append((name, key))
                continue
            path = Path(record["store"]) if store is None else folder_path("store", store).absolute()
            shape = (table.n_obs, table.n_vars)
            layer = stored_layer(path, record["array"], record["array_digest"], shape, key)
            if record["table_digest"] != table_digest(table):
                raise ValueError(
                    f"{_say(name)} has other rows or genes than when its predictions {key!r} were stored, or in "
                    "another order. Predict again: what is in the store already is not computed twice."
                )
            found.append((name, key, layer))
            if "sd_array" in record:
                sd_key = kriging_sd_key(key)
                found.append((name, sd_key, stored_layer(path, record["sd_array"], record["sd_digest"], shape, sd_key)))
            if isinstance(record.get("intervals"), Mapping):
                found += [(name, bound, derived) for bound, derived in _bounds(record["intervals"], layer, key, table)]
    if not found and not inside:
        raise KeyError(
            f"No table has predictions in a store: {list(tables)}. Those of "
            "`pekasc.tl.predict_expression(..., store=...)` have."
        )
    for name, key, layer in found:
        tables[name].layers[key] = layer
        logger.hint("%s: layers[%r] is %d x %d on its store.", _say(name), key, *layer.shape)
    for name, key in inside:
        logger.hint("%s: layers[%r] was written with the table, and stays.", _say(name), key)


def _bounds(record: Mapping[str, Any], layer: Any, key: str, table: AnnData) -> list[tuple[str, Any]]:
    """Return the ends of the intervals around stored predictions, each with its name."""
    from pekasc.models.features import derived_layer
    from pekasc.models.trust import intervals_of

    noise, threshold = intervals_of(record, table.var_names)
    found_ends: Any = noise.rate_bounds(layer, threshold)  # dask arrays, of a dask array
    ends = zip(bound_keys(key), found_ends, strict=True)
    return [(name, derived_layer(found, name)) for name, found in ends]


def _say(name: str) -> str:
    return f"Table {name!r}" if name else "AnnData"


def _stored(table: AnnData) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the predictions of a table that are in a store: key and record."""
    records = table.uns.get(UNS, {})
    for key, record in records.items() if isinstance(records, Mapping) else ():
        if isinstance(record, Mapping) and {"store", "array", "array_digest", "table_digest"} <= set(record):
            if record.get("kind") == "prediction":
                yield str(key), record
