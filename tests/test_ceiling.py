"""Noise ceilings against the true ones of known rates, and thinning in expectation against thinning that is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import binom

from pekasc import _ceiling
from pekasc._ceiling import noise_ceiling


def rates(n: int = 400, n_genes: int = 60, *, seed: int = 0) -> np.ndarray:
    """Return shares of transcripts, spots x genes, that vary smoothly or between two kinds of tissue."""
    rng = np.random.default_rng(seed)
    tissue = rng.random((n, 1)) < 0.3
    step = rng.uniform(0, 2.5, n_genes) * tissue
    log = rng.normal(0, 1.2, n_genes) + step + rng.normal(0, 1, (n, n_genes)) * rng.uniform(0.1, 0.5, n_genes)
    share = np.exp(log)
    return share / share.sum(axis=1, keepdims=True)


def drawn(share: np.ndarray, depth: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    counts = rng.poisson(depth * share)
    return counts, np.maximum(counts.sum(axis=1), 1).astype(np.float64)


def true_ceiling(share: np.ndarray, depth: np.ndarray, n_draws: int = 100) -> np.ndarray:
    """Return the correlation with the values' own expectation, from draws: none is larger."""
    rng = np.random.default_rng(7)
    sums, squares = np.zeros((2, *share.shape))
    for _ in range(n_draws):
        counts, total = drawn(share, depth, rng)
        values = np.log1p(1e4 * counts / total[:, None])
        sums += values
        squares += values**2
    mean = sums / n_draws
    noise = ((squares / n_draws - mean**2) * n_draws / (n_draws - 1)).mean(axis=0)
    signal = mean.var(axis=0, ddof=1) - noise / n_draws
    return np.sqrt(signal / (signal + noise))


@pytest.mark.parametrize("depth", [150, 600, 2000, 10_000, 100_000])
def test_of_poisson_counts_they_are_the_true_ones(depth: float) -> None:
    share = rates(800, seed=2)
    # spots differ in depth by a factor of three
    depths = depth * np.exp(np.random.default_rng(1).normal(0, 0.4, (len(share), 1)))
    true = true_ceiling(share, depths)
    found = noise_ceiling(*drawn(share, depths, np.random.default_rng(2)))
    assert abs((found - true).mean()) < 0.03
    assert abs(found - true).mean() < (0.07 if depth < 2000 else 0.03)
    assert np.corrcoef(found, true)[0, 1] > 0.85


def test_without_variation_there_is_little_to_reach() -> None:
    counts, totals = drawn(np.tile(rates(1), (2000, 1)), 5000, np.random.default_rng(0))
    assert noise_ceiling(counts, totals).mean() < 0.12
    # and of fewer spots, chance alone makes more: n ** -0.25 is 0.27
    assert np.nanmax(noise_ceiling(counts[:200], totals[:200])) < 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 200, 5001])
def test_halves_are_in_expectation_over_all_splits(count: int) -> None:
    mean, square, product = _ceiling._halves(np.array([count, 1.0]), np.array([0.7, 30.0]))
    half = np.arange(count + 1)
    p = binom.pmf(half, count, 0.5)
    a, b = np.log1p(0.7 * half), np.log1p(0.7 * (count - half))
    np.testing.assert_allclose([mean[0], square[0], product[0]], [p @ a, p @ a**2, p @ (a * b)], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose([mean[1], square[1], product[1]], [np.log(31) / 2, np.log(31) ** 2 / 2, 0], rtol=1e-6)


def test_the_correlation_of_halves_is_that_of_many_thinnings() -> None:
    rng = np.random.default_rng(3)
    counts, totals = drawn(rates(80, 12), 400, rng)
    found = _ceiling._correlation_of_halves(sparse.csc_matrix(counts, dtype=np.float64), totals)
    moments = np.zeros((3, 12))
    for _ in range(3000):
        first = rng.binomial(counts, 0.5)
        a, b = (np.log1p(2e4 * half / totals[:, None]) for half in (first, counts - first))
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        moments += (a * b).sum(axis=0), (a * a).sum(axis=0), (b * b).sum(axis=0)
    np.testing.assert_allclose(found, moments[0] / np.sqrt(moments[1] * moments[2]), atol=5e-3)


def test_sparse_is_dense_of_any_dtype() -> None:
    counts, totals = drawn(rates(90, 20), 800, np.random.default_rng(4))
    expected = noise_ceiling(counts, totals)
    csr = sparse.csr_matrix(counts.astype(np.float32))
    before = csr.copy()
    zeros = csr.copy()
    zeros[0, np.flatnonzero(counts[0])] = 0  # zeros that are stored
    for same in (counts.astype(np.uint16), counts.astype(np.float32), csr, csr.tocsc(), sparse.csr_array(csr)):
        np.testing.assert_array_equal(noise_ceiling(same, totals), expected)
    np.testing.assert_array_equal(noise_ceiling(zeros, totals), noise_ceiling(zeros.toarray(), totals))
    # the input stays as it was, with its zeros
    stored = zeros.tocsc().astype(np.float64)
    kept = stored.copy()
    noise_ceiling(stored, totals)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(kept, name))
        np.testing.assert_array_equal(getattr(csr, name), getattr(before, name))


def test_a_gene_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, totals = drawn(rates(90, 20), 800, np.random.default_rng(5))
    counts[:, 3] = 0
    expected = noise_ceiling(counts, totals)
    assert np.flatnonzero(np.isnan(expected)).tolist() == [3]
    some = [11, 3, 5]
    np.testing.assert_allclose(noise_ceiling(counts[:, some], totals), expected[some], rtol=1e-12)
    np.testing.assert_allclose(noise_ceiling(counts[:, [11]], totals), expected[[11]], rtol=1e-12)
    # and neither on how many are thinned at a time
    monkeypatch.setattr(_ceiling, "_CHUNK", 100)
    np.testing.assert_allclose(noise_ceiling(counts, totals), expected, rtol=1e-12)


def test_constant_genes_have_none() -> None:
    counts = np.array([[0, 2, 1, 0], [0, 2, 5, 0], [0, 2, 0, 1], [0, 2, 9, 0]])
    found = noise_ceiling(counts, np.full(4, 20.0))
    assert np.isnan(found).tolist() == [True, True, False, False]
    assert ((found[2:] >= 0) & (found[2:] <= 1)).all()
    assert np.isnan(noise_ceiling(counts[:1], [20.0])).all()
    assert noise_ceiling(counts[:, :0], np.full(4, 20.0)).shape == (0,)


@pytest.mark.parametrize("value", [-1, 0.5, np.nan, np.inf])
def test_what_is_no_count_is_refused(value: float) -> None:
    counts = np.ones((3, 2))
    counts[1, 1] = value
    with pytest.raises(ValueError, match="Ceilings are of raw counts: found values that are negative, fractional"):
        noise_ceiling(counts, np.full(3, 9.0))


@pytest.mark.parametrize("totals", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, np.nan, 2.0]])
def test_every_spot_needs_a_total(totals: list[float]) -> None:
    with pytest.raises(ValueError, match=r"Every one of 3 spots needs a positive total count, got totals of shape"):
        noise_ceiling(np.ones((3, 2)), np.array(totals))
