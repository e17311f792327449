"""`get.interval`: where measurements are expected around predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import dense_layer
from pekasc._keys import PEKA, total_key
from pekasc._layers import missing_layer
from pekasc._measured import prediction_record
from pekasc._sections import get_table, tiled_table


def interval(
    data: SpatialData | AnnData,
    layer: str = PEKA,
    *,
    total: float | Sequence[float] | None = None,
    table_name: str = "table",
) -> tuple[np.ndarray, np.ndarray]:
    """Get the intervals in which measurements are expected, around the predictions of a calibrated adapter.

    The interval of a measurement is wider than that of the rate (``layers["{layer}_lower"]``, ``["{layer}_upper"]``):
    counting adds noise, the more the fewer counts a spot has.

    Parameters
    ----------
    data
        A SpatialData or AnnData with predictions in ``layers[layer]``.
    layer
        The predictions.
    total
        Total count of a spot, one for all or one for each row; by default those of the spots, recorded at prediction.
        Intervals of another target than counts do not depend on it.
    table_name
        Name of the table in a SpatialData.

    Returns
    -------
    Lower and upper ends on the scale of the predictions, (n_obs, n_vars) float32 each; NaN where nothing is predicted,
    nothing is known of a gene, or a spot has no total. Intervals of another target in obsm are
    ``obsm["X_{layer}_{key}_lower"]`` and ``["..._upper"]``. Beyond 20,000 expected counts, the interval is that of the
    rate, beside which drawing counts adds nothing to speak of.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If the predictions are of an adapter that was not calibrated, or there is no total.

    Examples
    --------
    >>> import pekasc as pk
    >>> low, high = pk.get.interval(sdata, total=5000)  # doctest: +SKIP
    """
    from pekasc.models.trust import COUNTS, intervals_of

    table = get_table(data, tiled_table(data, table_name))
    if layer not in table.layers:
        raise missing_layer(table, layer, table_name)
    values = dense_layer(table, layer, None)
    of_layer = prediction_record(table, layer)
    record = of_layer.get("intervals")
    if "measured" in of_layer:
        raise ValueError(
            f"layers[{layer!r}] was pulled to measured spots, and intervals are known for plain predictions: predict "
            "without `measured=`, under another `key_added=`."
        )
    if not isinstance(record, Mapping):
        raise ValueError(
            f"layers[{layer!r}] has no intervals: calibrate the adapter (`adapter = pekasc.tl.calibrate(adapter)`) and "
            "predict again."
        )
    noise, threshold = intervals_of(record, table.var_names)
    totals = None
    if record["kind"] == COUNTS:
        totals = _totals(table, layer, total)
    elif total is not None:
        raise ValueError("`total=` does nothing: these predictions are of no counts, and their intervals of residuals.")
    low, high = np.full_like(values, np.nan), np.full_like(values, np.nan)
    for start in range(0, len(values), 1024):
        rows = slice(start, start + 1024)
        low[rows], high[rows] = noise.measurement_bounds(
            values[rows], threshold, None if totals is None else totals[rows]
        )
    return low, high


def _totals(table: AnnData, layer: str, total: float | Sequence[float] | None) -> np.ndarray:
    """Return the total of every row, (n_obs,) float64; NaN where there is none."""
    if total is None:
        if total_key(layer) not in table.obs:
            raise ValueError(
                f"The spots have no totals (obs[{total_key(layer)!r}]): say at which total count a measurement would "
                "be taken, such as `total=5000`."
            )
        totals = table.obs[total_key(layer)].to_numpy(dtype=np.float64)
        return np.where(totals > 0, totals, np.nan)
    totals = np.asarray(total)
    # text of a number, or one boolean among numbers, is no count
    numbers = totals.dtype.kind in "iuf" and not isinstance(total, bool)
    totals = np.asarray(totals, dtype=np.float64) if numbers else np.full((), np.nan)
    if (
        totals.ndim > 1
        or (totals.ndim == 1 and totals.shape != (table.n_obs,))
        or not (np.isfinite(totals) & (totals > 0)).all()
    ):
        raise ValueError(
            f"`total` must be a count above 0, or one for each of the {table.n_obs} rows, got {total!r:.100}."
        )
    return np.broadcast_to(totals, (table.n_obs,))
