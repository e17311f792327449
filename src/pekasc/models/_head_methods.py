"""Expression heads behind one interface: choose a setting on held-out groups, fit on all training spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pekasc._expression import Matrix, dense
from pekasc.models._folds import InnerFold
from pekasc.models._heads import ALPHAS, FoldFit, Projection, RidgeHead, alpha_per_gene, fit_ridge
from pekasc.models._mlp import MAX_EPOCHS, MlpHead, fit_mlp
from pekasc.models._moments import moments


class Head(Protocol):
    """A fitted head."""

    @property
    def projection(self) -> Projection:
        """Standardisation and PCA that come first."""
        ...

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return predicted expression (n, genes), float32, for (n, d) features."""
        ...


@dataclass(frozen=True)
class FoldData:
    """Features and expression of one inner fold: of its training spots, and of its held-out ones.

    Parameters
    ----------
    x, y
        Of the training spots, (n, d) and (n, genes).
    x_held_out, y_held_out
        Of the held-out spots. Features come from an encoder that never trained on those.
    """

    x: np.ndarray
    y: Matrix
    x_held_out: np.ndarray
    y_held_out: Matrix

    @classmethod
    def of(cls, x: np.ndarray, y: Matrix, fold: InnerFold) -> FoldData:
        """Return the part of a fold from features and expression of all training spots."""
        return cls(x[fold.train], y[fold.train], x[fold.held_out], y[fold.held_out])


class HeadMethod(Protocol):
    """A kind of head."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> Any:
        """Return the setting with the smallest held-out error."""
        ...

    def fit(self, x: np.ndarray, y: Matrix, n_components: int | None, setting: Any, random_state: int) -> Head:
        """Fit on all training spots with a setting that was chosen."""
        ...


def _fold_fits(folds: Sequence[FoldData], n_components: int | None) -> list[FoldFit]:
    fits = [fit_ridge(fold.x, fold.y, n_components) for fold in folds]
    return [
        FoldFit(fit, moments(fit.projection(fold.x_held_out), fold.y_held_out))
        for fit, fold in zip(fits, folds, strict=True)
    ]


class Ridge:
    """Ridge with one penalty for all genes: the one that the selection rule measures everything with."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> float:
        """Return the penalty with the smallest relative error, mean over folds weighted by held-out spots."""
        weights = [len(fold.x_held_out) for fold in folds]
        errors = [fit.relative_errors(ALPHAS) for fit in _fold_fits(folds, n_components)]
        return float(ALPHAS[np.average(errors, axis=0, weights=weights).argmin()])

    def fit(self, x: np.ndarray, y: Matrix, n_components: int | None, setting: Any, random_state: int) -> RidgeHead:
        """Return the head for the chosen penalty (or penalties)."""
        return fit_ridge(x, y, n_components).head(setting)


class RidgePerGene(Ridge):
    """Ridge with a penalty for every gene."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> Any:
        """Return every gene's penalty with the smallest squared error over all held-out spots, (genes,)."""
        return alpha_per_gene(_fold_fits(folds, n_components))


class Mlp:
    """A perceptron with two hidden layers; the number of epochs is chosen."""

    def choose(self, folds: Sequence[FoldData], n_components: int | None, random_state: int) -> int:
        """Return the number of epochs with the smallest relative error, mean over folds weighted by spots."""
        errors = np.zeros((len(folds), MAX_EPOCHS))
        for i, fold in enumerate(folds):
            measured = dense(fold.y_held_out)
            base = float(np.square(measured - np.asarray(fold.y.mean(axis=0)).ravel()).sum()) or 1.0

            def measure(
                epoch: int, head: MlpHead, i: int = i, fold: FoldData = fold, y: Any = measured, base: float = base
            ) -> None:
                errors[i, epoch - 1] = float(np.square(head.predict(fold.x_held_out) - y).sum()) / base

            fit_mlp(fold.x, fold.y, n_components, MAX_EPOCHS, random_state, measure)
        weights = [len(fold.x_held_out) for fold in folds]
        return int(np.average(errors, axis=0, weights=weights).argmin()) + 1

    def fit(self, x: np.ndarray, y: Matrix, n_components: int | None, setting: Any, random_state: int) -> MlpHead:
        """Train for the chosen number of epochs."""
        return fit_mlp(x, y, n_components, int(setting), random_state)


HEADS: Mapping[str, HeadMethod] = {"ridge": Ridge(), "ridge-per-gene": RidgePerGene(), "mlp": Mlp()}


def check_head(head: str) -> HeadMethod:
    """Return the head method of a name.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if head not in HEADS:
        raise ValueError(f"`head={head!r}` is not known. Choose one of {list(HEADS)}.")
    return HEADS[head]
