"""What a head is fitted on, and its fits on inner folds: ridge with one penalty, or with one per gene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pekasc._expression import Matrix
from pekasc._panels import Panels
from pekasc.models.heads._linear import Block, Source, linear_block
from pekasc.models.heads._ridge import ALPHAS, FoldFit, RidgeFit, alpha_per_gene, fit_folds, fit_ridge
from pekasc.models.heads._split import Split
from pekasc.models.runtime import processes


@dataclass(frozen=True)
class Target:
    """What heads predict, for all training spots.

    Parameters
    ----------
    expression
        The genes to predict, (n, genes).
    folds
        Inner folds.
    every
        All expressed genes, (n, all genes), whose principal components a low-rank head predicts; None is `expression`.
    weights
        Weight of every spot for a low-rank head, (n,); 1 by default.
    rank
        Number of components of a low-rank head; None tries several.
    panels
        Which spots measured which of the genes to predict; None: all measured all. `expression` is 0 where a gene was
        not measured, and all of `every` were measured in all spots.
    """

    expression: Matrix
    folds: Sequence[Split]
    every: Matrix | None = None
    weights: np.ndarray | None = None
    rank: int | None = None
    panels: Panels | None = None


@dataclass(frozen=True)
class Inputs:
    """Inputs of a head at one depth. Arrays are made on access: those of all folds at once would be several copies.

    Parameters
    ----------
    whole
        Function that returns those of all training spots, (n, d).
    fold
        Function that returns those for an inner fold, whose features are of an adapter that was not trained on the
        held-out spots, or whose context does not cross folds. None: they are those of `whole`.
    """

    whole: Callable[[], np.ndarray]
    fold: Callable[[int], np.ndarray] | None = None

    def of(self, fold: int | None) -> np.ndarray:
        """Return the inputs for a fold, or for the final fit (None)."""
        return self.whole() if fold is None or self.fold is None else self.fold(fold)


@dataclass(frozen=True)
class Tried:
    """Fits of one head on the inputs of one depth.

    Parameters
    ----------
    folds
        Fit of every inner fold, for the head's ``block``.
    errors
        Squared error of every setting on the held-out spots, relative to the mean predictor, (folds, settings); NaN in
        a fold that says nothing, since none of its genes was measured in training and held-out spots.
    alphas
        Penalty of every gene, for a head that has one for each.
    squares
        Squared error of the mean predictor, (folds,).
    parts
        Those of every set of genes that the same spots measured, where there are several.
    """

    folds: Sequence[Any]
    errors: np.ndarray
    alphas: np.ndarray | None = None
    squares: np.ndarray | None = None
    parts: Sequence[Tried] = ()


def fold_fits(
    inputs: Inputs, folds: Sequence[Split], targets: Callable[[int | None], Matrix], n_components: int | None,
    weights: np.ndarray | None = None, panel: np.ndarray | None = None,
) -> list[FoldFit]:  # fmt: skip
    """Fit ridge on every inner fold; `targets` returns the target of a fold, or those of all (None) side by side."""
    if inputs.fold is None:
        return fit_folds(inputs.whole(), targets(None), folds, n_components, weights, panel)
    return [
        fit_folds(inputs.fold(i), targets(i), [fold], n_components, weights, panel)[0] for i, fold in enumerate(folds)
    ]


def relative(errors: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return squared errors, (folds, settings), over those of the mean predictor, (folds,); 1 where those are 0."""
    known = squares[:, None] > 0
    return np.divide(errors, squares[:, None], out=np.ones(errors.shape), where=known)


class RidgeFits:
    """Ridge with one penalty for all genes."""

    shares_output = False
    takes_panels = False

    def __init__(self, target: Target, n_components: int | None = None) -> None:
        self.target, self.n_components = target, n_components
        self.settings: list[tuple[int | None, float]] = [(None, float(alpha)) for alpha in ALPHAS]

    def _fold_fits(self, inputs: Inputs) -> list[FoldFit]:
        y = self.target.expression
        return fold_fits(inputs, self.target.folds, lambda fold: y, self.n_components)

    def tried(self, inputs: Inputs) -> Tried:
        """Fit on every inner fold."""
        fits = self._fold_fits(inputs)
        errors = np.array([f.total_errors(ALPHAS) for f in fits])
        return Tried([f.fit for f in fits], relative(errors[:, :-1], errors[:, -1]), squares=errors[:, -1])

    def final(self, inputs: Inputs) -> RidgeFit:
        """Fit on all training spots."""
        return fit_ridge(inputs.whole(), self.target.expression, self.n_components)

    def _coef(self, fit: RidgeFit, weights: np.ndarray, tried: Tried) -> np.ndarray:
        shrink = (weights / np.add.outer(fit.variances, ALPHAS)).sum(axis=1)
        return fit.cross * shrink[:, None]

    def block(
        self, fit: RidgeFit, weights: np.ndarray, tried: Tried, fold: int | None, sources: Sequence[Source], *,
        context: bool,
    ) -> Block:  # fmt: skip
        """Return the prediction of a fit, for the weight of every setting."""
        p = fit.projection
        matrix = (p.components / p.scale).T
        return linear_block(matrix, p.mean, self._coef(fit, weights, tried), sources, context=context)

    def intercept(self, fold: int | None) -> np.ndarray:
        """Return the mean expression of the training spots of a fold, or of all, (genes,)."""
        y = self.target.expression
        rows = y if fold is None else y[self.target.folds[fold].train]
        return np.asarray(rows.mean(axis=0, dtype=np.float64)).ravel()


class RidgePerGeneFits(RidgeFits):
    """Ridge with a penalty per gene: that with the smallest squared error over all held-out spots."""

    def __init__(self, target: Target, n_components: int | None = None) -> None:
        super().__init__(target, n_components)
        self.settings = [(None, float("nan"))]

    def tried(self, inputs: Inputs) -> Tried:
        """Fit on every inner fold."""
        fits = self._fold_fits(inputs)
        alphas = processes.broadcast(alpha_per_gene(fits))  # of near ties, each could take another
        errors = np.array([[f.fit.squared_error(f.held_out, alphas)] for f in fits])
        squares = np.array([f.total_errors([])[0] for f in fits])
        return Tried([f.fit for f in fits], relative(errors, squares), alphas, squares)

    def _coef(self, fit: RidgeFit, weights: np.ndarray, tried: Tried) -> np.ndarray:
        assert tried.alphas is not None  # for the type checker
        return weights.sum() * fit.coef(tried.alphas)
