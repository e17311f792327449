"""What a fit keeps of its tiles: which features tell novelty, and examples of known faults."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.selection import _trust
from pekasc.models.trust import FAULTS

Fit = Callable[..., pk.Adapter]


def test_shallow_depths() -> None:
    blocks = [(i,) for i in range(1, 13)]
    assert _trust._shallow(blocks, 12) == [(2,), (4,), (6,)]
    assert _trust._shallow([(1,), (2,)], 4) == [(1,), (2,)]
    assert _trust._shallow([None], 12) == [None]


@pytest.mark.parametrize("depth", ["all", 2])
def test_faults_are_told_by_the_middle_of_the_shallow_depths(
    make_sections: Callable[[], SpatialData], fit: Fit, depth: str | int
) -> None:
    adapter = fit(make_sections(), method=None, readout={"depth": depth})
    assert adapter.novelty is not None
    faults = adapter.novelty.distance.faults
    used = (faults.weights != 0).any(axis=0).nonzero()[0]
    width = faults.weights.shape[1] // len(adapter.novelty.depths)
    middle = (len(adapter.novelty.depths) - 1) // 2
    assert faults.names == FAULTS
    assert middle * width <= used.min() and used.max() < (middle + 1) * width


def test_too_few_tiles_to_show_faults_to_are_said(
    make_sections: Callable[[], SpatialData],
    fit: Fit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_trust, "_EXAMPLES", 1)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        adapter = fit(make_sections(), method=None)
    assert adapter.novelty is not None and not adapter.novelty.distance.faults.names
    assert "Too few training tiles to show faults to: novelty is the distance to them alone." in caplog.text
