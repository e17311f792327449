"""`tl.embed_tiles`: which tiles, what they become, and which fields of the options are of use."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import torch

import pekasc as pk
from pekasc._keys import read_uns
from pekasc.models.encoders import EncoderNetwork, get_encoder
from pekasc.models.features import embed
from pekasc.tiling import ArrayTiles

QUICK: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}


def test_features_follow_the_table(tiled: sd.SpatialData) -> None:
    pk.tl.embed_tiles(tiled, "tiny", **QUICK)
    features = tiled["table"].obsm["X_tiny"]
    assert features.dtype == np.float32
    assert features.shape == (tiled["table"].n_obs, 512)
    # by rows: the same tiles, embedded as arrays, after the last block
    tiles = ArrayTiles(pk.get.tiles(tiled).to_numpy())
    model = EncoderNetwork(get_encoder("tiny"), 56)
    expected = embed(model, tiles, [(6,)], batch_size=16, device=torch.device("cpu"))[(6,)]
    np.testing.assert_allclose(features, expected, atol=1e-4)
    record = read_uns(tiled["table"], "X_tiny")
    assert record is not None
    assert (record["tile_px"], record["mpp"], record["depth"]) == (56, 2.0, "6")
    assert record["encoder_digest"] == model.digest


def test_depths_are_joined_and_rows_without_a_tile_are_nan(tiled: sd.SpatialData) -> None:
    table = tiled["table"]
    table.obs["in_tissue"] = np.arange(table.n_obs) > 2
    pk.pp.tile(tiled, tile_px=56, mpp=2.0)
    pk.tl.embed_tiles(tiled, "tiny", key_added="two", readout={"depth": (2, -1)}, **QUICK)
    pk.tl.embed_tiles(tiled, "tiny", key_added="one", readout={"depth": 2}, **QUICK)
    assert table.obsm["two"].shape[1] == 1024
    assert np.isnan(table.obsm["two"][:3]).all()
    np.testing.assert_allclose(table.obsm["two"][3:, :512], table.obsm["one"][3:], atol=1e-5)


def test_the_encoders_own_output(tiled: sd.SpatialData) -> None:
    pk.tl.embed_tiles(tiled, "tiny", key_added="own", readout={"depth": "own"}, **QUICK)
    pk.tl.embed_tiles(tiled, "tiny", key_added="paper", readout=pk.Readout.preset("paper"), **QUICK)
    table = tiled["table"]
    model = EncoderNetwork(get_encoder("tiny"), 56)
    tiles = ArrayTiles(pk.get.tiles(tiled).to_numpy())
    expected = embed(model, tiles, [None], batch_size=16, device=torch.device("cpu"))[None]
    np.testing.assert_allclose(table.obsm["own"], expected, atol=1e-4)
    np.testing.assert_array_equal(table.obsm["paper"], table.obsm["own"])
    assert read_uns(table, "own")["depth"] == "own"  # type: ignore[index]


def test_an_untiled_object_is_tiled_and_left_as_it_was_where_that_fails(untiled: sd.SpatialData) -> None:
    shapes = set(untiled.shapes)
    with pytest.raises(ValueError, match="has 6 blocks: give 1 to 6"):
        pk.tl.embed_tiles(untiled, "tiny", readout={"depth": 7}, **QUICK)
    assert set(untiled.shapes) == shapes and "tile_inside" not in untiled["table"].obs
    pk.tl.embed_tiles(untiled, "tiny", **QUICK)
    record = read_uns(untiled["table"], "tiles")
    assert record is not None and (record["tile_px"], record["mpp"]) == (224, 0.5)
    assert np.isfinite(untiled["table"].obsm["X_tiny"]).all(axis=1).any()


def test_a_bad_depth(tiled: sd.SpatialData) -> None:
    before = set(tiled["table"].obsm)
    with pytest.raises(ValueError, match="has 6 blocks: give 1 to 6"):
        pk.tl.embed_tiles(tiled, "tiny", key_added="x", readout={"depth": 7}, **QUICK)
    with pytest.raises(ValueError, match="only letters, digits"):
        pk.tl.embed_tiles(tiled, "tiny", key_added="a/b", **QUICK)
    assert set(tiled["table"].obsm) == before


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        ({"depth": "best"}, '`readout`: `depth="best"` is chosen .*: give a number of blocks'),
        ({"head": "ridge"}, "`readout`: 'head' does nothing in this call: no genes are predicted here. Leave it out"),
        ({"context_um": 300}, "'context_um' does nothing in this call: no genes are predicted"),
        ({"n_depths": 2}, "'n_depths' does nothing in this call: no genes are predicted"),
        ({"depth": 2, "n_components": 8}, "'n_components' does nothing in this call: no genes are predicted"),
        ({"depths": 2}, "`readout`: Readout has no field 'depths'. Did you mean 'depth'"),
    ],
)
def test_fields_of_a_readout_that_make_no_features(
    tiled: sd.SpatialData, readout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pk.tl.embed_tiles(tiled, "tiny", readout=readout, **QUICK)
    assert "X_tiny" not in tiled["table"].obsm


@pytest.mark.parametrize("field", ["cache", "resume", "trainer", "accumulate", "compile", "cached_activations"])
def test_fields_of_compute_that_are_for_training(tiled: sd.SpatialData, adapter: pk.Adapter, field: str) -> None:
    compute = {"device": "cpu", field: getattr(pk.Compute(), field)}
    message = f"`compute`: {field!r} does nothing in this call: it trains nothing. Leave it out"
    for call in (
        lambda: pk.tl.embed_tiles(tiled, "tiny", compute=compute, progress=False),
        lambda: pk.tl.embed_tiles(tiled, adapter, compute=compute, progress=False),
        lambda: pk.tl.predict_expression(tiled, adapter, compute=compute, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_options_that_serve_several_calls_are_logged(tiled: sd.SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.embed_tiles(
            tiled, "tiny", readout=pk.Readout(depth=1, context_um=300), progress=False,
            compute=pk.Compute(device="cpu", accumulate=2),
        )  # fmt: skip
    assert "readout: context_um do nothing in this call: no genes are predicted here." in caplog.text
    assert "compute: accumulate do nothing in this call: it trains nothing." in caplog.text
    assert read_uns(tiled["table"], "X_tiny")["depth"] == "1"  # type: ignore[index]


@pytest.mark.parametrize("depth", ["all", "best"])
def test_a_depth_that_expression_chooses_is_refused(tiled: sd.SpatialData, depth: str) -> None:
    with pytest.raises(ValueError, match=f'`depth="{depth}"` is chosen on expression, which this call does not read'):
        pk.tl.embed_tiles(tiled, "tiny", readout={"depth": depth}, **QUICK)
    assert "X_tiny" not in tiled["table"].obsm
    # the default of an object is the last block
    pk.tl.embed_tiles(tiled, "tiny", readout=pk.Readout(), **QUICK)
    record = read_uns(tiled["table"], "X_tiny")
    assert record is not None and record["depth"] == "6" and record["fields_um"] == []


def test_an_adapters_features(tiled: sd.SpatialData, predicted: sd.SpatialData, adapter: pk.Adapter) -> None:
    pk.tl.embed_tiles(tiled, adapter, **QUICK)
    np.testing.assert_array_equal(tiled["table"].obsm["X_peka"], predicted["table"].obsm["X_peka"])
    assert read_uns(tiled["table"], "X_peka")["encoder_digest"] == adapter.encoder_digest  # type: ignore[index]
    for readout in ({"depth": 1}, {"orientations": 2}, {"fields_um": (224,)}, {"head": "ridge"}):
        with pytest.raises(ValueError, match=f"{next(iter(readout))!r} does .* an adapter has its own readout"):
            pk.tl.embed_tiles(tiled, adapter, readout=readout, **QUICK)
