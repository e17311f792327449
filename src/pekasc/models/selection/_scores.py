"""Scores of predicted against measured expression. Pure arrays."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from pekasc._expression import Matrix, dense


def pearson(predicted: np.ndarray, measured: Matrix) -> np.ndarray:
    """Return the Pearson correlation of every gene, (genes,); NaN where prediction or measurement is constant."""
    y = dense(measured)
    a = predicted.astype(np.float64) - predicted.mean(axis=0, dtype=np.float64)
    b = y.astype(np.float64) - y.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    # a constant column leaves rounding noise, not exactly 0
    known = (np.ptp(predicted, axis=0) > 0) & (np.ptp(y, axis=0) > 0) & (scale > 0)
    return np.divide((a * b).sum(axis=0), scale, out=np.full(y.shape[1], np.nan), where=known)


def gene_scores(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of every gene, (genes,), for comparing methods.

    NaN where the measurement is constant, since the correlation is undefined for every method. 0 where only the
    prediction is constant, so that no method gains by not predicting a gene.
    """
    r = pearson(predicted, measured)
    return np.where(np.isnan(r) & (np.ptp(measured, axis=0) > 0), 0.0, r)


def mean_score(r: np.ndarray) -> float:
    """Return the mean over genes that have a score; NaN if none has."""
    known = np.isfinite(r)
    return float(r[known].mean()) if known.any() else float("nan")


def tissue_blocks(coords_um: np.ndarray, sections: np.ndarray, side_um: float) -> np.ndarray:
    """Return the index of the square block of tissue of every spot, (n,) int64; no block spans two sections."""
    corner = np.floor(np.asarray(coords_um) / side_um).astype(np.int64)
    _, section = np.unique(sections, return_inverse=True)
    _, block = np.unique(np.column_stack([section, corner]), axis=0, return_inverse=True)
    return block.ravel()


class BlockScores:
    """Block bootstrap of the mean correlation over genes, resampling blocks of tissue.

    Correlations are computed from sums over spots, and sums of blocks add up, so that a bootstrap sample costs one row
    of a matrix product instead of a pass over the spots.

    Parameters
    ----------
    measured
        Measured expression, shape (n, genes).
    blocks
        Block of every spot, shape (n,).
    n_draws
        Number of bootstrap samples; each draws as many blocks as there are, with replacement.
    random_state
        Seed: the same samples for every method, so that differences are paired.
    strata
        Section of every spot, (n,): every sample has as many blocks of a section as the section has.
    """

    def __init__(
        self,
        measured: np.ndarray,
        blocks: np.ndarray,
        n_draws: int,
        random_state: int,
        strata: np.ndarray | None = None,
    ) -> None:
        self.n_blocks = int(blocks.max()) + 1
        generator = np.random.default_rng(random_state)
        block_stratum = np.zeros(self.n_blocks, dtype=np.int64)
        if strata is not None:
            block_stratum[blocks] = np.unique(strata, return_inverse=True)[1].ravel()
        self.draws = np.zeros((n_draws, self.n_blocks), dtype=np.int64)
        for stratum in np.unique(block_stratum):
            at = np.flatnonzero(block_stratum == stratum)
            self.draws[:, at] = generator.multinomial(at.size, np.full(at.size, 1 / at.size), size=n_draws)
        ones = np.ones(len(blocks))
        self._member = sparse.csr_matrix((ones, (blocks, np.arange(len(blocks)))), shape=(self.n_blocks, len(blocks)))
        # centred, for the numerical precision of differences of sums
        self._y = measured - measured.mean(axis=0, dtype=np.float64)
        counts = np.bincount(blocks, minlength=self.n_blocks).astype(np.float64)
        self._n = (self.draws @ counts)[:, None]
        self._sum_y, self._sum_yy = self._drawn(self._y), self._drawn(self._y**2)
        self._variation_y = self._sum_yy - self._sum_y**2 / self._n

    def _drawn(self, values: np.ndarray) -> np.ndarray:
        return self.draws @ (self._member @ values)

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        """Return the mean correlation of every bootstrap sample, (n_draws,), by the rules of :func:`gene_scores`."""
        x = predicted - predicted.mean(axis=0, dtype=np.float64)
        sum_x = self._drawn(x)
        variation_x = self._drawn(x**2) - sum_x**2 / self._n
        covariance = self._drawn(x * self._y) - sum_x * self._sum_y / self._n
        # a gene that is constant in a sample leaves rounding noise
        known = self._variation_y > 1e-9 * np.maximum(self._sum_yy, 1e-300)
        varies = known & (variation_x > 1e-12)
        r = np.divide(
            covariance,
            np.sqrt(np.where(varies, variation_x * self._variation_y, 1.0)),
            out=np.zeros_like(covariance),
            where=varies,
        )
        n_known = known.sum(axis=1)
        return np.divide(np.where(known, r, 0.0).sum(axis=1), n_known, out=np.full(len(r), np.nan), where=n_known > 0)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % quantiles of bootstrap samples; NaN if all samples are NaN."""
    known = values[np.isfinite(values)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)
