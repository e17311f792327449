"""Levels, guarantees and numbers of groups that do not go together are errors that say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pekasc.models.trust import COUNTS, EXACT, Noise, check_groups, check_level, from_groups


@pytest.mark.parametrize("level", [0, 1, -0.1, 1.5, "0.9", True, None])
def test_levels(level: Any) -> None:
    with pytest.raises(ValueError, match="`level` must be above 0 and below 1, such as 0.9, got"):
        check_level(level, EXACT)


def test_guarantees_and_groups() -> None:
    with pytest.raises(ValueError, match=r"`guarantee` must be one of \['approximate', 'exact'\], got 'sure'"):
        check_level(0.9, "sure")
    with pytest.raises(ValueError, match="needs 9 groups that the adapter never saw, and there are 8, .* 0.889"):
        check_groups(8, 0.9, EXACT)
    check_groups(9, 0.9, EXACT)
    check_groups(1, 0.9, "approximate")


def test_a_gene_that_too_few_groups_measured_has_no_interval() -> None:
    noise = Noise(COUNTS, np.ones(2), np.ones(2), np.zeros(2))
    scores = [np.column_stack([np.full(4, i / 10), np.full(4, i / 10 if i < 3 else np.nan)]) for i in range(9)]
    found = from_groups(noise, scores, list("abcdefghi"), 0.9, EXACT)
    assert found.threshold[0] == pytest.approx(0.8) and np.isnan(found.threshold[1])
    assert "(exact)" in found.text
