"""Quantiles over groups: those of split conformal prediction where every spot is a group; what groups can promise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.dummy import DummyRegressor

from pekasc.models.trust import EDGES, group_quantiles, groups_needed, quantiles_of_cumulative, reachable
from pekasc.models.trust._conformal import cumulative


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_exchangeable_spots_have_the_quantile_of_split_conformal_prediction(level: float) -> None:
    scores = np.random.default_rng(0).exponential(size=(137, 5))
    found = group_quantiles([row[None] for row in scores], level)
    # as MAPIE and crepes have it: the ceil((n + 1) * level)-th smallest of n scores
    k = int(np.ceil((len(scores) + 1) * level))
    np.testing.assert_allclose(found, np.sort(scores, axis=0)[k - 1], atol=1e-12)


def test_mapie_has_the_same_quantile() -> None:
    mapie = pytest.importorskip("mapie.regression")
    scores, place = np.random.default_rng(1).exponential(size=200), np.zeros((200, 1))
    # around a prediction of 0, residuals are the scores
    nothing = DummyRegressor(strategy="constant", constant=0.0).fit(place, np.zeros(200))
    split = mapie.SplitConformalRegressor(nothing, confidence_level=0.9, prefit=True).conformalize(place, scores)
    _, ends = split.predict_interval(place[:1])
    np.testing.assert_allclose(group_quantiles([np.array([[s]]) for s in scores], 0.9), ends[0, 1], atol=1e-6)


def test_groups_share_alike_however_many_spots_they_have() -> None:
    small, large = np.array([[1.0]]), np.arange(2.0, 102.0)[:, None]
    assert group_quantiles([small, large], 0.5, exact=False)[0] == 1.0
    assert group_quantiles([small, large], 0.51, exact=False)[0] == 3.0
    # half of the weight of the two is a third of that with the group to come
    assert group_quantiles([small, large], 0.33)[0] == 1.0
    assert np.isinf(group_quantiles([small, large], 0.67)[0])


def test_what_groups_can_promise() -> None:
    assert [reachable(k) for k in (2, 8)] == pytest.approx([2 / 3, 8 / 9])
    assert [groups_needed(level) for level in (0.5, 0.8, 0.9, 0.95)] == [1, 4, 9, 19]
    for level in (0.5, 0.8, 0.9, 0.95):
        n = groups_needed(level)
        scores = [np.full((3, 1), float(i)) for i in range(n)]
        assert group_quantiles(scores, level)[0] == n - 1
        assert n == 1 or np.isinf(group_quantiles(scores[1:], level)[0])


@pytest.mark.parametrize(("k", "n"), [(39, 1999), (49, 2000), (99, 1000), (199, 500)])
def test_a_level_that_is_just_reached(k: int, n: int) -> None:
    # sums of tens of thousands of shares are rounded
    scores = [np.random.default_rng(i).random((n, 1)) for i in range(k)]
    assert group_quantiles(scores, k / (k + 1))[0] == max(part.max() for part in scores)


def test_coverage_of_a_new_group_is_the_level() -> None:
    """Groups differ: spots taken as exchangeable cover too little, groups cover at least the level on average."""
    rng = np.random.default_rng(2)
    covered, naive = [], []
    for _ in range(400):
        groups = [np.abs(rng.normal(rng.normal(0, 1.0), 1.0, (40, 1))) for _ in range(13)]
        threshold = group_quantiles(groups[:12], 0.9)
        covered.append((groups[12] <= threshold).mean())
        naive.append((groups[12] <= np.quantile(np.concatenate(groups[:12]), 0.9)).mean())
    assert 0.9 <= np.mean(covered) <= 0.97
    assert np.mean(naive) < np.mean(covered)


def test_genes_that_a_group_did_not_measure() -> None:
    scores = [np.array([[1.0, np.nan], [2.0, np.nan]]), np.array([[3.0, np.nan]])]
    np.testing.assert_array_equal(group_quantiles(scores, 0.5, exact=False), [2.0, np.nan])
    scores[0][:, 1] = [5.0, 6.0]
    assert group_quantiles(scores, 0.5)[1] == 6.0  # one group's two spots have half of the weight
    assert np.isinf(group_quantiles(scores, 0.51)[1])


def test_scores_that_are_kept_as_shares() -> None:
    rng = np.random.default_rng(3)
    scores = rng.beta(2, 1, (5000, 3))
    at = (1 + scores) / 2
    shares = cumulative(at, at) / len(scores)
    assert shares.shape == (3, len(EDGES)) and (np.diff(shares, axis=1) >= 0).all() and (shares[:, -1] == 1).all()
    for level in (0.1, 0.5, 0.9, 0.99):
        np.testing.assert_allclose(
            quantiles_of_cumulative(shares, level), np.quantile(scores, level, axis=0), atol=0.01
        )
    # a step of the distribution function is spread evenly over it
    spread = cumulative(np.array([[0.5]]), np.array([[1.0]]))[0]
    np.testing.assert_allclose(spread, EDGES, atol=1e-12)
    assert np.isnan(quantiles_of_cumulative(np.full((1, len(EDGES)), np.nan), 0.9)).all()
