"""What was measured at the spots of a table, as residuals of a prediction to interpolate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._ceiling import log_moments
from pekasc._expression import (
    SCALE,
    TARGETS,
    count_totals,
    dense,
    find_counts,
    gene_columns,
    gene_names,
    log1p_of_totals,
    no_overlap_message,
    target_matrix,
)
from pekasc._sections import Section, tiled_table
from pekasc._text import names, number
from pekasc.models import Adapter
from pekasc.models.kriging import Kriging, TooFewSpots, fit_kriging
from pekasc.tl._panels import measured_entries
from pekasc.tl._predict_genes import columns_of, columns_of_totals, warn_of_other_totals

_MOST_MISSING = 0.1  # share of the spots; a gene with more gaps is left alone
_N_DEPTHS = 16


def spots_table(sdata: SpatialData, measured_table: str | None) -> str:
    """Return the name of the table of the spots.

    Raises
    ------
    KeyError
        If there is none of this name.
    """
    name = tiled_table(sdata, measured_table or "table")
    if name not in sdata.tables and (measured_table is not None or len(sdata.tables) != 1):
        raise KeyError(
            f"Table {name!r} not found in `sdata.tables`. Available tables: {list(sdata.tables)}. Name that of the "
            "spots with `measured_table=`."
        )
    return name


def places_um(section: Section, frame: Section) -> np.ndarray:
    """Return the centres of a section in um along the axes of another on the same image, (n, 2)."""
    return np.asarray(section.centres_px @ np.linalg.inv(frame.um_to_px).T)


def counting_variance(logs: np.ndarray, predicted: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return the variance that drawing counts (Poisson) has in log1p(1e4 * count / total), (n, genes) float32.

    Rates are those predicted, times a factor for each gene that makes their sum that of the counts.

    Parameters
    ----------
    logs
        log1p(1e4 * count / total), (n, genes).
    predicted
        Predictions of them, (n, genes).
    totals
        Total of every spot, (n,), above 0.
    """
    share = np.expm1(np.maximum(predicted, 0).astype(np.float64)) + 1e-6
    seen = totals @ np.expm1(logs.astype(np.float64))
    expected = totals[:, None] * share * (seen / (totals @ share)) / SCALE  # counts
    depths = np.unique(np.quantile(totals, np.linspace(0, 1, _N_DEPTHS)))
    nearest = np.abs(np.log(totals[:, None] / depths)).argmin(axis=1)
    at, _, variance = log_moments(depths)
    out = np.empty(expected.shape, dtype=np.float32)
    for depth in np.unique(nearest):
        rows = nearest == depth
        out[rows] = np.interp(np.log(np.maximum(expected[rows], 1e-300)), at, variance[depth], left=0.0)
    return out


@dataclass(frozen=True, eq=False)
class Fitted:
    """Residuals of a section's spots.

    Parameters
    ----------
    kriging
        To interpolate.
    genes
        Their genes, as places among those that are predicted.
    rows
        Rows of the spots in their table.
    left_out
        What was left out for missing values, as a text; empty: nothing.
    """

    kriging: Kriging
    genes: np.ndarray
    rows: np.ndarray
    left_out: str = ""


@dataclass(frozen=True, eq=False)
class MeasuredSpots:
    """What was measured at the spots of a table.

    Parameters
    ----------
    table
        The table.
    names
        Genes that are predicted.
    columns
        Its columns of these; -1: none.
    values
        Measured values on the scale of the predictions, (n_obs, n_vars).
    totals
        Total of every row; None if values are no counts.
    """

    table: AnnData
    names: Sequence[str]
    columns: np.ndarray
    values: Any
    totals: np.ndarray | None

    @classmethod
    def read(
        cls, table: AnnData, name: str, adapter: Adapter, wanted: np.ndarray, gene_key: str | None
    ) -> MeasuredSpots:  # fmt: skip
        """Return what a table measured of the genes that an adapter predicts."""
        layer = adapter.info.get("layer") or None
        where = f"`measured_table={name!r}`"
        if table.n_vars == 0 or (table.X is None and not {key for key in table.layers if key is not None}):
            nothing = "genes" if table.n_vars == 0 else "values (`X` or a layer)"
            raise ValueError(
                f"{where} has no measurements to pull predictions to: it holds no {nothing}. Name the table of the "
                "spots with `measured_table=`."
            )
        gene_of = gene_columns(table)
        found_names = gene_names(table, gene_key, gene_of)
        genes = [adapter.genes[i] for i in wanted]
        columns = columns_of(found_names, genes, gene_of)
        if (columns < 0).all():
            raise ValueError(f"{where}: {no_overlap_message(found_names, genes, table)}")
        as_is = adapter.info["target"] == TARGETS["as_is"]
        try:
            if as_is:
                return cls(table, genes, columns, target_matrix(table, layer, "as_is"), None)
            kept = layer if layer in table.layers else None
            places = ["`X`", "layers['counts']", *([] if layer in (None, "counts") else [f"layers[{layer!r}]"])]
            raw, _ = find_counts(
                table, kept, advice=f"Put them into {', '.join(places[:-1])} or {places[-1]} of that table, or name "
                "another with `measured_table=`.",
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            what = "values on the scale of its training" if as_is else "counts"
            raise ValueError(
                f"{where}: the adapter's predictions are pulled to {what}, and those of this table cannot be used. "
                f"{error.args[0]}"
            ) from error
        over = columns_of_totals(adapter, found_names, gene_of)
        over = gene_of if over is None else over
        warn_of_other_totals(adapter, over.size)
        totals = count_totals(raw, over)
        return cls(table, genes, columns, log1p_of_totals(raw, totals), totals)

    def fitted(self, own: Section, section: Section, predicted: np.ndarray) -> Fitted | str:
        """Return the residuals of a section's spots; or what is missing.

        Parameters
        ----------
        own
            Section of the spots.
        section
            Section that is predicted, along whose axes positions are taken.
        predicted
            Predictions for the rows of the table, (n_obs, wanted genes).
        """
        rows, places = own.rows, places_um(own, section)
        genes = np.flatnonzero(self.columns >= 0)
        known = np.isfinite(predicted[np.ix_(rows, genes)]).any(axis=1)
        if self.totals is not None:
            known &= self.totals[rows] > 0
        rows, places = rows[known], places[known]
        entries = measured_entries(self.table, rows, self.columns[genes]) if rows.size else None
        if entries is not None:
            genes = genes[entries.all(axis=0)]
        if not rows.size or not genes.size:
            return "none has measurements and a prediction"
        missing = ~np.isfinite(predicted[np.ix_(rows, genes)])
        gaps = missing.mean(axis=0) > _MOST_MISSING
        out = missing[:, ~gaps].any(axis=1)
        left_out = self._left_out(missing, gaps, out, genes)
        genes, rows, places = genes[~gaps], rows[~out], places[~out]
        if not rows.size or not genes.size:
            return f"none has measurements and a prediction: {left_out}"
        logs = dense(self.values[rows][:, self.columns[genes]])
        own_predictions = predicted[np.ix_(rows, genes)]
        noise, counting = np.ones(rows.size), None
        if self.totals is not None:  # the variance of counting, on a logarithmic scale, goes with 1 / total
            totals = self.totals[rows]
            noise, counting = np.median(totals) / totals, counting_variance(logs, own_predictions, totals)
        try:
            return Fitted(fit_kriging(places, logs - own_predictions, noise, counting), genes, rows, left_out)
        except TooFewSpots as error:
            return f"{rows.size} can be used (with measurements and a prediction), but {error}"

    def _left_out(self, missing: np.ndarray, gaps: np.ndarray, out: np.ndarray, genes: np.ndarray) -> str:
        """Say which genes and spots are left out for predictions at the spots that are NaN."""
        said = []
        if out.any():
            which = [self.names[i] for i in genes[missing[out].any(axis=0) & ~gaps]]
            said.append(f"{number(int(out.sum()), 'spot')} left out: predictions there are NaN for {names(which, 3)}")
        if gaps.any():
            which = [self.names[i] for i in genes[gaps]]
            where = f"at more than {_MOST_MISSING:.0%} of the spots"
            said.append(f"not pulled: {names(which, 3)} (predictions are NaN {where})")
        return "; ".join(said)
