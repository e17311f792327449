"""Inner folds: groups are never mixed, and blocks of one tissue keep their distance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pekasc.models.selection._folds import MAX_FOLDS, inner_folds


def spots(n: int, n_sections: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, (3000, 1000), (n, 2)), np.repeat([f"S{i}" for i in range(n_sections)], n // n_sections)


@pytest.mark.parametrize("n_groups", [2, 3, 7])
def test_groups_are_never_mixed(n_groups: int) -> None:
    coords, _ = spots(210, 1)
    groups = np.random.default_rng(1).permutation(np.arange(210) % n_groups).astype(str)
    folds = inner_folds(groups, coords, groups, margin_um=112)
    assert len(folds) == min(MAX_FOLDS, n_groups)
    held_out = np.concatenate([fold.held_out for fold in folds])
    np.testing.assert_array_equal(np.sort(held_out), np.arange(210))  # every spot is held out once
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.held_out])
        assert len(fold.train) + len(fold.held_out) == 210
        assert fold.name == "+".join(sorted(set(groups[fold.held_out])))


def test_groups_that_cut_a_section_keep_a_margin() -> None:
    coords, sections = spots(300, 1)
    groups = np.where(coords[:, 0] < 1500, "left", "right")
    for fold in inner_folds(groups, coords, sections, margin_um=150):
        assert len(fold.train) + len(fold.held_out) < 300
        assert cdist(coords[fold.train], coords[fold.held_out]).min() >= 150


@pytest.mark.parametrize("n_sections", [1, 2])
def test_one_group_is_cut_into_blocks_with_a_margin(n_sections: int) -> None:
    coords, sections = spots(300, n_sections)
    folds = inner_folds(np.full(300, "patient"), coords, sections, margin_um=150)
    assert len(folds) == MAX_FOLDS
    np.testing.assert_array_equal(np.sort(np.concatenate([fold.held_out for fold in folds])), np.arange(300))
    for fold in folds:
        assert not set(fold.train) & set(fold.held_out)
        for section in np.unique(sections):
            train = coords[fold.train][sections[fold.train] == section]
            held_out = coords[fold.held_out][sections[fold.held_out] == section]
            assert cdist(train, held_out).min() >= 150
            # a band across the long axis, not random spots
            assert np.ptp(held_out[:, 0]) < 1500
        # nothing further away than the margin is lost
        lost = np.setdiff1d(np.arange(300), np.concatenate([fold.train, fold.held_out]))
        for i in lost:
            same = fold.held_out[sections[fold.held_out] == sections[i]]
            assert cdist(coords[[i]], coords[same]).min() < 150


def test_folds_do_not_depend_on_chance_but_on_places() -> None:
    coords, sections = spots(120, 1)
    groups = np.full(120, "one")
    first, second = (inner_folds(groups, coords, sections, 100) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.train, b.train)
    order = np.random.default_rng(3).permutation(120)
    moved = inner_folds(groups, coords[order], sections, 100)
    for a, b in zip(first, moved, strict=True):
        np.testing.assert_array_equal(a.held_out, np.sort(order[b.held_out]))


def test_too_few_spots_is_an_error_that_says_what_to_do() -> None:
    coords, sections = spots(9, 1)
    with pytest.raises(ValueError, match=r"Too few training spots .* 9 spots .*Give more spots"):
        inner_folds(np.full(9, "one"), coords, sections, 100)
    coords, sections = spots(60, 1)
    with pytest.raises(ValueError, match="Too few training spots"):
        inner_folds(np.full(60, "one"), coords, sections, 1e5)  # the margin takes all
    with pytest.raises(ValueError, match="Too few training spots"):
        inner_folds(np.array(["a"] * 59 + ["b"]), coords, sections, 100)
