"""Measured expression on the scale of predictions: the totals and the target that a prediction's record says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData

from pekasc._expression import (
    TARGETS,
    Matrix,
    count_totals,
    counts,
    find_counts,
    gene_columns,
    log1p_of_totals,
    target_matrix,
)
from pekasc._keys import read_uns, total_key
from pekasc._settings import get_logger

logger = get_logger(__name__)

_ROUNDING = 1e-6  # relative, of a total


def prediction_record(table: AnnData, key: str) -> Mapping[str, Any]:
    """Return what `predict_expression` recorded under `key`; empty if nothing."""
    record = read_uns(table, key)
    return record if isinstance(record, Mapping) else {}


def as_stored(table: AnnData, key: str) -> bool:
    """Tell whether predictions are on the scale of the values as stored (``target="as_is"``)."""
    return prediction_record(table, key).get("target") == TARGETS["as_is"] or _scale_lost(table, key)


def _scale_lost(table: AnnData, key: str) -> bool:
    """Tell whether predictions lost their record, as joining objects drops ``uns``, and had no totals beside them."""
    return not prediction_record(table, key) and f"{key}_train" in table.obs and total_key(key) not in table.obs


def totals_to_record(table: AnnData, layer: str | None) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Return the totals of all rows, float64, with the layer of the counts and the number of genes they are over.

    None if the table has no counts, since nothing was measured there.
    """
    if table.X is None and not table.layers:
        return None
    try:
        raw, name = find_counts(table, layer if layer in table.layers else None)
    except ValueError:
        return None
    columns = gene_columns(table)
    return count_totals(raw, columns), {"counts_layer": name, "n_genes_in_total": int(columns.size)}


def measured(
    table: AnnData, key: str, counts_layer: str | None = None, *, argument: str = "counts_layer", otherwise: str = ""
) -> tuple[Matrix, np.ndarray]:
    """Return measured expression on the scale of the predictions `key`, spots x columns, and which rows have any.

    With ``target="as_is"`` these are the values as stored, in the layer that the adapter was trained on; else
    log1p(1e4 * count / total), with the totals recorded at prediction where genes have left the table since.

    Raises
    ------
    KeyError, ValueError
        If a layer is not there or holds no counts.
    """
    if as_stored(table, key):
        return _as_stored(table, key, counts_layer)
    if counts_layer is None:
        counts_layer = _recorded_layer(table, key)
    raw = counts(table, counts_layer, argument=argument, otherwise=otherwise)
    total = _totals(table, key, raw)
    return log1p_of_totals(raw, total), total > 0


def _recorded_layer(table: AnnData, key: str) -> str | None:
    """Return the layer of the counts at prediction, or None for the default places."""
    layer = prediction_record(table, key).get("counts_layer", "")
    if layer and layer not in table.layers:
        warnings.warn(
            f"The counts of layers[{key!r}] were in layers[{layer!r}], which is not in the table any more: they are "
            "looked for in `X` and layers['counts'].",
            UserWarning,
            stacklevel=4,
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


def _totals(table: AnnData, key: str, raw: Matrix) -> np.ndarray:
    """Return the totals over the genes there were at prediction, if they are recorded and fit these counts."""
    columns = gene_columns(table)
    now = count_totals(raw, columns)
    record = prediction_record(table, key)
    n_then = record.get("n_genes_in_total")
    column = total_key(key)
    if n_then == columns.size:  # whatever the counts are, they are all there
        return now
    if column not in table.obs:
        if n_then is not None:
            _warn(key, f"`obs[{column!r}]` with the totals over {n_then} genes has gone, {columns.size} genes are left")
        return now
    then = table.obs[column].to_numpy(dtype=np.float64)
    known = np.isfinite(then)
    if (now > then * (1 + _ROUNDING))[known].any():
        _warn(key, f"the totals recorded in `obs[{column!r}]` are below those of the counts, so they do not fit them")
        return now
    if not np.allclose(now[known], then[known], rtol=_ROUNDING, atol=0):
        logger.hint("Totals are those of the genes there were at prediction (obs[%r]).", column)
    return np.where(known, then, now)


def _warn(key: str, why: str) -> None:
    warnings.warn(
        f"Measured values are compared with layers[{key!r}] as log1p(1e4 * count / total), but {why}. Predict again, "
        "or score a table with all genes.",
        UserWarning,
        stacklevel=5,
    )
