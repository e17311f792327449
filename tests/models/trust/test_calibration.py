"""Levels, guarantees and numbers of groups that do not go together are errors that say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pekasc.models.trust import (
    COUNTS,
    EXACT,
    INSIDE,
    RESIDUALS,
    UNSEEN,
    Calibration,
    Noise,
    check_groups,
    check_level,
    usable,
)


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5, "0.9", True, None])
def test_levels(level: Any) -> None:
    with pytest.raises(ValueError, match="`level` must be above 0 and below 1, such as 0.9, got"):
        check_level(level, EXACT)


def test_guarantees_and_groups() -> None:
    with pytest.raises(ValueError, match=r"`guarantee` must be one of \['approximate', 'exact'\], got 'sure'"):
        check_level(0.9, "sure")
    with pytest.raises(ValueError, match="needs at least 9 groups that the adapter never saw, got 8: .* 0.889"):
        check_groups(8, 0.9, EXACT)
    check_groups(9, 0.9, EXACT)
    check_groups(1, 0.9, "approximate")


def test_where_no_interval_can_be_given() -> None:
    nothing = Noise(RESIDUALS, np.ones(3), np.array([1.0, 1e-12, 2.0]), np.zeros(3))
    # too few groups (infinite), no variance, and what lies beyond every interval
    np.testing.assert_array_equal(usable(nothing, np.array([0.8, 0.5, np.inf])), [0.8, np.nan, np.nan])
    np.testing.assert_array_equal(usable(nothing, np.array([1.0, 0.5, 0.9])), [np.nan, np.nan, 0.9])


def test_what_it_says_of_itself() -> None:
    noise = Noise(COUNTS, np.ones(1), np.ones(1), np.zeros(1))

    def text(level: float, guarantee: str, groups: str, source: str) -> str:
        return Calibration(noise, np.ones(1), level, guarantee, tuple(groups), source).text

    assert text(0.995, EXACT, "abc", UNSEEN) == "99.5% intervals from 3 groups that the adapter never saw (exact)"
    assert "(approximate, no promise: 3 groups could give 75% at most)" in text(0.9, "approximate", "abc", INSIDE)
    one = text(0.9, "approximate", "a", UNSEEN)
    assert one.startswith("90% intervals from 1 group that the adapter never saw (") and "1 group could give 50%" in one
    assert "held-out blocks of the one training group" in text(0.9, "approximate", "a", INSIDE)
