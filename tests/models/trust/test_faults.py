"""Known faults: scores are 0 for good tiles and 1 for the average example, and limits are what held-out tiles reach."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.models.trust import Examples, distance_to, novelty_of
from pekasc.models.trust._faults import faults_from, limits_of, no_faults

D = 40
COLUMNS = slice(10, 40)


def good(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return features, (n, 40) float32, of which the first 20 vary much and the others little."""
    return (rng.normal(size=(n, D)) * np.repeat([5.0, 0.5], 20)).astype(np.float32)


def examples_of(x: np.ndarray, rows: np.ndarray, by: float = 2.5) -> Examples:
    """Return examples of two faults, each along a feature that varies little, and of what is none."""
    faults = {}
    for name, at in (("one", 30), ("two", 35)):
        changed = x[rows].copy()
        changed[:, at] += by
        faults[name] = changed[:, COLUMNS]
    tolerated = x[rows].copy()
    tolerated[:, 20] += 1.0
    return Examples(rows, COLUMNS, faults, (tolerated[:, COLUMNS],))


def test_scores_of_good_tiles_and_of_examples() -> None:
    rng = np.random.default_rng(0)
    x = good(rng, 600)
    examples = examples_of(x, np.arange(0, 600, 20))
    faults = faults_from(x, examples)
    assert faults.names == ("one", "two") and faults.weights.dtype == np.float32
    assert (faults.weights[:, :10] == 0).all()  # they are no part of the examples
    new = good(rng, 500)
    spoilt = new.copy()
    spoilt[:, 30] += 2.5
    assert abs(faults(new).mean()) < 0.1
    assert faults(spoilt)[:, 0].mean() == pytest.approx(1, abs=0.1) and abs(faults(spoilt)[:, 1].mean()) < 0.15
    halved = faults.divided_by(np.array([2.0, 0.5]))
    np.testing.assert_allclose(halved(new), faults(new) / [2.0, 0.5], rtol=1e-4, atol=1e-5)
    assert no_faults(D)(new).shape == (500, 0)


def test_limits_are_reached_by_one_in_a_hundred_and_know_what_is_tolerated() -> None:
    rng = np.random.default_rng(1)
    x = good(rng, 4000)
    examples = examples_of(x, np.arange(0, 4000, 40))
    faults = faults_from(x, examples)
    nothing = examples.part(np.array([], dtype=np.int64))
    assert [len(f) for f in nothing.faults.values()] == [0, 0]
    limits = limits_of([(faults, faults(x[:2000]), nothing), (faults, faults(x[2000:]), nothing)])
    shares = [(faults(part) > limits).mean(axis=0) for part in (x[:2000], x[2000:])]
    np.testing.assert_allclose(np.max(shares, axis=0), 0.01, atol=0.002)
    # the larger of the folds, and no lower with what is tolerated
    alone = limits_of([(faults, faults(x[:2000]), nothing)])
    assert (limits >= alone).all()


@pytest.mark.parametrize("n", [200, 10_000])
def test_what_is_tolerated_is_no_fault_however_many_good_tiles_there_are(n: int) -> None:
    rng, rows = np.random.default_rng(4), np.arange(n)
    x = good(rng, n)
    some = np.linspace(0, n - 1, 30).astype(int)
    examples = examples_of(x, some, by=4.0)
    half = x[some].copy()
    half[:, 30] += 1.6  # of the first fault, two fifths
    examples = Examples(some, COLUMNS, examples.faults, (half[:, COLUMNS],))
    folds = [(rows[rows % 3 != i], rows[rows % 3 == i]) for i in range(3)]
    novelty = novelty_of(x, folds, [None], examples)
    p = {}
    for by in (0.0, 1.6, 4.0):
        new = good(rng, 2000)
        new[:, 30] += by
        p[by] = (novelty.p_values(novelty.distance(new)) < 0.05).mean()
    assert p[0.0] < 0.1 and p[1.6] < 0.3 and p[4.0] > 0.9


def test_a_fault_that_the_distance_hardly_shows_is_novel() -> None:
    rng = np.random.default_rng(2)
    x, rows = good(rng, 900), np.arange(900)
    folds = [(rows[rows % 3 != i], rows[rows % 3 == i]) for i in range(3)]
    known = novelty_of(x, folds, [(1,), (2,)], examples_of(x, np.arange(0, 900, 10)))
    alone = novelty_of(x, folds, [(1,), (2,)])
    assert known.distance.faults.names == ("one", "two") and not alone.distance.faults.names
    new = good(rng, 600)
    spoilt = new.copy()
    spoilt[:, 30] += 2.5
    share = {name: (n.p_values(n.distance(spoilt)) < 0.05).mean() for name, n in (("known", known), ("alone", alone))}
    assert share["known"] > 0.9 and share["alone"] < 0.75
    assert 0.01 < (known.p_values(known.distance(new)) < 0.05).mean() < 0.09  # and no more false alarms
    # the distance is that of before, or the score, each over what held-out tiles reach
    far = distance_to(x, known.distance.sd.size)(new) / known.distance.scale
    scores = known.distance.faults(new)
    np.testing.assert_allclose(known.distance(new), np.maximum(far, scores.max(axis=1)), rtol=1e-4)


def test_without_examples_in_every_fold_it_is_the_distance_alone() -> None:
    x, rows = good(np.random.default_rng(3), 300), np.arange(300)
    folds = [(rows[rows % 3 != i], rows[rows % 3 == i]) for i in range(3)]
    few = novelty_of(x, folds, [None], examples_of(x, np.array([0, 3])))  # all in the first held-out fold
    alone = novelty_of(x, folds, [None])
    assert not few.distance.faults.names and few.distance.scale == 1
    np.testing.assert_array_equal(few.reference, alone.reference)


def test_tiles_that_are_all_the_same() -> None:
    x = np.ones((30, D), np.float32)
    faults = faults_from(x, examples_of(x, np.arange(0, 30, 3)))
    assert np.isfinite(faults(x)).all()
    rows = np.arange(30)
    novelty = novelty_of(x, [(rows[:15], rows[15:]), (rows[15:], rows[:15])], [None], examples_of(x, rows))
    assert novelty.distance.scale > 0 and np.isfinite(novelty.reference).all()
