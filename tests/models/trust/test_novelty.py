"""Novelty: tiles like the training tiles are not novel, others are, and a p-value is one."""

from __future__ import annotations

import numpy as np

from pekasc.models.trust import distance_to, novelty_of


def features(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    latent = rng.normal(size=(n, 5)) * [5, 4, 3, 2, 1]
    mix = np.random.default_rng(9).normal(size=(5, 40))
    return (latent @ mix + rng.normal(size=(n, 40)) * 0.3 + shift).astype(np.float32)


def test_the_distance_is_that_of_mahalanobis() -> None:
    x = features(np.random.default_rng(0), 600)
    found = distance_to(x, n_components=39)(x)
    z = x - x.mean(axis=0)
    expected = np.einsum("ij,jk,ik->i", z, np.linalg.inv(np.cov(x.T)), z)
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    # along a component that was not kept, what is beside counts by its mean
    assert (
        distance_to(x, n_components=5)(x).mean() == np.float32(6).item() or abs(distance_to(x, 5)(x).mean() - 6) < 0.1
    )


def test_p_values() -> None:
    rng = np.random.default_rng(1)
    x = features(rng, 900)
    rows = np.arange(900)
    folds = [(rows[rows % 3 != i], rows[rows % 3 == i]) for i in range(3)]
    novelty = novelty_of(x, folds, [(1,), (2,)])
    assert novelty.n_tiles == (300, 300, 300) and novelty.reference.shape[0] == 3 and novelty.depths == ((1,), (2,))
    new, odd = features(rng, 600), features(rng, 50, shift=3.0)
    p = novelty.p_values(novelty.distance(new))
    assert p.dtype == np.float32 and (p > 0).all() and (p <= 1).all()
    assert 0.01 < (p < 0.05).mean() < 0.09
    assert novelty.p_values(novelty.distance(odd)).max() < 0.01
    # at the farthest held-out tile, what so many tiles can tell; less and less beyond it
    edge = novelty.reference[:, -1].max()
    at = novelty.p_values(np.array([edge, 1.1 * edge, 3 * edge, 1e9], dtype=np.float32))
    assert 1 / 301 <= at[0] < 0.005 and (np.diff(at) < 0).all() and at[3] < 1e-6
    assert np.isnan(novelty.p_values(np.array([np.nan], dtype=np.float32))[0])


def test_a_tile_that_one_held_out_patient_has_many_of_is_not_novel() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([features(rng, 300), features(rng, 300), features(rng, 300, shift=1.5)])
    rows = np.arange(900)
    folds = [(rows[rows // 300 != i], rows[rows // 300 == i]) for i in range(3)]
    novelty = novelty_of(x, folds, [None])
    p = novelty.p_values(novelty.distance(features(rng, 200, shift=1.5)))
    assert (p < 0.05).mean() < 0.1
