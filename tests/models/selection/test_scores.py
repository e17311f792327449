"""Scores and their bootstrap: against scipy, and against resampling spots one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr

from pekasc.models.selection._scores import BlockScores, gene_scores, interval, mean_score, tissue_blocks


@pytest.fixture
def values() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    measured = rng.poisson(2.0, size=(120, 6)).astype(np.float32)
    predicted = (0.5 * measured + rng.normal(size=measured.shape)).astype(np.float32)
    coords = rng.uniform(0, 4000, size=(120, 2))
    return predicted, measured, coords


def test_scores_are_pearsons(values: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, measured, _ = values
    want = [pearsonr(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
    np.testing.assert_allclose(gene_scores(predicted, measured), want, atol=1e-6)


def test_constant_genes(values: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    predicted, measured, _ = (v.copy() for v in values)
    measured[:, 0] = 3.0
    predicted[:, 1] = 0.1
    r = gene_scores(predicted, measured)
    assert np.isnan(r[0])  # nothing to know
    assert r[1] == 0  # not predicting is not rewarded
    assert mean_score(r) == pytest.approx(r[1:].mean())
    assert np.isnan(mean_score(np.array([np.nan])))


def test_blocks_are_squares_within_sections() -> None:
    coords = np.array([[0, 0], [999, 999], [1000, 0], [0, 0], [-1, 0]], dtype=float)
    blocks = tissue_blocks(coords, np.array(["a", "a", "a", "b", "a"]), 1000.0)
    assert blocks[0] == blocks[1]
    assert len(set(blocks.tolist())) == 4
    assert sorted(set(blocks.tolist())) == [0, 1, 2, 3]


def test_a_draw_equals_scoring_the_spots_of_the_drawn_blocks(
    values: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    predicted, measured, coords = (v.copy() for v in values)
    measured[:, 2] = 1.0
    predicted[:, 3] = 0.5
    blocks = tissue_blocks(coords, np.zeros(len(coords)), 1000.0)
    draw = BlockScores(measured, blocks, 20, random_state=3)
    got = draw(predicted)
    for value, times in zip(got, draw.draws, strict=True):
        rows = np.concatenate([np.repeat(np.flatnonzero(blocks == b), t) for b, t in enumerate(times)])
        assert value == pytest.approx(mean_score(gene_scores(predicted[rows], measured[rows])), abs=1e-6)


def test_interval_covers_and_narrows() -> None:
    rng = np.random.default_rng(1)
    covered, width = 0, {}
    for n in (200, 3200):
        for i in range(40):
            y = rng.normal(size=(n, 1))
            x = 0.6 * y + 0.8 * rng.normal(size=(n, 1))
            low, high = interval(BlockScores(y, np.arange(n) // 5, 300, random_state=i)(x))
            covered += low <= 0.6 <= high
            width[n] = high - low
    assert covered >= 0.85 * 80
    assert width[3200] < 0.4 * width[200]


def test_interval_of_nothing_is_nan() -> None:
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_draws_keep_the_number_of_blocks_of_a_section() -> None:
    blocks = np.arange(12)
    sections = np.repeat(["a", "b"], [4, 8])
    draws = BlockScores(
        np.random.default_rng(0).normal(size=(12, 2)), blocks, 50, random_state=0, strata=sections
    ).draws
    assert (draws[:, :4].sum(axis=1) == 4).all() and (draws[:, 4:].sum(axis=1) == 8).all()
