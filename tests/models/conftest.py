"""One adapter, fitted on arrays, for all tests of what an adapter can do."""

from __future__ import annotations

import numpy as np
import pytest

import pekasc as pk


@pytest.fixture(scope="session")
def adapter() -> pk.Adapter:
    """Return a small trained adapter on two blocks of `tiny`."""
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=20)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    # the published schedule always trains, so that the adapter is not left at zero
    return pk.tl.fit_adapter(
        sdata, preset="paper", rank=16, n_clusters=4, n_components=10, epochs=1, learning_rate=3e-3, depth=2,
        device="cpu", progress=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiles() -> np.ndarray:
    """Return tiles that the adapter takes."""
    return np.random.default_rng(0).integers(0, 256, (9, 56, 56, 3)).astype(np.uint8)
