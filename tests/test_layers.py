"""The error about a layer that is not there says where predictions are, or how to make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData

import pekasc as pk
from pekasc._keys import write_uns
from pekasc._layers import missing_layer

READERS: dict[str, Callable[[SpatialData], Any]] = {
    "slide": lambda sdata: pk.pl.slide(sdata, "B"),
    "expression": lambda sdata: pk.get.expression(sdata, table_name="grid"),
    "interval": lambda sdata: pk.get.interval(sdata, table_name="grid"),
    "geojson": lambda sdata: pk.io.write_geojson(sdata, "never.geojson", genes="B"),
    "rasterize": lambda sdata: pk.tl.rasterize_expression(sdata, "B"),
}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> SpatialData:
    """Return a slide whose predictions were kept in a store, as it is after reading."""
    sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=2.0, n_genes=8)
    pk.pp.tile_grid(sdata, "P1S1_he", tile_px=56, mpp=2.0)
    grid = sdata["grid"]
    table = AnnData(obs=grid.obs, var={"gene": ["A", "B"]}, uns=grid.uns)
    table.var_names = ["A", "B"]
    write_uns(table, "peka", {"store": "predictions.zarr"}, kind="prediction")
    sdata.tables["grid"] = table
    path = tmp_path_factory.mktemp("layers") / "slide.zarr"
    sdata.write(path)
    return sd.read_zarr(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", READERS)
def test_predictions_in_a_store(slide: SpatialData, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        KeyError,
        match=r"Layer 'peka' not found.*\[\]. Its predictions are in a store: `pekasc.io.attach_predictions\(sdata\)`",
    ):
        READERS[call](slide)
    assert not any(tmp_path.iterdir())


def test_without_predictions() -> None:
    adata = AnnData(np.ones((3, 2)), layers={"own": np.ones((3, 2))})
    with pytest.raises(
        KeyError, match=r"Layer 'peka' not found. Available layers: \['own'\]. Predict first: `pekasc.tl"
    ):
        pk.get.expression(adata)
    assert "predict_expression(sdata, adapter, table_name='grid')`." in str(missing_layer(adata, "peka", "grid"))


def test_of_a_target_that_is_no_gene() -> None:
    adata = AnnData(np.ones((3, 2)), obsm={"X_peka_types": np.ones((3, 2))})
    write_uns(adata, "X_peka_types", {"obsm": "types", "key_added": "peka"}, kind="prediction")
    assert "no gene: it is in `obsm` (target 'types')" in str(missing_layer(adata, "peka"))
