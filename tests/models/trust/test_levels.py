"""Levels of trust follow the rule that the documentation gives."""

from __future__ import annotations

import pandas as pd

from pekasc.models.trust import trust_levels


def test_levels() -> None:
    nan = float("nan")
    scores = pd.DataFrame(
        {"pearson": [0.5, 0.5, 0.4, 0.3, 0.2, 0.19, nan, 0.9], "lowest": [0.3, 0.1, 0.21, 0.0, 0.01, 0.19, nan, -0.1]}
    )
    found = trust_levels(scores)
    assert list(found) == ["high", "medium", "high", "low", "medium", "low", "low", "low"]
    assert found.ordered and list(found.categories) == ["low", "medium", "high"]
    one = trust_levels(scores.assign(n_sections=[1, 2, 2, 2, 2, 2, 0, 2]))
    assert list(one)[:3] == ["medium", "medium", "high"]  # one section says little
    # adapters of earlier versions know the mean alone
    assert list(trust_levels(scores[["pearson"]]))[:3] == ["high", "high", "high"]
