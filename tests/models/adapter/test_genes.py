from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pekasc.models.adapter import wanted_index

ADAPTER: Any = SimpleNamespace(genes=("ERBB2", "FASN", "CD74"))


def test_names_are_found_in_the_order_they_are_asked_for() -> None:
    assert wanted_index(ADAPTER, None).tolist() == [0, 1, 2]
    assert wanted_index(ADAPTER, "FASN").tolist() == [1]
    assert wanted_index(ADAPTER, ["CD74", "ERBB2", "CD74"]).tolist() == [2, 0]


def test_what_is_not_predicted_is_named() -> None:
    with pytest.raises(KeyError, match=r"does not predict 1 of the 2 genes asked for: \['Erbb2'\].*predicts 3.*ERBB2"):
        wanted_index(ADAPTER, ["FASN", "Erbb2"])
    with pytest.raises(ValueError, match="`genes=` is empty: name at least one gene"):
        wanted_index(ADAPTER, [])
