"""Negative binomial counts: distribution and quantiles as scipy has them, moments that come back."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import gamma, nbinom, poisson

from pekasc.models.trust._counts import (
    LEAST,
    count_sums,
    mean_and_dispersion,
    quantiles,
    rate_factors,
    steps,
)


@pytest.mark.parametrize("size", [0.0, 3.0, 7.0])
def test_distribution_and_quantiles_are_scipys(size: float) -> None:
    rng = np.random.default_rng(0)
    mean = np.exp(rng.normal(size, 2, (60, 20)))
    dispersion = np.exp(rng.normal(-1, 1.5, 20))
    counts = rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape)).astype(np.int64)
    r = 1 / dispersion
    p = r / (r + mean)
    below, mass = steps(counts, mean, dispersion)
    np.testing.assert_allclose(below, nbinom.cdf(counts - 1, r, p), atol=1e-10)
    np.testing.assert_allclose(mass, nbinom.pmf(counts, r, p), rtol=1e-8, atol=1e-12)
    for q in (0.05, 0.5, 0.95):
        np.testing.assert_array_equal(quantiles(np.full(20, q), mean, dispersion), nbinom.ppf(q, r, p))


def test_without_dispersion_counts_are_poisson() -> None:
    mean = np.array([[0.01, 2.0, 300.0]])
    below, mass = steps(np.array([[1, 3, 290]]), mean, np.full(3, LEAST))
    np.testing.assert_allclose(below[0], poisson.cdf([0, 2, 289], mean[0]), atol=2e-4)
    np.testing.assert_allclose(mass[0], poisson.pmf([1, 3, 290], mean[0]), rtol=1e-2)


def test_terms_that_underflow_at_zero() -> None:
    # 5,000 counts expected, nearly Poisson: the probability of 0 is no number
    counts, mean, dispersion = (
        np.array([[4800], [5000], [5200], [100], [20_000]]),
        np.full((5, 1), 5e3),
        np.array([1e-4]),
    )
    below, mass = steps(counts, mean, dispersion)
    r, p = 1e4, 1e4 / (1e4 + 5e3)
    np.testing.assert_allclose(below, nbinom.cdf(counts - 1, r, p), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(mass, nbinom.pmf(counts, r, p), rtol=1e-7, atol=1e-300)
    np.testing.assert_array_equal(quantiles(np.array([0.9]), mean[:1], dispersion), nbinom.ppf(0.9, r, p))


def test_rates_are_gamma() -> None:
    dispersion = np.array([0.1, 1.0, 4.0])
    expected = gamma.ppf(0.95, 1 / dispersion, scale=dispersion)
    np.testing.assert_allclose(rate_factors(np.full(3, 0.95), dispersion), expected)


def test_mean_and_dispersion_come_back() -> None:
    rng = np.random.default_rng(1)
    mean = np.exp(rng.normal(1, 0.7, (3000, 40)))
    dispersion = np.linspace(0.1, 1.0, 40)
    counts = rng.poisson(1.5 * mean * rng.gamma(1 / dispersion, dispersion, mean.shape))
    scale, found = mean_and_dispersion(count_sums(counts, mean))
    np.testing.assert_allclose(scale, 1.5, rtol=0.1)
    np.testing.assert_allclose(found, dispersion, rtol=0.5)
    assert np.median(found / dispersion) == pytest.approx(1, abs=0.1)
    # sums of parts add up, and spots that did not measure a gene do not count
    known = np.ones(mean.shape, dtype=bool)
    known[1000:, 3] = False
    parts = sum(count_sums(counts[i : i + 1000], mean[i : i + 1000], known[i : i + 1000]) for i in (0, 1000, 2000))
    np.testing.assert_allclose(parts, count_sums(np.where(known, counts, 0), np.where(known, mean, 0)), rtol=1e-12)


def test_genes_that_say_little_get_the_dispersion_of_all() -> None:
    rng = np.random.default_rng(2)
    mean = np.column_stack([np.full((800, 20), 20.0), np.full((800, 20), 0.02)])
    counts = rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape))
    _, found = mean_and_dispersion(count_sums(counts, mean))
    np.testing.assert_allclose(found[:20], 0.5, rtol=0.25)
    np.testing.assert_allclose(found[20:], 0.5, rtol=0.6)  # 16 counts each: alone, they would be anything
    scale, nothing = mean_and_dispersion(np.zeros((5, 3)))
    assert (scale == 1).all() and (nothing == 1).all()
