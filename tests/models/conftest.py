"""Two small sections, one adapter fitted on them for all tests of what it can do, and adapters put together by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftConfig
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.heads import LinearHead, Member, Reading, Source, linear_block
from pekasc.models.heads._ridge import RidgeFit, fit_ridge
from pekasc.tiling import TileSpec

PHANTOM = {"n_patients": 2, "size_um": 700, "mpp": 1.0, "n_genes": 20, "n_spots": 24}
# an adapter at the second block, the first frozen, trained in a second
FIT: dict[str, Any] = {
    "recipe": pk.Recipe(rank=8, blocks=1, epochs=2, n_views=2, batch_size=8, cluster_head_epochs=2, learning_rate=3e-3),
    "readout": pk.Readout(head="ridge", depth=2, selection="best", context_um=None, fields_um=None),
    "compute": pk.Compute(device="cpu"),
}


@pytest.fixture(scope="session")
def make_sections() -> Callable[[], SpatialData]:
    """Return a function that returns two patients with a section each, tiled, 48 spots in all.

    Every object has a table of its own; images and shapes are shared.
    """
    sdata = pk.datasets.phantom(**PHANTOM)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)

    def copy() -> SpatialData:
        return SpatialData(
            images=dict(sdata.images), shapes=dict(sdata.shapes), tables={"table": sdata["table"].copy()}
        )

    return copy


@pytest.fixture
def sections(make_sections: Callable[[], SpatialData]) -> SpatialData:
    """Return two patients with a section each, tiled."""
    return make_sections()


def quick_fit(sdata: SpatialData, **changes: Any) -> pk.Adapter:
    """Return a small fit; `recipe`, `readout` and `compute` are changes to :data:`FIT`."""
    how = {name: options.replace(**changes.pop(name, {})) for name, options in FIT.items()}
    return pk.tl.fit_adapter(sdata, **{"groups": "patient", "progress": False, **how, **changes})


@pytest.fixture(scope="session")
def fit() -> Callable[..., pk.Adapter]:
    """Return :func:`quick_fit`."""
    return quick_fit


@pytest.fixture(scope="session")
def fit_script() -> str:
    """Return the start of a script that makes the two sections and defines `quick_fit`, for another process."""
    return f"""
import torch
torch.set_num_threads(1)
from typing import Any
import pekasc as pk
from pekasc import Compute, Readout, Recipe
from spatialdata import SpatialData
FIT = {FIT!r}
{inspect.getsource(quick_fit)}
sdata = pk.datasets.phantom(**{PHANTOM!r})
pk.pp.tile(sdata, tile_px=56, mpp=2.0)
"""


def all_numbers(adapter: pk.Adapter) -> dict[str, bytes]:
    """Return all numbers of an adapter as bytes."""
    arrays: dict[str, np.ndarray] = {
        "scores": adapter.gene_scores.to_numpy(),
        "selection": adapter.selection[["epochs", "rank", "alpha", "error", "weight"]].to_numpy(),
        "history": adapter.history.drop(columns=["held_out", "peak_memory"]).to_numpy(), **adapter.trained_on,
    }  # fmt: skip
    for i, member in enumerate(adapter.reading.members):
        arrays[f"{i} {member.name} {member.weight}"] = member.head.intercept
        for j, block in enumerate(member.head.blocks):
            arrays |= {f"{i} {j} offset": block.offset, f"{i} {j} out": block.out}
            for source, linear in block.maps.items():
                for name, array in vars(linear).items():
                    arrays[f"{i} {j} {source} {name}"] = np.zeros(0) if array is None else array
    arrays |= {f"{kind}.{name}": t.numpy() for kind, state in adapter.weights.items() for name, t in state.items()}
    return {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="session")
def numbers() -> Callable[[pk.Adapter], dict[str, bytes]]:
    """Return :func:`all_numbers`."""
    return all_numbers


@pytest.fixture(scope="session")
def adapter(make_sections: Callable[[], SpatialData]) -> pk.Adapter:
    """Return a small trained adapter on two blocks of `tiny`: a blend with spatial context and a wider field."""
    # the published schedule always trains, so that the adapter is not left at zero
    recipe = pk.Recipe.preset("paper").replace(
        rank=16, n_clusters=4, teacher_components=10, epochs=1, learning_rate=3e-3
    )
    readout = pk.Readout(depth=2, n_components=10, context_um=200, fields_um=(168,))
    return pk.tl.fit_adapter(make_sections(), recipe=recipe, readout=readout, compute={"device": "cpu"}, progress=False)


@pytest.fixture(scope="session")
def tiles() -> np.ndarray:
    """Return tiles that the adapter takes."""
    return np.random.default_rng(0).integers(0, 256, (9, 56, 56, 3)).astype(np.uint8)


def ridge_reading(
    fit: RidgeFit, alpha: Any, sources: Sequence[Source], context_um: float | None = None, name: str = "frozen:ridge"
) -> Reading:
    """Return the reading of one ridge regression on the features of some sources, concatenated."""
    p = fit.projection
    matrix = (p.components / p.scale).T
    block = linear_block(matrix, p.mean, fit.coef(alpha), sources, context=context_um is not None)
    return Reading((Member(name, 1.0, LinearHead((block,), fit.intercept.astype(np.float32), context_um)),))


@pytest.fixture(scope="session")
def plain_reading() -> Callable[..., Reading]:
    """Return :func:`ridge_reading`."""
    return ridge_reading


def make_adapter(
    encoder: EncoderNetwork,
    *,
    width: int = 0,
    reading: Reading | None = None,
    config: PeftConfig | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    **changes: Any,
) -> pk.Adapter:
    """Return an adapter that nobody fitted, on the last block of `encoder`, whose features have `width` columns."""
    rng = np.random.default_rng(0)
    if reading is None:
        network = "frozen" if config is None else "adapted"
        fit = fit_ridge(rng.normal(size=(20, width)), rng.normal(size=(20, 3)), 5)
        reading = ridge_reading(fit, 1.0, [Source(network, 0, (encoder.n_blocks,))], name=f"{network}:ridge")
    genes = [f"G{i}" for i in range(reading.n_genes)]
    fields: dict[str, Any] = {
        "encoder": encoder.encoder, "encoder_digest": encoder.digest, "spec": TileSpec(encoder.tile_px, 1.0),
        "depth": (encoder.n_blocks,), "method": "frozen" if config is None else "mine", "reading": reading,
        "config": config, "genes": tuple(genes),
        "weights": {} if state is None else {"adapter": state},
        "gene_scores": pd.DataFrame({"pearson": 0.5}, index=pd.Index(genes, name="gene")),
        "history": pd.DataFrame({"epoch": [0]}), "selection": pd.DataFrame({"stage": ["frozen"]}),
        "info": {
            "n_spots": 20, "groups": ["P1"], "target": "log1p", "head": "ridge", "depth": "own", "epochs": 1,
            "versions": {},
        },
    }  # fmt: skip
    return pk.Adapter(**{**fields, **changes})


@pytest.fixture(scope="session")
def put_together() -> Callable[..., pk.Adapter]:
    """Return :func:`make_adapter`."""
    return make_adapter
