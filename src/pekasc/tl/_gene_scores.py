"""Scores of genes in a group of spots: predicted against measured expression, and what counting noise allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from pekasc._ceiling import noise_ceiling
from pekasc._expression import Matrix, dense
from pekasc.models.selection import MIN_SPOTS, morans_i, pearson
from pekasc.models.trust import intervals_of

LEAST = 3  # spots for a score


@dataclass(frozen=True, eq=False)
class Compared:
    """Predicted and measured values of spots to compare.

    Parameters
    ----------
    names
        Names of the genes, or of the columns of a target.
    predicted, measured
        Their values, (spots, names).
    positions, sections
        Position in um, (spots, 2), and section of every spot, (spots,).
    known
        Which of the values were measured, (spots, names) bool; None: all.
    counts, totals
        The counts, (spots, names), and total of every spot, (spots,), that measured values are log1p of; None if they
        are something else.
    intervals
        What the record of the predictions says of their intervals; None without any, or where measured values are of
        another kind.
    """

    names: pd.Index
    predicted: np.ndarray
    measured: Matrix
    positions: np.ndarray
    sections: np.ndarray
    known: np.ndarray | None = None
    counts: Matrix | None = None
    totals: np.ndarray | None = None
    intervals: Mapping[str, Any] | None = None

    def take(self, rows: np.ndarray, columns: Any = slice(None)) -> Compared:
        """Return some spots, and some of the names."""
        return replace(
            self,
            names=self.names[columns],
            predicted=self.predicted[rows][:, columns],
            measured=self.measured[rows][:, columns],
            positions=self.positions[rows],
            sections=self.sections[rows],
            known=None if self.known is None else self.known[rows][:, columns],
            counts=None if self.counts is None else self.counts[rows][:, columns],
            totals=None if self.totals is None else self.totals[rows],
        )


def score_group(group: str, spots: Compared) -> pd.DataFrame:
    """Return the scores of every gene in a group, on the spots that measured it; see :func:`pekasc.tl.evaluate`."""
    if spots.known is None:
        return _score(group, spots)
    patterns, number = np.unique(spots.known, axis=1, return_inverse=True)
    parts = []
    for i in range(patterns.shape[1]):
        columns, rows = np.flatnonzero(np.asarray(number).ravel() == i), np.flatnonzero(patterns[:, i])
        if rows.size < LEAST:
            parts.append(pd.DataFrame({"gene": spots.names[columns], "group": group, "n_spots": 0}))
        else:
            parts.append(_score(group, spots.take(rows, columns)))
    # in the order of the genes
    return pd.concat(parts).set_index("gene").loc[spots.names].rename_axis("gene").reset_index()


def _score(group: str, spots: Compared) -> pd.DataFrame:
    y, predicted = dense(spots.measured), spots.predicted
    i_measured, i_predicted, structured = _morans_i(predicted, y, spots.positions, spots.sections)
    # without spatial structure the ratio is undefined, and its extremes would dominate any mean over genes
    undefined = np.full(len(spots.names), np.nan)
    ratio = np.divide(i_predicted, i_measured, out=undefined.copy(), where=structured & (i_measured > 0))
    error, variance = np.square(predicted.astype(np.float64) - y).mean(axis=0), y.var(axis=0, dtype=np.float64)
    r, ceiling = pearson(predicted, y), undefined
    if spots.counts is not None and spots.totals is not None:
        ceiling = noise_ceiling(spots.counts, spots.totals)
    return pd.DataFrame(
        {
            "gene": np.asarray(spots.names, dtype=object),
            "group": group,
            "n_spots": len(y),
            "pearson": r,
            "ceiling": ceiling,
            "reached": np.divide(r, ceiling, out=np.full(r.size, np.nan), where=ceiling > 0),
            "spearman": pearson(rankdata(predicted, axis=0), rankdata(y, axis=0)),
            **_coverage(spots, y),
            "rmse": np.sqrt(error),
            "variance_explained": 1 - np.divide(error, variance, out=undefined.copy(), where=variance > 0),
            "morans_i_measured": i_measured,
            "morans_i_predicted": i_predicted,
            "morans_i_ratio": ratio,
        }
    )


def _coverage(spots: Compared, y: np.ndarray) -> dict[str, np.ndarray]:
    """Return how many measurements lie in their intervals, of every gene, and how wide these are; NaN without any."""
    if spots.intervals is None:
        return {}
    noise, threshold = intervals_of(spots.intervals, spots.names)
    measured = y if spots.counts is None else dense(spots.counts)
    ends = noise.scores(spots.predicted, measured, spots.totals)
    low, high = noise.measurement_bounds(spots.predicted, threshold, spots.totals)
    known = np.isfinite(threshold)
    found = {
        "coverage": noise.covered(ends, threshold).mean(axis=0),
        "coverage_randomised": noise.share_within(ends, threshold).mean(axis=0),
        "width": (high - low).mean(axis=0, dtype=np.float64),
    }
    found["calibration_error"] = found["coverage_randomised"] - spots.intervals["level"]
    return {name: np.where(known, values, np.nan) for name, values in found.items()}


def _morans_i(
    predicted: np.ndarray, measured: np.ndarray, positions: np.ndarray, sections: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Moran's I of measured and of predicted expression, and whether the measured one is significant (genes,).

    Moran's I is taken within sections and averaged, weighted by number of spots.
    """
    sums = np.zeros((2, predicted.shape[1]))
    weight = np.zeros((2, predicted.shape[1]))
    structured = np.zeros(predicted.shape[1], dtype=bool)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        if rows.size < MIN_SPOTS:
            continue
        for i, values in enumerate((measured, predicted)):
            value, significant = morans_i(values[rows], positions[rows])
            known = np.isfinite(value)
            sums[i][known] += value[known] * rows.size
            weight[i][known] += rows.size
            if i == 0:
                structured |= significant
    out = np.divide(sums, weight, out=np.full(sums.shape, np.nan), where=weight > 0)
    return out[0], out[1], structured
