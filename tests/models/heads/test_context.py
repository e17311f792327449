"""Spatial context: neighbours of a section, on a spot's own side of a fold."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.models.heads._context import cuts_sections, with_context
from pekasc.models.selection._choice import choose
from pekasc.models.selection._folds import InnerFold, inner_folds


@pytest.fixture
def strip() -> tuple[np.ndarray, np.ndarray]:
    """Return 90 spots on a line, 100 um apart, of one section."""
    return np.column_stack([np.arange(90) * 100.0, np.zeros(90)]), np.full(90, "S")


def test_means_of_neighbours_by_hand() -> None:
    coords = np.array([[0.0, 0], [100, 0], [200, 0], [0, 0]])
    sections = np.array(["a", "a", "a", "b"])
    x = np.array([[1.0], [2], [4], [8]], dtype=np.float32)
    found = with_context(x, coords, sections, 100.0)
    # the last has none, and is its own
    np.testing.assert_allclose(found, [[1, 2], [2, 2.5], [4, 2], [8, 8]])
    assert found.dtype == np.float32


def test_no_side_of_a_fold_looks_at_the_other(strip: tuple[np.ndarray, np.ndarray]) -> None:
    coords, sections = strip
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4)).astype(np.float32)
    for fold in inner_folds(np.full(90, "one"), coords, sections, margin_um=150.0):
        before = with_context(x, coords, sections, 300.0, fold)
        for own, other in ((fold.train, fold.held_out), (fold.held_out, fold.train)):
            changed = x.copy()
            changed[np.setdiff1d(np.arange(90), own)] += 100  # the margin included
            after = with_context(changed, coords, sections, 300.0, fold)
            np.testing.assert_array_equal(after[own], before[own])
            assert not np.array_equal(after[other], before[other])
        # without the fold they do
        assert not np.array_equal(with_context(x, coords, sections, 300.0)[fold.train], before[fold.train])


def test_folds_of_whole_sections_have_the_context_of_all(strip: tuple[np.ndarray, np.ndarray]) -> None:
    coords, _ = strip
    sections = np.repeat(["A", "B", "C"], 30)
    x = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    for fold in inner_folds(sections, coords, sections, margin_um=150.0):
        assert not cuts_sections(sections, fold)
        np.testing.assert_array_equal(
            with_context(x, coords, sections, 300.0, fold), with_context(x, coords, sections, 300.0)
        )
        assert cuts_sections(np.repeat(["A", "B"], 45), fold)
    for fold in inner_folds(np.full(90, "one"), coords, np.full(90, "S"), margin_um=150.0):
        assert cuts_sections(np.full(90, "S"), fold)


def test_a_choice_sees_each_folds_own_context(strip: tuple[np.ndarray, np.ndarray]) -> None:
    coords, sections = strip
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(90, 4)).astype(np.float32), rng.normal(size=(90, 6))
    folds = inner_folds(np.full(90, "one"), coords, sections, margin_um=150.0)
    asked: list[str] = []

    def seen(features: np.ndarray, fold: InnerFold) -> np.ndarray:
        asked.append(fold.name)
        return with_context(features, coords, sections, 300.0, fold)

    choose({(1,): x}, y, folds, None, seen)
    assert asked == [fold.name for fold in folds]
