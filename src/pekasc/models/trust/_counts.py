"""Negative binomial counts around predicted rates: distribution, quantiles, moments. Pure arrays."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from scipy.special import gammaincinv

_jit: Any = numba.njit(cache=True, nogil=True, error_model="numpy")

LEAST = 1e-6  # dispersion below which counts are Poisson, up to rounding
_UNDERFLOW = 600.0  # exp(-600) is a number, and exp(-750) is 0
_TINY = 1e-17


@_jit
def _below_and_mass(count: int, mean: float, dispersion: float) -> tuple[float, float]:
    """Return P(Y < count) and P(Y = count) of a negative binomial, summed from the end where its terms are largest."""
    size = 1.0 / dispersion
    log_zero = -size * math.log1p(dispersion * mean)
    ratio = dispersion * mean / (1.0 + dispersion * mean)
    if log_zero > -_UNDERFLOW:
        mass, below = math.exp(log_zero), 0.0
        for k in range(count):
            below += mass
            mass *= (k + size) / (k + 1.0) * ratio
        return min(below, 1.0), mass
    log_mass = math.lgamma(count + size) - math.lgamma(size) - math.lgamma(count + 1.0) + log_zero
    mass = math.exp(log_mass + count * math.log(ratio))
    mode = (1.0 - dispersion) * mean  # terms grow up to it
    term, total = mass, 0.0
    if count <= mean:
        for k in range(count, 0, -1):
            term *= k / ((k - 1.0 + size) * ratio)
            total += term
            if k < mode and term < _TINY * total:
                break
        return min(total, 1.0), mass
    k = count
    while True:  # above the mean, what is left is summed upwards
        term *= (k + size) / (k + 1.0) * ratio
        total += term
        k += 1
        if term <= _TINY * (total + mass):
            break
    return min(max(1.0 - total - mass, 0.0), 1.0), mass


@_jit
def steps(counts: np.ndarray, mean: np.ndarray, dispersion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the distribution function stands below every count, and the step at it.

    Parameters
    ----------
    counts
        Whole numbers, (n, genes) int64.
    mean
        Their means, (n, genes).
    dispersion
        Of every gene, (genes,): the variance is mean + dispersion * mean^2.
    """
    n, n_genes = counts.shape
    below, mass = np.empty((n, n_genes)), np.empty((n, n_genes))
    for i in range(n):
        for j in range(n_genes):
            below[i, j], mass[i, j] = _below_and_mass(counts[i, j], mean[i, j], dispersion[j])
    return below, mass


@_jit
def _quantile(probability: float, mean: float, dispersion: float) -> int:
    size = 1.0 / dispersion
    log_zero = -size * math.log1p(dispersion * mean)
    if log_zero > -_UNDERFLOW:
        ratio = dispersion * mean / (1.0 + dispersion * mean)
        mass, k = math.exp(log_zero), 0
        reached = mass
        while reached < probability and mass > 0:
            mass *= (k + size) / (k + 1.0) * ratio
            reached += mass
            k += 1
        return k
    # of large counts: bisection between brackets that double
    low, high = 0, int(mean) + 1
    while True:
        below, mass = _below_and_mass(high, mean, dispersion)
        if below + mass >= probability:
            break
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        below, mass = _below_and_mass(middle, mean, dispersion)
        if below + mass >= probability:
            high = middle
        else:
            low = middle
    return high


@_jit
def quantiles(probability: np.ndarray, mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Return the smallest count whose distribution function reaches a probability, (n, genes).

    Parameters
    ----------
    probability
        Of every gene, (genes,), from 0 to below 1.
    mean, dispersion
        See :func:`steps`.
    """
    n, n_genes = mean.shape
    out = np.empty((n, n_genes))
    for i in range(n):
        for j in range(n_genes):
            out[i, j] = _quantile(probability[j], mean[i, j], dispersion[j])
    return out


def rate_factors(probability: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Return the quantile of a rate of mean 1, drawn from the gamma distribution that the negative binomial mixes."""
    return np.asarray(gammaincinv(1 / dispersion, probability) * dispersion, dtype=np.float64)


def count_sums(counts: np.ndarray, mean: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the sums over spots that :func:`mean_and_dispersion` needs, (5, genes); they add up over groups.

    Of counts y and predicted means m: y, m, y * y, y * m and m * m.
    """
    y, m = counts.astype(np.float64), mean.astype(np.float64)
    if known is not None:
        y, m = np.where(known, y, 0.0), np.where(known, m, 0.0)
    return np.stack([y.sum(axis=0), m.sum(axis=0), (y * y).sum(axis=0), (y * m).sum(axis=0), (m * m).sum(axis=0)])


def mean_and_dispersion(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much counts exceed predicted means, and their dispersion, (genes,) each, by moments.

    The dispersion of a gene is drawn towards that of all genes as far as its counts say little about it: a normal prior
    around the mean over genes (each weighted by what it knows), whose standard deviation is that mean.

    Parameters
    ----------
    sums
        Of all genes, see :func:`count_sums`.
    """
    y, m, yy, ym, mm = sums
    scale = np.divide(y, m, out=np.ones_like(y), where=(y > 0) & (m > 0))
    first, second = scale * m, scale**2 * mm
    seen = second > 0
    excess = yy - 2 * scale * ym + second - first
    dispersion = np.divide(excess, second, out=np.zeros_like(y), where=seen)
    # variance of the estimate, if counts were Poisson
    variance = np.divide(first + 2 * second, second**2, out=np.full_like(y, np.inf), where=seen)
    weight = np.divide(1.0, variance, out=np.zeros_like(y), where=seen)
    if not weight.any():
        return scale, np.full_like(y, 1.0)
    centre = max(float((weight * dispersion).sum() / weight.sum()), LEAST)
    prior = 1 / centre**2
    return scale, np.maximum((weight * dispersion + prior * centre) / (weight + prior), LEAST)
