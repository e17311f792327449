"""What a fit keeps of held-out groups: noise, and scores by noise that the group had no part in."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pekasc.models.trust import COUNTS, EDGES, RESIDUALS, Block, from_held_out, held_out

GENES = 700  # more than a chunk


def blocks(shift: float = 1.0, *, counts: bool = True) -> list[Block]:
    """Return four groups in three folds, predicted without bias but for a factor in the last one."""
    rng = np.random.default_rng(0)
    made = []
    for number, (group, fold) in enumerate((("a", 0), ("b", 1), ("c", 1), ("d", 2))):
        predicted = rng.uniform(1.0, 3.0, (150, GENES)).astype(np.float32)
        total = rng.uniform(2000.0, 6000.0, 150)
        factor = shift if group == "d" else 1.0
        rates = factor * np.expm1(predicted) * rng.gamma(4.0, 0.25, predicted.shape)
        values = rng.poisson(rates * total[:, None] / 1e4).astype(np.float64)
        if not counts:
            values = predicted + rng.normal(0, 0.5, predicted.shape)
        known = np.ones(GENES, dtype=bool)
        known[0] = number > 0
        known[1] = False

        def part_of(values: np.ndarray, part: slice) -> np.ndarray:
            return values[:, part]

        given = partial(part_of, predicted), partial(part_of, values)
        made.append(Block(group, fold, *given, total if counts else None, known))
    return made


def test_noise_and_scores_of_counts() -> None:
    kept = held_out(blocks(), GENES)
    assert kept.groups == ("a", "b", "c", "d") and kept.noise.kind == COUNTS
    assert np.median(kept.noise.scale) == pytest.approx(1.0, abs=0.03)
    assert np.median(kept.noise.spread) == pytest.approx(0.25, abs=0.05)
    assert kept.cumulative.shape == (GENES, len(EDGES)) and kept.cumulative.dtype == np.float32
    assert np.isnan(kept.cumulative[1]).all() and np.isfinite(kept.cumulative[0]).all()
    # what is well described has uniform scores
    np.testing.assert_allclose(np.nanmean(kept.cumulative, axis=0), EDGES, atol=0.02)
    found = from_held_out(kept, 0.9)
    assert np.isnan(found.threshold[1]) and np.nanmedian(found.threshold) == pytest.approx(0.9, abs=0.02)
    assert found.reachable == pytest.approx(0.8) and "4 groups could give 80% at most" in found.text


def test_a_group_is_scored_by_the_noise_of_others() -> None:
    plain, odd = held_out(blocks(), GENES), held_out(blocks(shift=2.0), GENES)
    at = np.searchsorted(EDGES, 0.9)
    # what the others know of the mean does not fit it, which its own noise would hide
    assert odd.curve[3, at] < plain.curve[3, at] - 0.1
    assert np.nanmedian(from_held_out(odd, 0.9).threshold) > np.nanmedian(from_held_out(plain, 0.9).threshold)


def test_residuals_of_values_that_are_no_counts() -> None:
    kept = held_out(blocks(counts=False), GENES)
    assert kept.noise.kind == RESIDUALS
    assert np.median(kept.noise.spread) == pytest.approx(0.5, abs=0.02)
    low, high = kept.noise.rate_bounds(np.zeros((1, GENES), np.float32), from_held_out(kept, 0.9).threshold)
    assert np.nanmedian(high - low) == pytest.approx(2 * 1.645 * 0.5, rel=0.06)
