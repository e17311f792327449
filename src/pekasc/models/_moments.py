"""Sums over spots from which ridge follows: those of two groups add up to those of both, so folds cost no pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from pekasc._expression import Matrix


@dataclass(frozen=True)
class Moments:
    """First and second moments, as sums, of features x (less a constant `shift`) and expression y.

    Parameters
    ----------
    shift
        What was taken off the features before summing, shape (d,): near their mean, so that differences of sums keep
        their digits. Results do not depend on it.
    n
        Number of spots.
    x, xx
        Sum of x, shape (d,), and of its outer products, shape (d, d).
    y, yy
        Sum of y and of its squares, shape (genes,).
    xy
        Sum of products, shape (d, genes).
    """

    shift: np.ndarray
    n: int
    x: np.ndarray
    xx: np.ndarray
    y: np.ndarray
    yy: np.ndarray
    xy: np.ndarray

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments of the spots of `self` that are not among those of `other`."""
        return Moments(
            self.shift,
            self.n - other.n,
            self.x - other.x,
            self.xx - other.xx,
            self.y - other.y,
            self.yy - other.yy,
            self.xy - other.xy,
        )

    @property
    def mean(self) -> np.ndarray:
        """Mean features, shape (d,)."""
        return self.shift + self.x / self.n

    def covariance(self) -> np.ndarray:
        """Return the covariance of the features (n in the denominator), shape (d, d)."""
        x = self.x / self.n
        return self.xx / self.n - np.outer(x, x)

    def mapped(self, mean: np.ndarray, matrix: np.ndarray) -> Moments:
        """Return the moments of ``z = (x - mean) @ matrix`` and y; `matrix` has shape (d, k)."""
        offset = self.shift - mean
        x = self.x + self.n * offset
        xx = self.xx + np.outer(offset, self.x) + np.outer(self.x, offset) + self.n * np.outer(offset, offset)
        xy = matrix.T @ self.xy + np.outer(matrix.T @ offset, self.y)
        return Moments(np.zeros(matrix.shape[1]), self.n, x @ matrix, matrix.T @ xx @ matrix, self.y, self.yy, xy)


_ROWS = 32_768


def column_sum(y: Matrix, power: int = 1) -> np.ndarray:
    """Return sums of y ** power, in double precision from the start: over many spots a sum of float32 drifts."""
    if sparse.issparse(y):
        return np.bincount(y.indices, y.data.astype(np.float64) ** power, minlength=y.shape[1])
    return (y.astype(np.float64) ** power).sum(axis=0)


def moments(features: np.ndarray, y: Matrix, shift: np.ndarray | None = None) -> Moments:
    """Return the moments of some spots.

    Parameters
    ----------
    features
        Shape (n, d).
    y
        Expression, shape (n, genes), dense or CSR; a sparse matrix stays sparse.
    shift
        See :class:`Moments`; none by default.
    """
    n, d = features.shape
    shift = np.zeros(d) if shift is None else shift
    sums, xx, xy = np.zeros(d), np.zeros((d, d)), np.zeros((d, y.shape[1]))
    for start in range(0, n, _ROWS):  # in parts: double precision of everything would be another copy, twice as large
        part = slice(start, start + _ROWS)
        x = features[part].astype(np.float64) - shift
        sums += x.sum(axis=0)
        xx += x.T @ x
        xy += np.asarray((y[part].T @ x).T if sparse.issparse(y) else x.T @ y[part], dtype=np.float64)
    return Moments(shift, n, sums, xx, column_sum(y), column_sum(y, power=2), xy)
