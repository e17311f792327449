"""Intervals in a table's record are found by the genes' names."""

from __future__ import annotations

import numpy as np

from pekasc.models.trust import COUNTS, Calibration, Noise, interval_record, intervals_of


def test_genes_are_found_by_name() -> None:
    noise = Noise(COUNTS, np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3]), np.array([0.01, 0.02, 0.03]))
    calibration = Calibration(noise, np.array([0.7, 0.8, np.nan]), 0.9, "approximate", ("a", "b"), "groups")
    record = interval_record(calibration, np.array([2, 0]), ["C", "A"])
    assert record["level"] == 0.9 and record["groups"] == ["a", "b"]
    found, threshold = intervals_of(record, ["A", "?", "C"])
    np.testing.assert_array_equal(threshold, [0.7, np.nan, np.nan])
    np.testing.assert_array_equal(found.scale, [1.0, 1.0, 3.0])
    np.testing.assert_array_equal(found.spread, [0.1, 1.0, 0.3])
