"""Ridge onto the principal components of all expressed genes, mapped back to every gene.

Genes vary together: a few components carry what an image can say, and the noise of single genes is left out. PEKA's
teacher is another such space. Reduced-rank regression with components of the target alone: Izenman, Journal of
Multivariate Analysis 5, 1975.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pekasc._expression import Matrix
from pekasc._panels import same_panel
from pekasc.models.heads._fits import Inputs, Target, Tried, fold_fits
from pekasc.models.heads._genes import RANKS, gene_space, panel_loadings
from pekasc.models.heads._linear import Block, Source, linear_block
from pekasc.models.heads._moments import column_sum
from pekasc.models.heads._ridge import ALPHAS, FoldFit, RidgeFit, fit_ridge
from pekasc.models.heads._split import Split


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
    """Low-rank head: components are found once for every inner fold, on its training spots, whatever the depths.

    Where sections measured different genes, components are those of the genes that all measured, on all training spots;
    mean and loadings of another gene are from the spots that measured it, and so is its held-out error.
    """

    shares_output = True
    takes_panels = True

    def __init__(self, target: Target, n_components: int | None = None) -> None:
        self.target, self.n_components = target, n_components
        y, w, n = target.expression, target.weights, target.expression.shape[0]
        self.panels = same_panel(*y.shape) if target.panels is None else target.panels
        every: Matrix = target.every
        if every is None:
            every = y if self.panels.shared.all() else y[:, self.panels.shared]
        least = min(len(fold.train) for fold in target.folds)
        self.ranks = ranks_for(least, every.shape[1], target.rank)
        self.settings: list[tuple[int | None, float]] = [(r, float(a)) for r in self.ranks for a in ALPHAS]
        self._r = max(self.ranks)
        self._means: list[np.ndarray] = []
        self._loadings: list[np.ndarray] = []
        self._squares: list[float] = []
        self._inner: list[np.ndarray] = []
        # per fold, the components of its training spots, and the residuals of the held-out ones along the loadings
        self._targets = np.zeros((n, 2 * self._r * len(target.folds)), dtype=np.float32)
        for i, fold in enumerate(target.folds):
            weights = None if w is None else w[fold.train]
            space = gene_space(every[fold.train], self._r, weights)
            scores = space.scores(every[fold.train])
            mean, loading = panel_loadings(scores, y[fold.train], self.panels.take(fold.train), weights)
            own = self._targets[:, self._columns(i)]
            own[fold.train, : self._r] = scores
            own[fold.held_out, self._r :] = self._hold_out(fold, mean, loading)
            self._means.append(mean)
            self._loadings.append(loading)
        space = gene_space(every, self._r, w)
        self._final = space.scores(every).astype(np.float32)
        mean, loading = panel_loadings(self._final.astype(np.float64), y, self.panels, w)
        self._means.append(mean)
        self._loadings.append(loading)

    def _hold_out(self, fold: Split, mean: np.ndarray, loading: np.ndarray) -> np.ndarray:
        """Return the residuals of the held-out spots along the loadings, (held out, r), summed over measured genes.

        Keeps the sum of their squares, and the inner products of the loadings of every panel.
        """
        y, w = self.target.expression, self.target.weights
        known = self.panels.genes & self.panels.learned(fold.train)
        number, squares = self.panels.panel[fold.held_out], 0.0
        out = np.empty((len(fold.held_out), self._r))
        for i in np.unique(number):
            rows = fold.held_out[number == i]
            ones = np.ones(len(rows)) if w is None else w[rows]
            part = y[rows]
            by_gene = column_sum(part, 2, ones) - 2 * mean * column_sum(part, 1, ones) + ones.sum() * mean**2
            squares += float(by_gene[known[i]].sum())
            # expression is 0 where it was not measured, and loadings where they were not learned
            out[number == i] = np.asarray(part @ loading.T) - (known[i] * mean) @ loading.T
        self._squares.append(squares if known[np.unique(number)].any() else np.nan)
        self._inner.append(np.array([loading[:, own] @ loading[:, own].T for own in known]))
        return out

    def _columns(self, fold: int) -> slice:
        return slice(2 * self._r * fold, 2 * self._r * (fold + 1))

    def tried(self, inputs: Inputs) -> Tried:
        """Fit on every inner fold."""

        def targets(fold: int | None) -> np.ndarray:
            return self._targets if fold is None else self._targets[:, self._columns(fold)]

        fits, errors = [], []
        w, panel = self.target.weights, self.panels.panel
        for i, f in enumerate(fold_fits(inputs, self.target.folds, targets, self.n_components, w, panel)):
            at = self._columns(i) if inputs.fold is None else slice(0, 2 * self._r)
            fits.append(f.fit.columns(at).columns(slice(0, self._r)))
            errors.append(self._errors(i, fits[-1], f, f.held_out.xy[:, at][:, self._r :]))
        return Tried(fits, np.array(errors))

    def _errors(self, fold: int, fit: RidgeFit, found: FoldFit, residual: np.ndarray) -> np.ndarray:
        """Return the relative squared error over the genes for every rank and penalty, (settings,), in closed form.

        With components' predictions z b, loadings L and residuals r of the mean predictor, it is the sum of ``r**2 -
        2 z b L r + (z b) L L' (z b)'``: genes are summed once, in L L' (of the genes that a panel has) and in L r, of
        which `residual` holds the sums of products with z.
        """
        squares = self._squares[fold]
        out = np.full((len(self.ranks), len(ALPHAS)), np.nan if np.isnan(squares) else 1.0)
        if not squares > 0:
            return out.ravel()
        at = np.array(self.ranks) - 1
        for a, alpha in enumerate(ALPHAS):
            b = fit.coef(alpha)
            linear = np.cumsum(np.einsum("kr,kr->r", b, residual))
            inner = sum(
                ((b.T @ part.xx @ b) * own for part, own in zip(found.parts, self._inner[fold], strict=False)),
                start=np.zeros((self._r, self._r)),
            )
            square = np.cumsum(np.cumsum(inner, axis=0), axis=1)
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
