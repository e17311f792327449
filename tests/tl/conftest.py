"""One small phantom, tiled once; every test that writes takes its own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.adapter._saved_reading import reading_parts
from pekasc.models.features import BatchEncoder, ReadingEncoder

# one ridge regression: what is tested here is not how good a reading gets
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
# the published schedule always trains, so that no test looks at an adapter that is left at zero
TRAINED: dict[str, Any] = {
    "recipe": pk.Recipe.preset("paper").replace(
        rank=16, n_clusters=4, teacher_components=10, epochs=2, learning_rate=3e-3, cluster_head_epochs=5
    ),
    "readout": RIDGE.replace(depth=2, n_components=10), "compute": {"device": "cpu"}, "progress": False,
}  # fmt: skip
TRAIN = ["P1S1_spots"]


def copy_of(sdata: SpatialData) -> SpatialData:
    """Return an object with a table and shapes of its own; images are shared, for nothing may write to them."""
    return SpatialData(
        images=dict(sdata.images),
        shapes={name: shapes.copy() for name, shapes in sdata.shapes.items()},
        tables={name: table.copy() for name, table in sdata.tables.items()},
    )


@pytest.fixture(scope="session")
def _plain() -> SpatialData:
    return pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=24)


@pytest.fixture(scope="session")
def _tiled(_plain: SpatialData) -> SpatialData:
    sdata = copy_of(_plain)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return sdata


@pytest.fixture
def unknown(untiled: SpatialData) -> SpatialData:
    """Return the same, and nothing says the pixel size: no record, no attributes of images, no lattice."""
    del untiled["table"].uns["pekasc"]["image_mpp"], untiled["table"].obs["array_row"]
    for name, image in list(untiled.images.items()):
        untiled.images[name] = image.copy()  # other tests have the same image
        del untiled.images[name]["scale0"]["image"].attrs["pekasc"]
    return untiled


@pytest.fixture
def untiled(_plain: SpatialData) -> SpatialData:
    """Return two patients with a section each, without tiles."""
    return copy_of(_plain)


@pytest.fixture
def tiled(_tiled: SpatialData) -> SpatialData:
    """Return two patients with a section each, tiled."""
    return copy_of(_tiled)


@pytest.fixture(scope="session")
def adapter(_tiled: SpatialData) -> pk.Adapter:
    """Return an adapter that was trained on the first patient."""
    return pk.tl.fit_adapter(copy_of(_tiled), train=TRAIN, **TRAINED)


@pytest.fixture(scope="session")
def frozen(_tiled: SpatialData) -> pk.Adapter:
    """Return the frozen encoder with a head for the first patient."""
    return pk.tl.fit_adapter(
        copy_of(_tiled), train=TRAIN, method=None, readout=RIDGE, compute={"device": "cpu"}, progress=False
    )


@pytest.fixture(scope="session")
def blend(_tiled: SpatialData) -> pk.Adapter:
    """Return an adapter beside the frozen encoder at all depths, with spatial context and a wider field of view."""
    readout = pk.Readout(context_um=150, fields_um=(224,), n_components=10)
    return pk.tl.fit_adapter(copy_of(_tiled), **{**TRAINED, "readout": readout})


@pytest.fixture(scope="session")
def _predicted(_tiled: SpatialData, adapter: pk.Adapter) -> SpatialData:
    sdata = copy_of(_tiled)
    pk.tl.predict_expression(sdata, adapter, progress=False, compute={"device": "cpu"})
    return sdata


@pytest.fixture
def predicted(_predicted: SpatialData) -> SpatialData:
    """Return both patients with predictions."""
    return copy_of(_predicted)


def bits(adapter: pk.Adapter) -> dict[str, bytes]:
    """Return all numbers of an adapter as bytes."""
    arrays = {**reading_parts(adapter.reading)[1], "scores": adapter.gene_scores.to_numpy(),
              "history": adapter.history.drop(columns=["held_out", "peak_memory"]).to_numpy(),
              "errors": adapter.selection["error"].to_numpy(), **adapter.trained_on}  # fmt: skip
    arrays |= {f"{kind}.{name}": t.numpy() for kind, state in adapter.weights.items() for name, t in state.items()}
    return {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="session")
def all_bits() -> Callable[[pk.Adapter], dict[str, bytes]]:
    """Return :func:`bits`."""
    return bits


@pytest.fixture(scope="session")
def trained_options() -> dict[str, Any]:
    """Return options of a small fit that always trains."""
    return dict(TRAINED)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tiles that go through an encoder (but for the empty one that tells the width)."""
    seen: list[int] = []

    def counting(forward: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
        def spy(self: BatchEncoder, tiles: np.ndarray) -> list[torch.Tensor]:
            if tiles.any():
                seen.append(len(tiles))
            return forward(self, tiles)

        return spy

    for cls in (BatchEncoder, ReadingEncoder):  # each has its own
        monkeypatch.setattr(cls, "_forward", counting(cls.__dict__["_forward"]))
    return seen
