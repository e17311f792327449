"""Choose depth and penalty by the held-out error, with the same code for frozen encoders and adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pekasc._expression import Matrix
from pekasc._panels import Panels
from pekasc.models.encoders import Depth, features_at
from pekasc.models.heads import ALPHAS, Inputs, Target, fit_folds, head_fits
from pekasc.models.selection._folds import InnerFold


def held_out_errors(
    features: np.ndarray,
    y: Matrix,
    folds: Sequence[InnerFold],
    n_components: int | None,
    panels: Panels | None = None,
) -> np.ndarray:
    """Return the held-out error per fold and penalty, (folds, `ALPHAS`): squared error relative to the mean predictor.

    Squared errors are summed over genes first, so that genes are weighted by their variance. 1 is the error of
    predicting every gene's training mean.

    Parameters
    ----------
    features
        Features of all training spots, shape (n, d).
    y
        Expression of all training spots, shape (n, genes).
    folds
        Training and held-out spots of every fold.
    n_components
        See :func:`pekasc.models.heads.n_components_for`.
    panels
        Which spots measured which genes; NaN in a fold that says nothing about any.
    """
    if panels is not None:
        target = Target(y, folds, panels=panels)
        return head_fits("ridge", target, n_components).tried(Inputs(lambda: features)).errors
    return np.array([f.relative_errors(ALPHAS) for f in fit_folds(features, y, folds, n_components)])


def mean_error(errors: Sequence[np.ndarray] | np.ndarray, folds: Sequence[InnerFold]) -> np.ndarray:
    """Return the mean over folds of errors, (folds, ...), weighted by held-out spots; folds with NaN do not count."""
    values = np.asarray(errors, dtype=np.float64)
    shape = (-1, *[1] * (values.ndim - 1))
    weights = np.array([len(fold.held_out) for fold in folds], dtype=np.float64).reshape(shape)
    known = np.isfinite(values)
    if known.all():
        return np.average(values, axis=0, weights=weights.ravel())
    total = np.where(known, weights, 0.0).sum(axis=0)
    summed = np.where(known, values * weights, 0.0).sum(axis=0)
    return np.divide(summed, total, out=np.full(summed.shape, np.nan), where=total > 0)


@dataclass(frozen=True)
class Choice:
    """Depth and penalty chosen by the held-out error.

    Parameters
    ----------
    depth
        The block(s).
    alpha
        Penalty per training spot.
    table
        One row per depth and penalty: columns depth, alpha, error.
    """

    depth: Depth
    alpha: float
    table: pd.DataFrame


def choose(
    features: Mapping[Depth, np.ndarray],
    y: Matrix,
    folds: Sequence[InnerFold],
    n_components: int | None,
    inputs: Callable[[np.ndarray, InnerFold], np.ndarray] | None = None,
    n_depths: int = 1,
    panels: Panels | None = None,
) -> Choice:
    """Return depth and penalty with the smallest held-out error, mean over folds weighted by held-out spots.

    Parameters
    ----------
    features
        Features of all training spots by depth, (n, d).
    y, folds, n_components, panels
        See :func:`held_out_errors`.
    inputs
        Function from the features of a depth and a fold to the inputs of the head; None uses the features themselves.
    n_depths
        Maximum number of blocks to concatenate: greedy forward selection, as long as the error falls.
    """

    def tried(depth: Depth) -> pd.DataFrame:
        x = features_at(features, depth)
        if inputs is None:
            errors = held_out_errors(x, y, folds, n_components, panels=panels)
        else:
            errors = np.concatenate([held_out_errors(inputs(x, f), y, [f], n_components, panels=panels) for f in folds])
        error = mean_error(errors, folds)
        return pd.DataFrame({"depth": [depth] * len(ALPHAS), "alpha": ALPHAS, "error": error})

    table = pd.concat([tried(depth) for depth in features], ignore_index=True)
    best = table.loc[table["error"].idxmin()]
    singles = [depth for depth in features if depth is not None and len(depth) == 1]
    while best["depth"] is not None and len(best["depth"]) < n_depths:
        wider = [tuple(sorted({*best["depth"], *depth})) for depth in singles if depth[0] not in best["depth"]]
        if not wider:
            break
        table = pd.concat([table, *(tried(depth) for depth in wider)], ignore_index=True)
        found = table.loc[table["error"].idxmin()]
        if len(found["depth"]) == len(best["depth"]):
            break
        best = found
    return Choice(best["depth"], float(best["alpha"]), table)
