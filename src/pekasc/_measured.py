"""Measured expression on the scale of predictions: the totals and the target that a prediction's record says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData

from pekasc._expression import TARGETS, Matrix, counts, log1p_of_totals, target_matrix
from pekasc._keys import read_uns, total_key
from pekasc._settings import get_logger
from pekasc._totals import recorded_totals
from pekasc._warnings import warn_user

logger = get_logger(__name__)

PULLS = ("kriging",)  # how predictions are pulled to what was measured at spots


def prediction_record(table: AnnData, key: str) -> Mapping[str, Any]:
    """Return what `predict_expression` recorded under `key`; empty if nothing."""
    record = read_uns(table, key)
    return record if isinstance(record, Mapping) else {}


def was_trained_on(table: AnnData, key: str) -> np.ndarray:
    """Return whether the adapter that predicted `key` was trained on a row, (n_obs,) bool; False if nothing says so."""
    column = f"{key}_train"
    if column not in table.obs:
        return np.zeros(table.n_obs, dtype=bool)
    # rows of other objects, joined, have none
    return np.asarray(table.obs[column].fillna(value=False).to_numpy(dtype=bool))


def as_stored(table: AnnData, key: str) -> bool:
    """Tell whether predictions are on the scale of the values as stored (``target="as_is"``)."""
    return prediction_record(table, key).get("target") == TARGETS["as_is"] or _scale_lost(table, key)


def _scale_lost(table: AnnData, key: str) -> bool:
    """Tell whether predictions lost their record, as joining objects drops ``uns``, and had no totals beside them."""
    return not prediction_record(table, key) and f"{key}_train" in table.obs and total_key(key) not in table.obs


def measured(
    table: AnnData, key: str, counts_layer: str | None = None, *, otherwise: str = ""
) -> tuple[Matrix, np.ndarray]:
    """Return measured expression on the scale of the predictions `key`, spots x columns, and which rows have any.

    With ``target="as_is"`` these are the values as stored, in the layer that the adapter was trained on; else
    log1p(1e4 * count / total), with the totals recorded at prediction where genes have left the table since and the
    counts are still the same.

    Raises
    ------
    KeyError, ValueError
        If a layer is not there or holds no counts.
    """
    if as_stored(table, key):
        return _as_stored(table, key, counts_layer)
    raw, total = measured_counts(table, key, counts_layer, otherwise=otherwise)
    return log1p_of_totals(raw, total), total > 0


def measured_counts(
    table: AnnData, key: str, counts_layer: str | None = None, *, otherwise: str = ""
) -> tuple[Matrix, np.ndarray]:
    """Return the counts, spots x columns, and the totals, (spots,), that :func:`measured` is log1p of.

    For predictions that are not on the scale of values as stored.

    Raises
    ------
    KeyError, ValueError
        If a layer is not there or holds no counts.
    """
    if counts_layer is None:
        counts_layer = _recorded_layer(table, key)
    raw = counts(table, counts_layer, argument="counts_layer", otherwise=otherwise)
    return raw, recorded_totals(table, key, prediction_record(table, key), raw)


def _recorded_layer(table: AnnData, key: str) -> str | None:
    """Return the layer of the counts at prediction, or None for the default places."""
    layer = prediction_record(table, key).get("counts_layer", "")
    if layer and layer not in table.layers:
        warn_user(
            f"The counts of layers[{key!r}] were in layers[{layer!r}], which is not in the table any more: they are "
            "looked for in `X` and layers['counts']."
        )
        return None
    return layer or None


def _as_stored(table: AnnData, key: str, counts_layer: str | None) -> tuple[Matrix, np.ndarray]:
    record = prediction_record(table, key)
    if not record:
        raise ValueError(
            f"The scale of layers[{key!r}] is not known: its record in `uns` has gone, as joining objects drops it. "
            "Name the measured values on that scale with `truth=`, or predict again."
        )
    scale = f'layers[{key!r}] holds predictions on the scale of the values as stored (`target="as_is"`)'
    if counts_layer is not None:
        raise ValueError(f"{scale}, not of counts (`counts_layer=`): name the measured values with `truth=`.")
    layer = record.get("layer")
    if layer is None or (layer and layer not in table.layers):
        where = "is not recorded" if layer is None else f"{layer!r}, is not in this table"
        raise ValueError(f"{scale}, and the layer of those values {where}: name the measured values with `truth=`.")
    where = f"layers[{layer!r}]" if layer else "X"
    logger.hint("Measured values as stored in %s, the scale of the predictions.", where)
    values = target_matrix(table, layer or None, "as_is")
    return values, np.ones(table.n_obs, dtype=bool)


def check_measured(measured: str | None, measured_table: str | None) -> None:
    """Check how predictions are pulled, and to which table.

    Raises
    ------
    ValueError
        If there is no such way, or a table is named without one.
    """
    if measured is None and measured_table is not None:
        raise ValueError(
            f'`measured_table={measured_table!r}` does nothing without `measured="kriging"`, which pulls predictions '
            "to what was measured at its spots."
        )
    if measured is not None and measured not in PULLS:
        raise ValueError(f"`measured={measured!r}` is unknown: use one of {list(PULLS)}, or None for no pull.")
