"""Figures are drawn without a display, and none is left open."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    matplotlib.use("Agg")
    style = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == style
    plt.close("all")


@pytest.fixture(scope="module")
def _predicted() -> SpatialData:
    sdata = pk.datasets.phantom(2, size_um=700, mpp=2.0, n_genes=8)
    table = sdata["table"]
    truth = np.asarray(table.layers["truth"])
    layer = (truth + np.random.default_rng(0).normal(0, 0.2, truth.shape)).astype(np.float32)
    layer[:, 3] = np.nan
    layer[2] = np.nan
    table.layers["peka"] = layer
    return sdata


@pytest.fixture
def predicted(_predicted: SpatialData) -> Iterator[SpatialData]:
    """Two small sections with a layer "peka"; gene 3 and row 2 are not predicted. Plots must leave them as they are."""
    table = _predicted["table"]
    before = table.copy()
    yield _predicted
    assert list(table.obs) == list(before.obs)
    assert set(table.layers) == set(before.layers)
    assert np.array_equal(table.layers["peka"], before.layers["peka"], equal_nan=True)
    assert set(_predicted.shapes) == {"P1S1_spots", "P2S1_spots"}
