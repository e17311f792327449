"""The noise ceiling of a gene: the largest Pearson correlation that counting noise allows. Pure arrays.

Every count is thinned into two halves, which measure one rate. How far they correlate says how much of the variation
at half the depth is signal; a model of the rates carries this over to the whole depth.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import sparse
from scipy.special import gammaln

from pekasc._expression import SCALE, Matrix

_CHUNK = 2_000_000  # counts thinned at a time
_NEGLIGIBLE = 1e-10  # probability of a split
_MANY = 1000.0  # counts, from which on the moments of a logarithm are those of its expansion
_N_DEPTHS = 16  # quantiles of the totals
_STEP = 0.25  # of the logarithm of a mean rate, between which values are interpolated
_N_NODES = 15  # of the quadrature over rates
# coefficients of variation of a rate over spots
_SPREADS = np.concatenate([[0.0], np.geomspace(0.03, 8.0, 31)])


def noise_ceiling(counts: Matrix, totals: np.ndarray) -> np.ndarray:
    """Return the largest Pearson correlation with log1p(1e4 * count / total) that counting noise allows, per gene.

    It is the root of the reliability: of the share that differences between spots, in rate and in depth, have in the
    variance of the values. An upper bound: only the noise of drawing counts (Poisson) is taken away, so overdispersion
    and dropout, which no prediction can know either, count as signal.

    The correlation r of two halves, into which every count is thinned, is taken in expectation over all thinnings, not
    drawn. Spearman-Brown, 2 r / (1 + r), holds where noise adds to a signal that is the same at any depth, which a
    logarithm of few counts is not. Instead, rates are taken as lognormal over spots, with the gene's mean and with the
    variance that gives r at half the depth; the reliability at the whole depth is that of these rates.

    Parameters
    ----------
    counts
        Counts of the spots of one section or group, spots x genes, dense or sparse, integers of any dtype.
    totals
        Total count of every spot, (n,).

    Returns
    -------
    Ceilings from 0 to 1, (genes,) float64; NaN for a gene that is constant over the spots.

    Raises
    ------
    ValueError
        If counts are negative or no integers, or there is not a positive total for every spot.

    References
    ----------
    Thinning: Neufeld et al., "Inference after latent variable estimation for single-cell RNA sequencing data",
    Biostatistics 2024. Reliability of halves: Spearman, Brown, British Journal of Psychology 1910.
    """
    totals = np.asarray(totals, dtype=np.float64)
    n, n_genes = counts.shape
    if totals.shape != (n,) or not (np.isfinite(totals) & (totals > 0)).all():
        raise ValueError(f"Every one of {n} spots needs a positive total count, got totals of shape {totals.shape}.")
    columns = sparse.csc_matrix(counts, dtype=np.float64, copy=True)
    columns.sum_duplicates()
    if not ((columns.data >= 0) & (columns.data == np.rint(columns.data)) & np.isfinite(columns.data)).all():
        raise ValueError("Ceilings are of raw counts: found values that are negative, fractional, NaN or infinite.")
    columns.eliminate_zeros()
    out = np.full(n_genes, np.nan)
    varies = np.flatnonzero(_varies(columns, totals))
    if varies.size:
        columns = columns[:, varies]
        rate = np.asarray(columns.sum(axis=0)).ravel() / totals.sum()
        out[varies] = _at_full_depth(_correlation_of_halves(columns, totals), rate, totals)
    return out


def _varies(counts: Matrix, totals: np.ndarray) -> np.ndarray:
    """Return whether count / total of genes (CSC without zeros) varies over spots, (genes,)."""
    seen = np.diff(counts.indptr)
    out = (seen > 0) & (seen < counts.shape[0])
    for gene in np.flatnonzero(seen == counts.shape[0]):
        at = slice(*counts.indptr[gene : gene + 2])
        out[gene] = np.ptp(counts.data[at] / totals[counts.indices[at]]) > 0
    return np.asarray(out)


def _correlation_of_halves(counts: Matrix, totals: np.ndarray) -> np.ndarray:
    """Return the correlation between the halves of thinned counts (CSC), in expectation over thinnings, (genes,)."""
    n, n_genes = counts.shape
    bounds = np.searchsorted(counts.indptr, np.arange(0, counts.nnz + _CHUNK, _CHUNK))
    out = np.empty(n_genes)
    for start, end in pairwise(np.unique(np.minimum(bounds, n_genes))):
        part = counts[:, start:end]
        gene = np.repeat(np.arange(end - start), np.diff(part.indptr))
        # genes share spots and small counts: every pair is thinned once
        width = int(part.data.max()) + 1
        pairs, place = np.unique(
            part.indices.astype(np.int64) * width + part.data.astype(np.int64), return_inverse=True
        )
        spot, count = np.divmod(pairs, width)
        mean, square, product = (x[place] for x in _halves(count.astype(np.float64), 2 * SCALE / totals[spot]))

        def over_spots(values: np.ndarray, gene: np.ndarray = gene, n_genes: int = end - start) -> np.ndarray:
            return np.bincount(gene, values, n_genes)

        # halves of different spots are independent of one another
        between = over_spots(mean) ** 2 - over_spots(mean**2)
        squares, products = over_spots(square), over_spots(product)
        variance, covariance = ((1 - 1 / n) * values - between / n for values in (squares, products))
        out[start:end] = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 0)
    return out


def _halves(counts: np.ndarray, factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of log1p(factor * half) of each count, of its square, and of the product of the two halves."""
    mean, square, product = np.zeros((3, counts.size))
    at = np.arange(counts.size)
    small = np.floor(counts / 2)
    # binomial probability of the split into `small` and the rest; from the middle outwards it falls
    p = np.exp(gammaln(counts + 1) - gammaln(small + 1) - gammaln(counts - small + 1) - counts * np.log(2))
    while at.size:
        large = counts[at] - small
        a, b = np.log1p(factor[at] * small), np.log1p(factor[at] * large)
        twice = np.where(small < large, p, p / 2)  # a split and its mirror image
        mean[at] += twice * (a + b)
        square[at] += twice * (a * a + b * b)
        product[at] += 2 * twice * a * b
        p *= small / (large + 1)
        go_on = p > _NEGLIGIBLE  # p is 0 below no count
        at, small, p = at[go_on], small[go_on] - 1, p[go_on]
    return mean, square, product


def _at_full_depth(r: np.ndarray, rate: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return the ceilings of genes with mean `rate` whose halves correlate by `r`, (genes,)."""
    depths = np.quantile(totals, (np.arange(_N_DEPTHS) + 0.5) / _N_DEPTHS)
    place = np.log(rate) / _STEP
    left = np.floor(place).astype(np.int64)
    first = left.min()  # steps are the same whichever genes there are, and so is what a gene gets
    means = np.exp(_STEP * np.arange(first, left.max() + 2))
    part = (place - left)[:, None]
    # (genes, spreads), rising with the spread; halves of one rate in all spots correlate by depth, and may by less
    half, full = (
        np.pad(np.maximum.accumulate(_between(table, left - first, part), axis=1), ((0, 0), (1, 0)))
        for table in (_reliability(means, depths / 2), _reliability(means, depths))
    )
    r = np.clip(r, 0, half[:, -1])
    above = np.clip((half <= r[:, None]).sum(axis=1), 1, _SPREADS.size)
    rows = np.arange(r.size)
    low, high = half[rows, above - 1], half[rows, above]
    step = np.divide(r - low, high - low, out=np.zeros_like(r), where=high > low)
    return np.sqrt(full[rows, above - 1] * (1 - step) + full[rows, above] * step)


def _between(table: np.ndarray, left: np.ndarray, part: np.ndarray) -> np.ndarray:
    return table[left] * (1 - part) + table[left + 1] * part


def _reliability(means: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Return the share of signal in the variance of log1p(1e4 * count / depth), (means, spreads).

    Rates are lognormal with these means and each of the spreads, whatever the depth, and every depth is as frequent.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_N_NODES)
    weights = weights / weights.sum()
    sigma = np.sqrt(np.log1p(_SPREADS**2))[:, None]
    log_rates = np.log(means)[:, None, None] + sigma * nodes - sigma**2 / 2
    log_counts, expected, variance = log_moments(depths)
    mean = mean_square = noise = np.zeros(log_rates.shape[:2])
    for depth, expected_there, variance_there in zip(depths, expected, variance, strict=True):
        at = log_rates + np.log(depth)
        signal = np.interp(at, log_counts, expected_there)
        mean = mean + signal @ weights / depths.size
        mean_square = mean_square + signal**2 @ weights / depths.size
        noise = noise + np.interp(at, log_counts, variance_there) @ weights / depths.size
    signal = np.maximum(mean_square - mean**2, 0)
    return np.divide(signal, signal + noise, out=np.zeros_like(signal), where=signal + noise > 0)


def log_moments(depths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and variance of log1p(1e4 * count / depth) of Poisson counts, (depths, grid), and the log means."""
    log_counts = np.arange(np.log(1e-7), np.log(1e6), 0.1)
    factor = SCALE / depths[:, None]
    expected, variance = np.empty((2, depths.size, log_counts.size))
    for i, rate in enumerate(np.exp(log_counts)):
        if rate > _MANY:
            slope = factor[:, 0] / (1 + factor[:, 0] * rate)
            expected[:, i] = np.log1p(factor[:, 0] * rate) - slope**2 * rate / 2
            variance[:, i] = slope**2 * rate
            continue
        reach = 8 * np.sqrt(rate) + 8
        k = np.arange(max(0.0, np.floor(rate - reach)), np.ceil(rate + reach))
        p = np.exp(k * np.log(rate) - rate - gammaln(k + 1))
        values = np.log1p(factor * k)
        expected[:, i] = values @ p
        variance[:, i] = (values - expected[:, i, None]) ** 2 @ p
    return log_counts, expected, variance
