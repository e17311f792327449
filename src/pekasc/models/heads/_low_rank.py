"""Ridge onto the principal components of all expressed genes, mapped back to every gene.

Genes vary together: a few components carry what an image can say, and the noise of single genes is left out. PEKA's
teacher is another such space. Reduced-rank regression with components of the target alone: Izenman, Journal of
Multivariate Analysis 5, 1975.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pekasc.models.heads._fits import Inputs, Target, Tried, fold_fits
from pekasc.models.heads._genes import RANKS, gene_space, loadings
from pekasc.models.heads._linear import Block, Source, linear_block
from pekasc.models.heads._moments import Moments, column_sum
from pekasc.models.heads._ridge import ALPHAS, RidgeFit, fit_ridge


def ranks_for(n_spots: int, n_genes: int, rank: int | None) -> tuple[int, ...]:
    """Return the ranks to try: those of `RANKS` that fit, or the given one.

    Raises
    ------
    ValueError
        If the given one is larger than the spots or genes allow.
    """
    limit = min(n_spots - 1, n_genes)
    if rank is None:
        return tuple(r for r in RANKS if r <= limit)
    if rank > limit:
        raise ValueError(
            f"`head_rank={rank}` does not fit {n_spots} training spots with {n_genes} expressed genes: give 1 to "
            f"{limit}, or None to try several."
        )
    return (rank,)


class LowRankFits:
    """Low-rank head: components are found once for every inner fold, on its training spots, whatever the depths."""

    shares_output = True

    def __init__(self, target: Target, n_components: int | None = None) -> None:
        self.target, self.n_components = target, n_components
        every = target.expression if target.every is None else target.every
        least = min(len(fold.train) for fold in target.folds)
        self.ranks = ranks_for(least, every.shape[1], target.rank)
        self.settings: list[tuple[int | None, float]] = [(r, float(a)) for r in self.ranks for a in ALPHAS]
        self._r = max(self.ranks)
        self._means: list[np.ndarray] = []
        self._loadings: list[np.ndarray] = []
        self._squares: list[float] = []
        y, w, n = target.expression, target.weights, target.expression.shape[0]
        # per fold, the components of its training spots, and the expression of the held-out ones along the loadings
        self._targets = np.zeros((n, 2 * self._r * len(target.folds)), dtype=np.float32)
        for i, fold in enumerate(target.folds):
            weights = None if w is None else w[fold.train]
            space = gene_space(every[fold.train], self._r, weights)
            scores = space.scores(every[fold.train])
            mean, loading = loadings(scores, y[fold.train], weights)
            own = self._targets[:, self._columns(i)]
            own[fold.train, : self._r] = scores
            held_out = y[fold.held_out]
            own[fold.held_out, self._r :] = np.asarray(held_out @ loading.T)
            ones = np.ones(len(fold.held_out)) if w is None else w[fold.held_out]
            squares = column_sum(held_out, 2, ones) - 2 * mean * column_sum(held_out, 1, ones) + ones.sum() * mean**2
            self._means.append(mean)
            self._loadings.append(loading)
            self._squares.append(float(squares.sum()))
        space = gene_space(every, self._r, w)
        self._final = space.scores(every).astype(np.float32)
        mean, loading = loadings(self._final.astype(np.float64), y, w)
        self._means.append(mean)
        self._loadings.append(loading)

    def _columns(self, fold: int) -> slice:
        return slice(2 * self._r * fold, 2 * self._r * (fold + 1))

    def tried(self, inputs: Inputs) -> Tried:
        """Fit on every inner fold."""

        def targets(fold: int | None) -> np.ndarray:
            return self._targets if fold is None else self._targets[:, self._columns(fold)]

        fits, errors = [], []
        for i, f in enumerate(fold_fits(inputs, self.target.folds, targets, self.n_components, self.target.weights)):
            at = self._columns(i) if inputs.fold is None else slice(0, 2 * self._r)
            fit, held_out = f.fit.columns(at), f.held_out.columns(at)
            fits.append(fit.columns(slice(0, self._r)))
            errors.append(self._errors(i, fits[-1], held_out.columns(slice(self._r, None))))
        return Tried(fits, np.array(errors))

    def _errors(self, fold: int, fit: RidgeFit, held_out: Moments) -> np.ndarray:
        """Return the relative squared error over the genes for every rank and penalty, (settings,), in closed form.

        With components' predictions z b, loadings L and residuals r of the mean predictor, it is the sum of ``r**2 -
        2 z b L r + (z b) L L' (z b)'``: genes are summed once, in L L' and in L r.
        """
        loading, mean = self._loadings[fold], self._means[fold]
        inner = loading @ loading.T
        residual = held_out.xy - np.outer(held_out.x, mean @ loading.T)
        squares = self._squares[fold]
        out = np.ones((len(self.ranks), len(ALPHAS)))
        if squares <= 0:
            return out.ravel()
        at = np.array(self.ranks) - 1
        for a, alpha in enumerate(ALPHAS):
            b = fit.coef(alpha)
            linear = np.cumsum(np.einsum("kr,kr->r", b, residual))
            square = np.cumsum(np.cumsum((b.T @ held_out.xx @ b) * inner, axis=0), axis=1)
            out[:, a] = 1 + (square[at, at] - 2 * linear[at]) / squares
        return out.ravel()

    def final(self, inputs: Inputs) -> RidgeFit:
        """Fit on all training spots."""
        return fit_ridge(inputs.whole(), self._final, self.n_components, weights=self.target.weights)

    def block(
        self, fit: RidgeFit, weights: np.ndarray, tried: Tried, fold: int | None, sources: Sequence[Source], *,
        context: bool,
    ) -> Block:  # fmt: skip
        """Return the prediction of a fit, for the weight of every setting."""
        by_rank = weights.reshape(len(self.ranks), len(ALPHAS))
        # a component is predicted by the settings whose rank reaches it
        reach = (np.arange(self._r)[:, None] < np.array(self.ranks)).astype(np.float64)  # (r, ranks)
        by_component = reach @ by_rank  # (r, alphas)
        shrink = (1 / np.add.outer(fit.variances, ALPHAS)) @ by_component.T  # (k, r)
        p = fit.projection
        matrix = (p.components / p.scale).T @ (fit.cross * shrink)
        loading = self._loadings[len(self._loadings) - 1 if fold is None else fold]
        return linear_block(matrix, p.mean, loading, sources, context=context)

    def intercept(self, fold: int | None) -> np.ndarray:
        """Return the mean expression of the training spots of a fold, or of all, (genes,)."""
        return self._means[len(self._means) - 1 if fold is None else fold]
