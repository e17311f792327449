"""Sums over spots from which ridge is fitted. Sums of groups add up, so that folds need no further pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from pekasc._expression import Matrix


@dataclass(frozen=True)
class Moments:
    """First and second moments, as sums, of features x (minus a constant `shift`) and expression y.

    Parameters
    ----------
    shift
        Constant subtracted from the features before summing, shape (d,): near their mean, for numerical precision of
        differences of sums. Results do not depend on it.
    n
        Number of spots, or the sum of their weights. Every other sum is weighted alike.
    x, xx
        Sum of x, shape (d,), and of its outer products, shape (d, d).
    y, yy
        Sum of y and of its squares, shape (genes,).
    xy
        Sum of products, shape (d, genes).
    """

    shift: np.ndarray
    n: float
    x: np.ndarray
    xx: np.ndarray
    y: np.ndarray
    yy: np.ndarray
    xy: np.ndarray

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments of the spots of `self` without those of `other`."""
        return Moments(
            self.shift,
            self.n - other.n,
            self.x - other.x,
            self.xx - other.xx,
            self.y - other.y,
            self.yy - other.yy,
            self.xy - other.xy,
        )

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of the spots of `self` and `other`."""
        return Moments(
            self.shift,
            self.n + other.n,
            self.x + other.x,
            self.xx + other.xx,
            self.y + other.y,
            self.yy + other.yy,
            self.xy + other.xy,
        )

    @property
    def mean(self) -> np.ndarray:
        """Mean features, shape (d,)."""
        return self.shift + self.x / self.n

    def columns(self, which: slice) -> Moments:
        """Return the moments of x and some columns of y."""
        return Moments(self.shift, self.n, self.x, self.xx, self.y[which], self.yy[which], self.xy[:, which])

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


_BYTES = 2**27  # of a chunk of spots in double precision
_DENSE = 0.04  # share of stored values from which a dense product is faster than a sparse one


def _is_dense(y: Matrix) -> bool:
    return not sparse.issparse(y) or y.nnz > _DENSE * y.shape[0] * y.shape[1]


def _rows_at_once(d: int, n_genes: int, *, dense: bool) -> int:
    width = d + (n_genes if dense else n_genes // 20)
    return max(256, min(32_768, _BYTES // (8 * max(1, width))))


def column_sum(y: Matrix, power: int = 1, weights: np.ndarray | None = None) -> np.ndarray:
    """Return (weighted) sums of y ** power, accumulated in double precision: over many spots, float32 sums drift."""
    if weights is not None:
        powers = y.power(power) if sparse.issparse(y) else y.astype(np.float64) ** power
        return np.asarray(powers.T @ weights, dtype=np.float64)
    if sparse.issparse(y):
        return np.bincount(y.indices, y.data.astype(np.float64) ** power, minlength=y.shape[1])
    return (y.astype(np.float64) ** power).sum(axis=0)


def moments(
    features: np.ndarray,
    y: Matrix,
    shift: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    projected: Callable[[np.ndarray], np.ndarray] | None = None,
    weights: np.ndarray | None = None,
) -> Moments:
    """Return the moments of spots, from one pass in chunks, without copying features or expression as a whole.

    Parameters
    ----------
    features
        Shape (n, d).
    y
        Expression, shape (n, genes), dense or CSR; a sparse matrix is dense only within a chunk.
    shift
        See :class:`Moments`; none by default.
    rows
        Which spots; all by default.
    projected
        Function from features to x; the identity by default.
    weights
        Weight of every spot, (n,) float64; 1 by default.
    """
    n = features.shape[0] if rows is None else len(rows)
    dense = _is_dense(y)  # of all spots, so that a dense part of a sparse matrix does not outgrow its chunk
    step, out = _rows_at_once(features.shape[1], y.shape[1], dense=dense), None
    for start in range(0, max(n, 1), step):
        part: Any = slice(start, start + step) if rows is None else rows[start : start + step]
        x = features[part] if projected is None else projected(features[part])
        more = _moments(x, y[part], shift, None if weights is None else weights[part], dense=dense)
        out = more if out is None else out + more
    assert out is not None  # for the type checker: the loop runs at least once
    return out


def _moments(x: np.ndarray, y: Matrix, shift: np.ndarray | None, weights: np.ndarray | None, *, dense: bool) -> Moments:
    shift = np.zeros(x.shape[1]) if shift is None else shift
    x = x.astype(np.float64) - shift
    wx = x if weights is None else x * weights[:, None]
    if dense:
        xy = wx.T @ (y.toarray() if sparse.issparse(y) else y)
    else:
        xy = np.asarray((y.T @ wx).T, dtype=np.float64)
    n = len(x) if weights is None else float(weights.sum())
    sums = column_sum(y, 1, weights), column_sum(y, 2, weights)
    return Moments(shift, n, wx.sum(axis=0), wx.T @ x, *sums, xy)
