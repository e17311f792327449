"""Ridge regression on standardised principal components; all penalties are scored in closed form from moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pekasc._expression import Matrix
from pekasc.models.heads._moments import Moments, moments
from pekasc.models.heads._projection import Projection, n_components_for, projection_of_moments, projection_of_rows
from pekasc.models.heads._split import Split

ALPHAS = np.logspace(-2, 3, 16)


@dataclass(frozen=True)
class RidgeFit:
    """Sufficient statistics of the training spots for ridge with any penalty, since PCA scores are orthogonal.

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

    def coef(self, alpha: float | np.ndarray) -> np.ndarray:
        """Return coefficients (k, genes) for the penalty `alpha` per training spot, one or one per gene."""
        return self.cross / np.add.outer(self.variances, alpha).reshape(len(self.variances), -1)

    def columns(self, which: slice) -> RidgeFit:
        """Return the fit of some columns of the expression."""
        return RidgeFit(self.projection, self.variances, self.cross[:, which], self.intercept[which])

    def _residual(self, held_out: Moments) -> tuple[np.ndarray, np.ndarray]:
        """Return sums over held-out spots of r ** 2 (genes,) and z * r (k, genes) for ``r = y - intercept``."""
        m = self.intercept
        squares = held_out.yy - 2 * m * held_out.y + held_out.n * m**2
        return squares, held_out.xy - np.outer(held_out.x, m)

    def errors(self, held_out: Moments, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the sum of squared errors per penalty and gene on held-out spots, shape (alphas, genes).

        In closed form, ``sum (y - z b - m)**2 = sum r**2 - 2 b' z' r + b' z' z b`` with ``r = y - m``: the cost per
        penalty does not depend on the number of spots.

        Parameters
        ----------
        held_out
            Moments of the held-out spots' scores (after the projection) and expression.
        alphas
            Penalties; ``np.inf`` is the mean predictor.
        """
        squares, z_residual = self._residual(held_out)
        out = np.empty((len(alphas), len(squares)))
        for i, alpha in enumerate(alphas):
            b = self.coef(alpha)
            out[i] = squares - 2 * np.einsum("kg,kg->g", b, z_residual) + np.einsum("kg,kg->g", b, held_out.xx @ b)
        return out

    def squared_error(self, held_out: Moments, alpha: np.ndarray) -> float:
        """Return the sum of squared errors over genes on held-out spots, with a penalty per gene, (genes,)."""
        squares, z_residual = self._residual(held_out)
        b = self.coef(alpha)
        return float((squares - 2 * (b * z_residual).sum(axis=0) + (b * (held_out.xx @ b)).sum(axis=0)).sum())

    def total_errors(self, held_out: Moments, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return :meth:`errors` summed over genes, shape (alphas,), at a cost nearly independent of their number.

        ``sum_g b' H b`` is ``sum_kl H_kl (c c')_kl / ((v_k + a)(v_l + a))``: genes are summed once, before any penalty.
        """
        squares, z_residual = self._residual(held_out)
        weighted = held_out.xx * (self.cross @ self.cross.T)
        linear = np.einsum("kg,kg->k", self.cross, z_residual)
        shrink = 1 / np.add.outer(np.asarray(alphas, dtype=np.float64), self.variances)
        return np.asarray(squares.sum() - 2 * shrink @ linear + np.einsum("ak,kl,al->a", shrink, weighted, shrink))


def _ridge(projection: Projection, scores: Moments) -> RidgeFit:
    """Return the fit from the moments of the training spots' scores, which have mean 0."""
    intercept = scores.y / scores.n
    cross = (scores.xy - np.outer(scores.x, intercept)) / scores.n
    return RidgeFit(projection, np.diag(scores.xx) / scores.n, cross, intercept)


def fit_ridge(
    features: np.ndarray,
    y: Matrix,
    n_components: int | None = None,
    weights: np.ndarray | None = None,
) -> RidgeFit:
    """Fit standardisation, PCA and the moments for ridge on training spots.

    Parameters
    ----------
    features
        Shape (n, d).
    y
        Expression, shape (n, genes), dense or CSR.
    n_components
        See :func:`n_components_for`.
    weights
        Weight of every spot, (n,); 1 by default.
    """
    n, d = features.shape
    k = n_components_for(n, d, n_components)
    if n > d:
        sums = moments(features, y, features.mean(axis=0, dtype=np.float64), weights=weights)
        projection = projection_of_moments(sums, k)
        return _ridge(projection, projection.scores(sums))
    projection = projection_of_rows(features, k, weights)
    return _ridge(projection, moments(features, y, projected=projection, weights=weights))


@dataclass(frozen=True)
class FoldFit:
    """Ridge of one inner fold: the fit on its training spots, and the moments of its held-out ones.

    Parameters
    ----------
    fit
        Fitted on the training spots.
    held_out
        Moments of the held-out spots' scores and expression.
    parts
        Those of every panel's held-out spots, which add up to `held_out`; empty without panels.
    """

    fit: RidgeFit
    held_out: Moments
    parts: tuple[Moments, ...] = ()

    def total_errors(self, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the squared error per penalty, summed over genes, and last that of the mean predictor."""
        return self.fit.total_errors(self.held_out, [*alphas, np.inf])

    def relative_errors(self, alphas: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the squared error per penalty, summed over genes and relative to the mean predictor, (alphas,)."""
        errors = self.total_errors(alphas)
        return errors[:-1] / errors[-1] if errors[-1] > 0 else np.ones(len(alphas))


def fit_folds(
    features: np.ndarray,
    y: Matrix,
    folds: Sequence[Split],
    n_components: int | None = None,
    weights: np.ndarray | None = None,
    panel: np.ndarray | None = None,
) -> list[FoldFit]:
    """Fit ridge on every inner fold's training spots.

    With more spots than features, the moments of a fold's training spots are those of all spots minus those left out,
    so that every fold costs one pass over its held-out spots.

    Parameters
    ----------
    features
        Features of all training spots, shape (n, d).
    y
        Expression of all training spots, shape (n, genes).
    folds
        Training and held-out spots of every fold.
    n_components
        See :func:`n_components_for`.
    weights
        Weight of every spot, (n,); 1 by default.
    panel
        Number of the panel of every spot, (n,), for moments of the held-out spots of each.
    """
    n, d = features.shape
    total = None
    if min(len(fold.train) for fold in folds) > d:
        shift = features.mean(axis=0, dtype=np.float64)
        total = moments(features, y, shift, weights=weights)
    fits = []
    for fold in folds:
        k = n_components_for(len(fold.train), d, n_components)
        if total is None:
            own = None if weights is None else weights[fold.train]
            projection = projection_of_rows(features[fold.train], k, own)
            train = moments(features, y, rows=fold.train, projected=projection, weights=weights)
            parts = [
                moments(features, y, rows=rows, projected=projection, weights=weights)
                for rows in _by_panel(fold.held_out, panel)
            ]
        else:
            sums = [moments(features, y, shift, rows, weights=weights) for rows in _by_panel(fold.held_out, panel)]
            rest = total - _added(sums)
            margin = np.setdiff1d(np.arange(n), np.concatenate([fold.train, fold.held_out]), assume_unique=True)
            if margin.size:
                rest = rest - moments(features, y, shift, margin, weights=weights)
            projection = projection_of_moments(rest, k)
            train, parts = projection.scores(rest), [projection.scores(part) for part in sums]
        fits.append(FoldFit(_ridge(projection, train), _added(parts), () if panel is None else tuple(parts)))
    return fits


def _by_panel(rows: np.ndarray, panel: np.ndarray | None) -> list[np.ndarray]:
    return [rows] if panel is None else [rows[panel[rows] == i] for i in range(int(panel.max()) + 1)]


def _added(parts: Sequence[Moments]) -> Moments:
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def alpha_per_gene(fits: Sequence[FoldFit]) -> np.ndarray:
    """Return for every gene the penalty with the smallest squared error over all held-out spots, shape (genes,)."""
    errors = np.sum([f.fit.errors(f.held_out, ALPHAS) for f in fits], axis=0)
    return ALPHAS[errors.argmin(axis=0)]
