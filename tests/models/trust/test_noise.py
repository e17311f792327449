"""Noise around predictions: intervals of counts cover their level at every depth of sequencing, and those of rates."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.models.trust import COUNTS, RESIDUALS, Noise, counts_of

N, GENES = 4000, 6


def counted(totals: float) -> tuple[Noise, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return noise, predictions, rates, counts and totals of spots whose rates are drawn."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.05, 1.5, GENES)
    noise = Noise(COUNTS, np.full(GENES, 1.3), spread, np.full(GENES, 0.1))
    predicted = rng.uniform(0.5, 3.0, (N, GENES)).astype(np.float32)
    rates = noise.rates(predicted) * rng.gamma(1 / spread, spread, (N, GENES))
    total = np.full(N, totals)
    return noise, predicted, rates, rng.poisson(rates * totals / 1e4), total


@pytest.mark.parametrize("totals", [300.0, 3000.0, 30_000.0])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_of_measurements_cover_their_level_at_every_depth(totals: float, level: float) -> None:
    noise, predicted, _, counts, total = counted(totals)
    threshold = np.full(GENES, level)
    ends = noise.scores(predicted, counts, total)
    assert noise.share_within(ends, threshold).mean(axis=0) == pytest.approx(np.full(GENES, level), abs=0.03)
    drawn = noise.drawn(ends, np.random.default_rng(1))
    assert (drawn <= threshold).mean(axis=0) == pytest.approx(np.full(GENES, level), abs=0.03)
    # the closed interval holds at least as many, and is the one whose ends are given
    low, high = noise.measurement_bounds(predicted, threshold, total)
    measured = np.log1p(1e4 * counts / total[:, None])
    inside = (measured >= low - 1e-5) & (measured <= high + 1e-5)
    np.testing.assert_array_equal(inside, noise.covered(ends, threshold))
    assert (inside.mean(axis=0) >= level - 0.03).all()


def test_the_interval_of_the_rate_is_narrower_and_holds_the_rate() -> None:
    noise, predicted, rates, _, total = counted(300.0)
    threshold = np.full(GENES, 0.9)
    low, high = noise.rate_bounds(predicted, threshold)
    inside = (np.log1p(rates) >= low) & (np.log1p(rates) <= high)
    assert inside.mean(axis=0) == pytest.approx(np.full(GENES, 0.9), abs=0.02)
    wide_low, wide_high = noise.measurement_bounds(predicted, threshold, total)
    assert ((wide_high - wide_low).mean(axis=0) > (high - low).mean(axis=0)).all()
    assert low.dtype == high.dtype == wide_low.dtype == np.float32


def test_predictions_below_nothing_are_a_small_rate() -> None:
    noise, *_ = counted(300.0)
    assert noise.rates(np.full((1, GENES), -2.0)) == pytest.approx(np.full((1, GENES), 0.13))


def test_residuals() -> None:
    rng = np.random.default_rng(4)
    noise = Noise(RESIDUALS, np.ones(2), np.array([0.5, 2.0]), np.zeros(2))
    predicted = rng.normal(size=(3000, 2)).astype(np.float32)
    measured = predicted + rng.normal(size=(3000, 2)) * [0.5, 2.0]
    ends = noise.scores(predicted, measured, None)
    threshold = np.quantile(noise.drawn(ends, rng), 0.9, axis=0)
    for low, high in (noise.rate_bounds(predicted, threshold), noise.measurement_bounds(predicted, threshold, None)):
        assert ((measured >= low) & (measured <= high)).mean(axis=0) == pytest.approx([0.9, 0.9], abs=1e-3)
        assert (high - low).mean(axis=0) == pytest.approx(2 * 1.645 * np.array([0.5, 2.0]), rel=0.06)
    assert noise.covered(ends, threshold).mean(axis=0) == pytest.approx([0.9, 0.9], abs=1e-3)
    assert noise.share_within(ends, threshold).mean(axis=0) == pytest.approx([0.9, 0.9], abs=1e-3)


def test_unknown_thresholds_and_totals_give_no_interval() -> None:
    noise, predicted, _, _, total = counted(300.0)
    threshold = np.array([np.nan, *[0.9] * (GENES - 1)])
    total = total[:4].copy()
    total[1] = np.nan
    for low, high in (
        noise.rate_bounds(predicted[:4], threshold),
        noise.measurement_bounds(predicted[:4], threshold, total),
    ):
        assert np.isnan(low[:, 0]).all() and np.isnan(high[:, 0]).all() and np.isfinite(low[0, 1:]).all()
    assert np.isnan(low[1]).all()


def test_counts_come_back_from_log_values() -> None:
    counts, total = np.array([[0, 1, 7, 12_345]]), np.array([45_678.0])
    log = np.log1p(1e4 * counts / total[:, None]).astype(np.float32)
    np.testing.assert_array_equal(counts_of(log, total), counts)
