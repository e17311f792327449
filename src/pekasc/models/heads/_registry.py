"""Registry of expression heads: choose a setting on held-out groups, then fit on all training spots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pekasc._expression import Matrix
from pekasc.models.heads._moments import moments
from pekasc.models.heads._projection import Projection
from pekasc.models.heads._ridge import ALPHAS, FoldFit, RidgeHead, alpha_per_gene, fit_ridge
from pekasc.models.heads._split import Split
from pekasc.models.runtime import Registry


class Head(Protocol):
    """A fitted head."""

    @property
    def projection(self) -> Projection:
        """Standardisation and PCA that come first."""
        ...

    def predict(self, features: np.ndarray, genes: slice = slice(None)) -> np.ndarray:
        """Predict expression, (n, genes) float32, from features (n, d), for all genes or a slice of them."""
        ...


@dataclass(frozen=True)
class FoldData:
    """Features and expression of the training and held-out spots of one inner fold.

    Subsets are made on access: those of all folds at once would be several copies of the data.

    Parameters
    ----------
    features, expression
        Of all training spots, (n, d) and (n, genes). Features are from an encoder that was not trained on the held-out
        spots.
    fold
        Training and held-out spots.
    """

    features: np.ndarray
    expression: Matrix
    fold: Split

    @property
    def x(self) -> np.ndarray:
        """Features of the training spots."""
        return self.features[self.fold.train]

    @property
    def y(self) -> Matrix:
        """Expression of the training spots."""
        return self.expression[self.fold.train]

    @property
    def x_held_out(self) -> np.ndarray:
        """Features of the held-out spots."""
        return self.features[self.fold.held_out]

    @property
    def y_held_out(self) -> Matrix:
        """Expression of the held-out spots."""
        return self.expression[self.fold.held_out]

    @property
    def n_held_out(self) -> int:
        """Number of held-out spots."""
        return len(self.fold.held_out)


class HeadMethod(Protocol):
    """A kind of head, to be registered in `HEADS`."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> Any:
        """Return the setting with the smallest held-out error."""
        ...

    def fit(self, x: np.ndarray, y: Matrix, n_components: int | None, setting: Any, random_state: int) -> Head:
        """Fit the head on all training spots with the chosen setting."""
        ...


def _fold_fits(folds: Sequence[FoldData], n_components: int | None) -> list[FoldFit]:
    fits = []
    for data in folds:
        fit = fit_ridge(data.features, data.expression, n_components, data.fold.train)
        held_out = moments(data.features, data.expression, rows=data.fold.held_out, projected=fit.projection)
        fits.append(FoldFit(fit, held_out))
    return fits


@dataclass(frozen=True)
class Ridge:
    """Ridge with one penalty for all genes; also used to choose depth and epochs for every head."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> float:
        """Return the penalty with the smallest relative error, mean over folds weighted by held-out spots."""
        weights = [fold.n_held_out for fold in folds]
        errors = [fit.relative_errors(ALPHAS) for fit in _fold_fits(folds, n_components)]
        return float(ALPHAS[np.average(errors, axis=0, weights=weights).argmin()])

    def fit(self, x: np.ndarray, y: Matrix, n_components: int | None, setting: Any, random_state: int) -> RidgeHead:
        """Return the head for the chosen penalty (or penalties)."""
        return fit_ridge(x, y, n_components).head(setting)


class RidgePerGene(Ridge):
    """Ridge with a penalty per gene."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> Any:
        """Return for every gene the penalty with the smallest squared error over all held-out spots, (genes,)."""
        return alpha_per_gene(_fold_fits(folds, n_components))


HEADS: Registry[HeadMethod] = Registry("head", {"ridge": Ridge(), "ridge-per-gene": RidgePerGene()})


def check_head(head: str) -> HeadMethod:
    """Return the kind of head of that name.

    Raises
    ------
    ValueError
        If there is no head of that name.
    """
    return HEADS.find("head", head)


def fit_rows(head: str, data: FoldData, n_components: int | None, setting: Any, random_state: int) -> Head:
    """Fit a head on the training spots of a fold; for ridge without copying their features."""
    method = check_head(head)
    if isinstance(method, Ridge):
        return fit_ridge(data.features, data.expression, n_components, data.fold.train).head(setting)
    return method.fit(data.x, data.y, n_components, setting, random_state)
