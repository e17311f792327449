"""Weights of settings by their held-out error: from the best alone to the plain mean, and when to trust differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pekasc.models.heads import (
    ALPHAS,
    HeadFits,
    Inputs,
    Source,
    Target,
    check_head,
    linear_head,
    setting_weights,
    spread,
)
from pekasc.models.selection._folds import InnerFold

N, DEPTHS = 60, [(1,), (2,), (3,)]
FOLDS = [
    InnerFold(np.setdiff1d(np.arange(N), np.arange(a, a + 20)), np.arange(a, a + 20), f"P{a}") for a in range(0, N, 20)
]
ERRORS = np.array([[0.80, 0.81, 1.2], [0.805, 0.79, 0.9]])


def test_the_best_setting_has_all_weight() -> None:
    weights = setting_weights(ERRORS, "best", 0.01)
    np.testing.assert_array_equal(weights, [[0, 0, 0], [0, 1, 0]])
    # the first of several that are as good
    np.testing.assert_array_equal(setting_weights(np.ones((2, 2)), "best", 0.01), [[1, 0], [0, 0]])


def test_weights_fall_with_the_relative_error() -> None:
    weights = setting_weights(ERRORS, "average", 0.01)
    raw = np.exp(-(ERRORS / 0.79 - 1) / 0.01)
    raw[raw < 1e-3] = 0
    np.testing.assert_allclose(weights, raw / raw.sum())
    assert weights.sum() == pytest.approx(1) and weights[0, 2] == weights[1, 2] == 0
    # relative: errors twice as large weigh alike
    np.testing.assert_allclose(setting_weights(2 * ERRORS, "average", 0.01), weights)


def test_the_average_lies_between_the_best_and_the_plain_mean() -> None:
    np.testing.assert_array_equal(setting_weights(ERRORS, "average", 1e-9), setting_weights(ERRORS, "best", 1e-9))
    np.testing.assert_allclose(setting_weights(ERRORS, "average", 1e9), np.full((2, 3), 1 / 6))
    best = [setting_weights(ERRORS, "average", t)[1, 1] for t in (0.1, 0.03, 0.01, 0.003, 0.001)]
    assert best == sorted(best) and best[0] < 0.5 < best[-1]


def test_settings_that_could_not_be_tried_have_no_weight() -> None:
    errors = np.array([[np.nan, 0.8], [np.inf, 0.8]])
    np.testing.assert_array_equal(setting_weights(errors, "average", 0.01), [[0, 0.5], [0, 0.5]])
    np.testing.assert_array_equal(setting_weights(errors, "best", 0.01), [[0, 1], [0, 0]])


def test_an_error_of_nothing_is_the_best() -> None:
    np.testing.assert_array_equal(setting_weights(np.array([[0.3, 0.0, 0.1]]), "average", 0.01), [[0, 1, 0]])


def test_the_spread_falls_with_groups_and_spots_and_not_without_either() -> None:
    assert spread(3, 500) == pytest.approx(0.01)
    by_groups = [spread(n, 500) for n in (1, 2, 3, 10, 1000)]
    by_spots = [spread(3, n) for n in (50, 500, 5000, 10**7)]
    for values in (by_groups, by_spots):
        assert values == sorted(values, reverse=True) and values[0] > values[-1]
    # much of one does not make up for little of the other
    assert spread(3, 10**9) > 0.5 * spread(3, 500) and spread(10**9, 500) > 0.5 * spread(3, 500)
    # and with much of both, the average is the best setting
    errors = np.array([[0.80, 0.801]])
    assert setting_weights(errors, "average", spread(2, 300))[0, 0] < 0.6
    assert setting_weights(errors, "average", spread(3000, 10**6))[0, 0] > 0.95


@pytest.fixture(scope="module")
def features() -> dict[Source, np.ndarray]:
    rng = np.random.default_rng(0)
    state = rng.normal(size=(N, 3))
    # depths of different width, as a CNN has them
    return {
        Source("frozen", 0, depth): (state @ rng.normal(size=(3, d)) + rng.normal(size=(N, d)) + 7).astype(np.float32)
        for depth, d in zip(DEPTHS, (6, 8, 90), strict=True)
    }


@pytest.mark.parametrize("name", ["ridge", "ridge-per-gene", "low-rank"])
@pytest.mark.parametrize("fold", [None, 1])
def test_an_average_is_the_weighted_mean_of_its_settings(
    features: dict[Source, np.ndarray], name: str, fold: int | None
) -> None:
    rng = np.random.default_rng(1)
    x = next(iter(features.values()))
    every = rng.normal(size=(N, 9)) + x[:, :1]
    weights_of_spots = rng.uniform(0.2, 1, N)
    fits: HeadFits = check_head(name)(Target(every[:, :4], FOLDS, every, weights_of_spots), None)
    inputs = [Inputs(lambda x=x: x) for x in features.values()]  # type: ignore[misc]
    tried = [fits.tried(one) for one in inputs]
    finals = [fits.final(one) if fold is None else t.folds[fold] for one, t in zip(inputs, tried, strict=True)]
    sources = [[source] for source in features]

    def predicted(weights: np.ndarray) -> np.ndarray:
        head = linear_head(fits, tried, weights, sources, finals, fold=fold, context_um=None)
        return head.expression(head.scores({s: features[s] for s in head.sources})).astype(np.float64)

    n = len(fits.settings)
    weights = rng.uniform(size=(3, n)) * (rng.uniform(size=(3, n)) < 0.3)
    weights[0, 0] = 1.0
    weights /= weights.sum()
    expected: Any = 0
    for i, j in zip(*np.nonzero(weights), strict=True):
        one = np.zeros_like(weights)
        one[i, j] = 1
        expected = expected + weights[i, j] * predicted(one)
    np.testing.assert_allclose(predicted(weights), expected, atol=1e-4)


def test_a_low_rank_average_has_one_map_to_genes(features: dict[Source, np.ndarray]) -> None:
    every = np.random.default_rng(1).normal(size=(N, 9))
    fits = check_head("low-rank")(Target(every, FOLDS), None)
    tried = [fits.tried(Inputs(lambda x=x: x)) for x in features.values()]  # type: ignore[misc]
    weights = np.full((3, len(fits.settings)), 1 / 3 / len(fits.settings))
    finals = [fits.final(Inputs(lambda x=x: x)) for x in features.values()]  # type: ignore[misc]
    head = linear_head(fits, tried, weights, [[s] for s in features], finals, fold=None, context_um=None)
    (block,) = head.blocks
    assert head.n_scores == 8 and block.out.shape == (8, 9) and list(block.maps) == list(features)
    assert len(fits.settings) == 5 * len(ALPHAS)
