"""Choose depth and penalty by the held-out error; the same code for frozen encoder and adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pekasc._expression import Matrix
from pekasc.models._folds import InnerFold
from pekasc.models._heads import ALPHAS, fit_folds

Depth = tuple[int, ...] | None  # block(s) whose features are taken; None is the encoder's own output

MAX_DEPTHS = 12


def candidate_depths(n_blocks: int) -> list[Depth]:
    """Return every block, or twelve evenly spaced ones of a deeper encoder; the last is always among them."""
    depths = np.unique(np.rint(np.linspace(n_blocks, 1, min(n_blocks, MAX_DEPTHS))).astype(int))
    return [(int(depth),) for depth in depths]


def held_out_errors(
    features: np.ndarray,
    y: Matrix,
    folds: Sequence[InnerFold],
    n_components: int | None,
    alphas: Sequence[float] | np.ndarray = ALPHAS,
) -> np.ndarray:
    """Return the held-out error per fold and penalty, shape (folds, alphas): squared error over the mean predictor's.

    Summed over genes before the division, so that genes count by how much they vary; 1 is what predicting every
    gene's training mean reaches.

    Parameters
    ----------
    features
        Features of all training spots, shape (n, d).
    y
        Expression of all training spots, shape (n, genes).
    folds
        Which of them train and which are held out.
    n_components
        See :func:`pekasc.models._heads.n_components_for`.
    alphas
        Penalties.
    """
    return np.array([f.relative_errors(alphas) for f in fit_folds(features, y, folds, n_components)])


@dataclass(frozen=True)
class Choice:
    """What the held-out error chose among frozen features.

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
    features: Mapping[Depth, np.ndarray], y: Matrix, folds: Sequence[InnerFold], n_components: int | None
) -> Choice:
    """Return depth and penalty with the smallest held-out error, mean over folds weighted by held-out spots."""
    weights = np.array([len(fold.held_out) for fold in folds], dtype=np.float64)
    rows = []
    for depth, x in features.items():
        error = np.average(held_out_errors(x, y, folds, n_components), axis=0, weights=weights)
        rows += [{"depth": depth, "alpha": a, "error": e} for a, e in zip(ALPHAS, error, strict=True)]
    table = pd.DataFrame(rows)
    best = table.loc[table["error"].idxmin()]
    return Choice(best["depth"], float(best["alpha"]), table)
