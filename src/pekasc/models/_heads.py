"""The expression head: standardise, PCA, ridge; every penalty at once from held-out Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA

from pekasc._expression import Matrix

ALPHAS = np.logspace(-2, 3, 16)


def n_components_for(n_spots: int, n_features: int, n_components: int | None) -> int:
    """Return the number of principal components: ``min(256, n - 1, d)``, or `n_components` if it fits.

    Raises
    ------
    ValueError
        If `n_components` was given and the training spots or features cannot support it.
    """
    limit = min(n_spots - 1, n_features)
    if n_components is None:
        return min(256, limit)
    if not 1 <= n_components <= limit:
        raise ValueError(
            f"`n_components={n_components}` does not fit {n_spots} training spots with {n_features} features: "
            f"give 1 to {limit}, or None to adapt."
        )
    return n_components


@dataclass(frozen=True)
class Projection:
    """Standardisation followed by PCA, fitted on training spots.

    Parameters
    ----------
    mean, scale
        Per feature, shape (d,).
    components
        Principal axes, shape (k, d).
    """

    mean: np.ndarray
    scale: np.ndarray
    components: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return scores (n, k), float64."""
        return ((features - self.mean) / self.scale) @ self.components.T


def fit_projection(features: np.ndarray, n_components: int) -> tuple[Projection, np.ndarray]:
    """Fit :class:`Projection` on (n, d) `features`; return it with the scores of these (n, k), float64."""
    x = np.asarray(features, dtype=np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    # a feature that never varies carries nothing: it becomes 0 instead of infinite
    scale[scale <= 1e-12 * np.maximum(1.0, np.abs(mean))] = 1.0
    x = (x - mean) / scale
    # the covariance is the smaller matrix where there are more spots than features
    solver = "covariance_eigh" if x.shape[0] > x.shape[1] else "full"
    pca = PCA(n_components, svd_solver=solver).fit(x)
    projection = Projection(mean, scale, np.ascontiguousarray(pca.components_))
    return projection, x @ projection.components.T


@dataclass(frozen=True)
class RidgeHead:
    """Linear map from features to expression.

    Parameters
    ----------
    projection
        Standardisation and PCA.
    coef
        Shape (k, genes).
    intercept
        Shape (genes,): the mean over training spots.
    alpha
        Penalty per training spot: the fit minimises mean squared error + alpha * ``||coef||**2``.
    """

    projection: Projection
    coef: np.ndarray
    intercept: np.ndarray
    alpha: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return predicted expression (n, genes), float32, for (n, d) `features`."""
        return (self.projection(features) @ self.coef + self.intercept).astype(np.float32)


def _column_sum(y: Matrix, power: int = 1) -> np.ndarray:
    """Return sums of y ** power, in double precision from the start: over many spots a sum of float32 drifts."""
    if sparse.issparse(y):
        return np.bincount(y.indices, y.data.astype(np.float64) ** power, minlength=y.shape[1])
    return (y.astype(np.float64) ** power).sum(axis=0)


def _cross(z: np.ndarray, y: Matrix) -> np.ndarray:
    """Return z.T @ y without making a sparse y dense."""
    return np.asarray((y.T @ z).T, dtype=np.float64)


@dataclass(frozen=True)
class RidgeFit:
    """What ridge needs of the training spots, whatever the penalty: scores are orthogonal after PCA.

    Parameters
    ----------
    projection
        See :class:`Projection`.
    variances
        Mean square of every score, shape (k,).
    cross
        Mean of score times centred expression, shape (k, genes).
    intercept
        Mean expression, shape (genes,).
    """

    projection: Projection
    variances: np.ndarray
    cross: np.ndarray
    intercept: np.ndarray

    def coef(self, alpha: float) -> np.ndarray:
        """Return coefficients (k, genes) for the penalty `alpha` per training spot."""
        return self.cross / (self.variances + alpha)[:, None]

    def head(self, alpha: float) -> RidgeHead:
        """Return the head for one penalty."""
        return RidgeHead(self.projection, self.coef(alpha), self.intercept, float(alpha))

    def errors(self, features: np.ndarray, y: Matrix, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the sum of squared errors per penalty and gene on held-out spots, shape (alphas, genes).

        Closed form from the held-out spots' Gram matrices, so that the cost of a penalty does not grow with them:
        ``sum (y - z b - m)**2 = sum r**2 - 2 b' z' r + b' z' z b`` with ``r = y - m``.
        """
        z = self.projection(features)
        gram, z_sum = z.T @ z, z.sum(axis=0)
        n, y_sum = y.shape[0], _column_sum(y)
        residual_squares = _column_sum(y, power=2) - 2 * self.intercept * y_sum + n * self.intercept**2
        z_residual = _cross(z, y) - np.outer(z_sum, self.intercept)
        out = np.empty((len(alphas), y.shape[1]))
        for i, alpha in enumerate(alphas):
            b = self.coef(alpha)
            out[i] = residual_squares - 2 * np.einsum("kg,kg->g", b, z_residual) + np.einsum("kg,kg->g", b, gram @ b)
        return out


def fit_ridge(features: np.ndarray, y: Matrix, n_components: int | None = None) -> RidgeFit:
    """Fit standardisation, PCA and the moments for ridge on training spots.

    Parameters
    ----------
    features
        Shape (n, d).
    y
        Expression, shape (n, genes), dense or CSR.
    n_components
        See :func:`n_components_for`.
    """
    k = n_components_for(features.shape[0], features.shape[1], n_components)
    projection, z = fit_projection(features, k)
    n = z.shape[0]
    intercept = _column_sum(y) / n
    cross = (_cross(z, y) - np.outer(z.sum(axis=0), intercept)) / n
    return RidgeFit(projection, np.square(z).mean(axis=0), cross, intercept)
