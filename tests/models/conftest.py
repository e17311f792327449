"""Two small sections, one adapter fitted on them for all tests of what it can do, and adapters put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftConfig
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.heads._registry import Head
from pekasc.models.heads._ridge import fit_ridge
from pekasc.tiling import TileSpec


@pytest.fixture(scope="session")
def _sections() -> SpatialData:
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=20, n_spots=24)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return sdata


@pytest.fixture
def sections(_sections: SpatialData) -> SpatialData:
    """Return two patients with a section each, tiled, 48 spots in all; images and shapes are shared."""
    return SpatialData(
        images=dict(_sections.images), shapes=dict(_sections.shapes), tables={"table": _sections["table"].copy()}
    )


@pytest.fixture(scope="session")
def adapter(_sections: SpatialData) -> pk.Adapter:
    """Return a small trained adapter on two blocks of `tiny`."""
    sdata = SpatialData(
        images=dict(_sections.images), shapes=dict(_sections.shapes), tables={"table": _sections["table"].copy()}
    )
    # the published schedule always trains, so that the adapter is not left at zero
    recipe = pk.Recipe.preset("paper").replace(
        rank=16, n_clusters=4, teacher_components=10, epochs=1, learning_rate=3e-3
    )
    readout = pk.Readout(depth=2, n_components=10)
    return pk.tl.fit_adapter(sdata, recipe=recipe, readout=readout, compute={"device": "cpu"}, progress=False)


@pytest.fixture(scope="session")
def tiles() -> np.ndarray:
    """Return tiles that the adapter takes."""
    return np.random.default_rng(0).integers(0, 256, (9, 56, 56, 3)).astype(np.uint8)


def make_adapter(
    encoder: EncoderNetwork,
    *,
    width: int,
    head: Head | None = None,
    config: PeftConfig | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    **changes: Any,
) -> pk.Adapter:
    """Return an adapter that nobody fitted, on the last block of `encoder`, whose features have `width` columns."""
    rng = np.random.default_rng(0)
    if head is None:
        head = fit_ridge(rng.normal(size=(20, width)), rng.normal(size=(20, 3)), 5).head(1.0)
    fields: dict[str, Any] = {
        "encoder": encoder.encoder, "encoder_digest": encoder.digest, "spec": TileSpec(encoder.tile_px, 1.0),
        "depth": (encoder.n_blocks,), "method": "frozen" if config is None else "mine", "head": head, "config": config,
        "genes": tuple(f"G{i}" for i in range(head.predict(np.zeros((1, head.projection.mean.size))).shape[1])),
        "weights": {} if state is None else {"adapter": state},
        "gene_scores": pd.DataFrame({"pearson": [0.5]}, index=pd.Index(["G0"], name="gene")),
        "history": pd.DataFrame({"epoch": [0]}), "selection": pd.DataFrame({"stage": ["frozen"]}),
        "info": {"n_spots": 20},
    }  # fmt: skip
    return pk.Adapter(**{**fields, **changes})


@pytest.fixture(scope="session")
def put_together() -> Callable[..., pk.Adapter]:
    """Return :func:`make_adapter`."""
    return make_adapter
