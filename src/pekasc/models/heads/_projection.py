"""Standardisation and PCA of the features, before every head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pekasc.models.heads._moments import Moments


def n_components_for(n_spots: int, n_features: int, n_components: int | None, name: str = "n_components") -> int:
    """Return the number of principal components: ``min(256, n - 1, d)``, or `n_components` if it is not too large.

    `name` is the name of the argument in an error.

    Raises
    ------
    ValueError
        If `n_components` is given and larger than the number of training spots or features allows.
    """
    limit = min(n_spots - 1, n_features)
    if n_components is None:
        return min(256, limit)
    if not 1 <= n_components <= limit:
        raise ValueError(
            f"`{name}={n_components}` does not fit {n_spots} training spots with {n_features} features: "
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

    def scores(self, sums: Moments) -> Moments:
        """Return the moments of scores from those of features."""
        return sums.mapped(self.mean, (self.components / self.scale).T)


def _safe_scale(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    # a constant feature becomes 0 and not infinite. The tolerance is that of a standard deviation from sums of squares,
    # which has half of the digits
    return np.where(deviation <= 1e-7 * np.maximum(1.0, np.abs(mean)), 1.0, deviation)


def _not_finite(which: str, n: float) -> ValueError:
    return ValueError(
        f"Features of {which} of {n:g} spots are NaN or infinite: check the encoder's weights and tiles, or take "
        '`Compute(precision="fp32")`.'
    )


def projection_of_rows(features: np.ndarray, n_components: int, weights: np.ndarray | None = None) -> Projection:
    """Fit :class:`Projection` on (n, d) `features`, for fewer spots than features.

    It is computed from the eigenvectors of the spots' inner products, in a third of the time of an SVD. Components
    whose standard deviation is below 1e-5 of the largest are set to 0.
    """
    x = np.asarray(features, dtype=np.float64)
    mean = np.average(x, axis=0, weights=weights)
    deviation = x.std(axis=0) if weights is None else np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    scale = _safe_scale(mean, deviation)
    z = (x - mean) / scale
    if not np.isfinite(z).all():
        raise _not_finite(str(int((~np.isfinite(x)).any(axis=1).sum())), len(x))
    if weights is not None:
        z *= np.sqrt(weights)[:, None]
    values, vectors = np.linalg.eigh(z @ z.T)
    values, vectors = values[::-1][:n_components], vectors[:, ::-1][:, :n_components]  # eigh gives the smallest first
    varies = values > 1e-10 * values[0]
    length = np.sqrt(np.where(varies, values, 1.0))
    return Projection(mean, scale, np.where(varies, vectors / length, 0.0).T @ z)


def projection_of_moments(train: Moments, n_components: int) -> Projection:
    """Fit :class:`Projection` from the moments of the training spots, for more spots than features."""
    covariance = train.covariance()
    if not np.isfinite(covariance).all():
        raise _not_finite("some", train.n)  # sums do not tell which
    scale = _safe_scale(train.mean, np.sqrt(np.maximum(np.diag(covariance), 0)))
    _, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    # eigh gives the smallest first
    return Projection(train.mean, scale, np.ascontiguousarray(vectors[:, ::-1][:, :n_components].T))
