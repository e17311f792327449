"""The selection rule finds what was planted."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.models.encoders._depths import Depth, candidate_depths
from pekasc.models.heads._ridge import ALPHAS, fit_ridge
from pekasc.models.selection._choice import choose, held_out_errors
from pekasc.models.selection._folds import InnerFold, inner_folds


@pytest.fixture
def planted() -> tuple[dict[Depth, np.ndarray], np.ndarray, list[InnerFold]]:
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c"], 60)
    signal = rng.normal(size=(180, 4))
    # block 1 tells groups apart very well inside them and not at all across: a rule that looks at
    # training spots would take it
    identity = rng.normal(size=(180, 40))
    features: dict[Depth, np.ndarray] = {
        (1,): identity,
        (2,): np.column_stack([signal, rng.normal(size=(180, 8))]),
        (3,): signal * 0.2 + rng.normal(size=(180, 4)),
    }
    y = signal @ rng.normal(size=(4, 10)) + 0.3 * rng.normal(size=(180, 10))
    return features, y, inner_folds(groups, np.zeros((180, 2)), groups, 0)


def test_the_informative_depth_wins(planted: tuple[dict[Depth, np.ndarray], np.ndarray, list[InnerFold]]) -> None:
    features, y, folds = planted
    choice = choose(features, y, folds, None)
    assert choice.depth == (2,)
    assert choice.table.groupby("depth")["error"].min().loc[[(1,)]].item() > 0.95
    assert len(choice.table) == 3 * len(ALPHAS)
    best = choice.table.loc[choice.table["error"].idxmin()]
    assert choice.alpha == best["alpha"]
    # without the informative block, the one with a trace of it
    del features[2,]
    assert choose(features, y, folds, None).depth == (3,)


def test_noise_takes_the_strongest_penalty() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(["a", "b"], 50)
    folds = inner_folds(groups, np.zeros((100, 2)), groups, 0)
    choice = choose({(1,): rng.normal(size=(100, 30))}, rng.normal(size=(100, 20)), folds, None)
    assert choice.alpha >= 10


def test_held_out_error_is_relative_to_the_training_mean() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 6))
    fold = InnerFold(np.arange(25), np.arange(25, 40), "b")
    fit = fit_ridge(x[:25], y[:25])
    direct = [np.square(fit.projection(x[25:]) @ fit.coef(a) + fit.intercept - y[25:]).sum() for a in ALPHAS]
    mean = np.square(y[:25].mean(axis=0) - y[25:]).sum()
    np.testing.assert_allclose(held_out_errors(x, y, [fold], None)[0], np.array(direct) / mean, rtol=1e-9)


def test_candidate_depths_are_every_block_or_twelve_with_the_last() -> None:
    assert candidate_depths(6) == [(1,), (2,), (3,), (4,), (5,), (6,)]
    deep = candidate_depths(40)
    assert len(deep) == 12 and deep[0] == (1,) and deep[-1] == (40,)
