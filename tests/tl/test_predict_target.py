"""Targets that are no genes, from the fit to the scores: the same fit, written as a DataFrame in obsm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData

import pekasc as pk
from pekasc._expression import dense, log1p_cp10k
from pekasc._keys import read_uns

TRAIN = ["P1S1_spots"]
FROZEN: dict[str, Any] = {"method": None, "compute": {"device": "cpu"}, "progress": False}
LINEAR: dict[str, Any] = {**FROZEN, "readout": {"depth": 2, "head": "ridge", "context_um": None}}
QUICK: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
NAMES = ["T cell", "B", "stroma:x", "tumour"]


def add_types(table: AnnData) -> pd.DataFrame:
    """Put proportions of four cell types, which the image shows in part, into obsm."""
    truth = np.exp(np.asarray(table.layers["truth"])[:, :4].astype(np.float64))
    frame = pd.DataFrame(truth / truth.sum(axis=1, keepdims=True), index=table.obs_names, columns=NAMES)
    table.obsm["types"] = frame
    return frame


@pytest.fixture
def typed(tiled: SpatialData) -> SpatialData:
    """Return two patients with cell types."""
    add_types(tiled["table"])
    return tiled


@pytest.fixture(scope="module")
def of_types(_tiled: SpatialData) -> pk.Adapter:
    """Return the frozen encoder with a head for the cell types of the first patient."""
    sdata = _tiled.subset([*_tiled.images, *_tiled.shapes, "table"])
    sdata.tables["table"] = _tiled["table"].copy()
    add_types(sdata["table"])
    return pk.tl.fit_adapter(sdata, target={"obsm": "types"}, train=TRAIN, **LINEAR)


@pytest.fixture
def predicted(typed: SpatialData, of_types: pk.Adapter) -> SpatialData:
    """Return two patients with predicted cell types."""
    pk.tl.predict_expression(typed, of_types, **QUICK)
    return typed


@pytest.mark.parametrize("readout", [{"depth": 2, "head": "low-rank"}, {"depth": 2, "head": "ridge"}])
def test_it_is_the_same_fit(tiled: SpatialData, readout: dict[str, Any]) -> None:
    # the genes themselves, as an array in obsm: weights of spots, settings and predictions are those of genes
    how = {**FROZEN, "readout": {**readout, "context_um": None}}
    table = tiled["table"]
    genes = pk.tl.fit_adapter(tiled, train=TRAIN, **how)
    table.obsm["genes"] = dense(log1p_cp10k(table))[:, table.var_names.get_indexer(list(genes.genes))]
    copy = pk.tl.fit_adapter(tiled, target={"obsm": "genes"}, train=TRAIN, **how)
    assert copy.genes == tuple(str(i) for i in range(len(genes.genes)))
    np.testing.assert_allclose(copy.gene_scores["pearson"], genes.gene_scores["pearson"], atol=1e-5)
    pd.testing.assert_series_equal(copy.selection["weight"], genes.selection["weight"], atol=1e-5)
    pk.tl.predict_expression(tiled, genes, key_added="a", **QUICK)
    pk.tl.predict_expression(tiled, copy, key_added="b", **QUICK)
    layer = table.layers["a"][:, table.var_names.get_indexer(list(genes.genes))]
    np.testing.assert_allclose(table.obsm["X_b_genes"], layer, atol=1e-4)


def test_low_rank_components_are_those_of_the_columns(tiled: SpatialData) -> None:
    table = tiled["table"]
    names = list(table.var_names[:3])
    table.obsm["few"] = dense(log1p_cp10k(table))[:, :3]
    how = {**FROZEN, "readout": {"depth": 2, "head": "low-rank", "context_um": None}, "train": TRAIN}
    few = pk.tl.fit_adapter(tiled, target={"obsm": "few"}, **how)
    genes = pk.tl.fit_adapter(tiled, genes=names, **how)
    # three columns have at most three components, and three genes those of all genes
    assert few.selection["rank"].max() == 3 < genes.selection["rank"].max()
    assert few.reading.n_scores == 3


def test_the_teacher_sees_the_counts(typed: SpatialData, adapter: pk.Adapter, trained_options: dict[str, Any]) -> None:
    other = pk.tl.fit_adapter(typed, target={"obsm": "types"}, train=TRAIN, **trained_options)
    assert other.genes == tuple(NAMES) and other.info["teacher"] == "pca"
    for name, tensor in adapter.weights["adapter"].items():
        np.testing.assert_array_equal(other.weights["adapter"][name], tensor)
    assert max(t.abs().max().item() for t in other.weights["adapter"].values()) > 0


def test_what_is_written(typed: SpatialData, of_types: pk.Adapter) -> None:
    table = typed["table"]
    layers, var, before = set(table.layers), table.var.copy(), table.obsm["types"].copy()
    pk.tl.predict_expression(typed, of_types, **QUICK)
    frame = table.obsm["X_peka_types"]
    assert list(frame.columns) == NAMES and (frame.dtypes == np.float32).all()
    assert frame.index.equals(table.obs_names) and not frame.isna().any(axis=None)
    assert set(table.layers) == layers and set(table.obsm) >= {"X_peka", "X_peka_types", "types"}
    pd.testing.assert_frame_equal(table.var, var)
    pd.testing.assert_frame_equal(table.obsm["types"], before)
    np.testing.assert_array_equal(table.obs["peka_train"], table.obs["region"] == "P1S1_spots")
    assert "peka_total" not in table.obs
    record = read_uns(table, "X_peka_types")
    assert record["kind"] == "prediction" and record["obsm"] == "types" and record["n_predicted"] == 4
    assert record["target"] == "obsm['types'], as stored" and read_uns(table, "X_peka")["kind"] == "features"
    # what an array of tiles gives
    tiles = pk.get.tiles(typed).to_numpy()
    np.testing.assert_allclose(frame, of_types.predict(tiles, mpp=2.0, compute={"device": "cpu"}), atol=1e-5)
    # it may be predicted again, and under another key beside it
    pk.tl.predict_expression(typed, of_types, **QUICK)
    pk.tl.predict_expression(typed, of_types, key_added="mine", **QUICK)
    assert {"X_mine", "X_mine_types", "X_peka_types"} <= set(table.obsm)


def test_rows_without_a_tile_are_nan(untiled: SpatialData, of_types: pk.Adapter) -> None:
    table = untiled["table"]
    table.obs["in_tissue"] = 1
    table.obs.loc[table.obs_names[[0, 5]], "in_tissue"] = 0
    pk.tl.predict_expression(untiled, of_types, **QUICK)
    missing = table.obsm["X_peka_types"].isna()
    assert missing.iloc[[0, 5]].all(axis=None) and missing.to_numpy().sum() == 8


def test_saved_and_read(predicted: SpatialData, of_types: pk.Adapter, tmp_path: Path) -> None:
    of_types.save(tmp_path / "adapter")
    loaded = pk.Adapter.load(tmp_path / "adapter")
    assert loaded.target_key == of_types.target_key == "types" and loaded.genes == tuple(NAMES)
    assert "predicts    4 columns of obsm['types'], as stored" in repr(loaded) and "of columns above 0.2" in repr(
        loaded
    )
    before = predicted["table"].obsm["X_peka_types"].copy()
    pk.tl.predict_expression(predicted, loaded, **QUICK)
    pd.testing.assert_frame_equal(predicted["table"].obsm["X_peka_types"], before, atol=1e-6)
    scores = pk.tl.evaluate(predicted, target="types")
    predicted.write(tmp_path / "object.zarr")
    table = sd.read_zarr(tmp_path / "object.zarr")["table"]
    pd.testing.assert_frame_equal(table.obsm["X_peka_types"], before, atol=1e-6, check_names=False)
    kept = table.uns["pekasc"]["X_peka_types"]["scores"]
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), scores, check_dtype=False)


def test_scores_are_scipys(predicted: SpatialData) -> None:
    table = predicted["table"]
    scores = pk.tl.evaluate(predicted, target="types")
    test = (table.obs["region"] == "P2S1_spots").to_numpy()
    assert list(scores["gene"]) == NAMES and set(scores["group"]) == {"P2S1_spots"}  # no training spots
    assert (scores["n_spots"] == test.sum()).all()
    for row in scores.itertuples():
        x = table.obsm["X_peka_types"].loc[test, row.gene].astype(np.float64)
        y = table.obsm["types"].loc[test, row.gene]
        assert row.pearson == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-5)
        assert row.rmse == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-4)
    assert scores["pearson"].max() > 0.2
    assert scores[["ceiling", "reached"]].isna().all(axis=None)  # no counts, no counting noise
    assert not any(name.startswith("peka") for name in table.var)
    pd.testing.assert_frame_equal(table.uns["pekasc"]["X_peka_types"]["scores"], scores)
    # the same columns as for genes, the form of the fit's argument, and training spots where they are asked for
    both = pk.tl.evaluate(predicted, target={"obsm": "types"}, include_train=True)
    assert set(both["group"]) == {"P1S1_spots", "P2S1_spots"}
    table.layers["peka"] = np.asarray(table.layers["truth"], dtype=np.float32)
    assert list(pk.tl.evaluate(predicted, truth="truth")) == list(scores)


def test_spots_that_were_not_measured_are_left_out(predicted: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    table = predicted["table"]
    whole = pk.tl.evaluate(predicted, target="types")
    rows = np.flatnonzero(table.obs["region"] == "P2S1_spots")[:2]
    table.obsm["types"].iloc[rows, [0, 2]] = np.nan
    with caplog.at_level(logging.INFO, logger="pekasc"):
        scores = pk.tl.evaluate(predicted, target="types")
    assert (scores["n_spots"] == whole["n_spots"] - 2).all()
    assert f"2 of {whole['n_spots'][0]} spots left out: obsm['types'] has no values there." in caplog.text
    # another measurement of the same columns, in any order
    table.obsm["second"] = 2 * table.obsm["X_peka_types"][NAMES[::-1]]
    np.testing.assert_allclose(pk.tl.evaluate(predicted, target="types", truth="second")["pearson"], 1, rtol=1e-5)
    table.obsm["types"][:] = np.nan
    with pytest.raises(ValueError, match=r"obsm\['types'\] is NaN or infinite in all \d+ spots"):
        pk.tl.evaluate(predicted, target="types")
    del table.obsm["types"]
    with pytest.raises(KeyError, match=r"`target`: obsm\['types'\] is not in the table"):
        pk.tl.evaluate(predicted, target="types")


def test_evaluate_says_what_was_predicted(predicted: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"no gene: `pekasc.tl.evaluate\(sdata, target='types'\)`"):
        pk.tl.evaluate(predicted)
    with pytest.raises(KeyError, match=r"no predictions of 'other'. Targets predicted under 'peka': \['types'\]"):
        pk.tl.evaluate(predicted, target="other")
    with pytest.raises(ValueError, match="`counts_layer=` does nothing with `target=`"):
        pk.tl.evaluate(predicted, target="types", counts_layer="counts")


def test_genes_and_cell_types_under_one_key(predicted: SpatialData, frozen: pk.Adapter) -> None:
    # both adapters were trained on the first patient
    table = predicted["table"]
    types = table.obsm["X_peka_types"].copy()
    pk.tl.predict_expression(predicted, frozen, **QUICK)
    pd.testing.assert_frame_equal(table.obsm["X_peka_types"], types)
    assert set(pk.tl.evaluate(predicted)["group"]) == set(pk.tl.evaluate(predicted, target="types")["group"])


def test_other_training_spots_need_another_key(predicted: SpatialData, frozen: pk.Adapter) -> None:
    table = predicted["table"]
    second = pk.tl.fit_adapter(predicted, target={"obsm": "types"}, train=["P2S1_spots"], **LINEAR)
    pk.tl.predict_expression(predicted, frozen, **QUICK)
    before = repr(table), table.obs["peka_train"].copy()
    words = r"The adapter that predicted genes under `key_added='peka'` was trained on .* Take another key"
    with pytest.raises(ValueError, match=words):
        pk.tl.predict_expression(predicted, second, **QUICK)
    assert repr(table) == before[0] and table.obs["peka_train"].equals(before[1])
    pk.tl.predict_expression(predicted, second, key_added="second", **QUICK)
    assert set(pk.tl.evaluate(predicted, layer="second", target="types")["group"]) == {"P1S1_spots"}
    # without genes there, the same target may be predicted by another adapter
    del table.layers["peka"]
    pk.tl.predict_expression(predicted, second, **QUICK)
    with pytest.raises(ValueError, match=r"that predicted obsm\['types'\] under"):
        pk.tl.predict_expression(predicted, frozen, **QUICK)


def test_a_grid_stays_without_genes(untiled: SpatialData, of_types: pk.Adapter, frozen: pk.Adapter) -> None:
    pk.pp.tile_grid(untiled, "P2S1_he", tile_px=56, mpp=2.0, tissue=False)
    pk.tl.predict_expression(untiled, of_types, table_name="grid", **QUICK)
    grid = untiled["grid"]
    assert grid.n_vars == 0 and list(grid.obsm["X_peka_types"].columns) == NAMES
    types = grid.obsm["X_peka_types"].copy()
    # genes replace the table, and nothing that was there goes
    pk.tl.predict_expression(untiled, frozen, table_name="grid", **QUICK)
    assert untiled["grid"].n_vars == len(frozen.genes)
    pd.testing.assert_frame_equal(untiled["grid"].obsm["X_peka_types"], types)
    assert read_uns(untiled["grid"], "X_peka_types")["obsm"] == "types"


def test_a_store_keeps_features(typed: SpatialData, of_types: pk.Adapter, tmp_path: Path) -> None:
    pk.tl.predict_expression(typed, of_types, store=tmp_path / "store", **QUICK)
    table = typed["table"]
    stored = table.obsm["X_peka_types"].copy()
    assert any((tmp_path / "store").iterdir()) and "store" not in read_uns(table, "X_peka_types")
    pk.tl.predict_expression(typed, of_types, **QUICK)
    pd.testing.assert_frame_equal(table.obsm["X_peka_types"], stored, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"genes": ["DENSITY_001"]}, ValueError, "`genes=` does nothing .* predicts no genes but the 4"),
        ({"table_added": "new"}, ValueError, r"`table_added=` does nothing .* columns of obsm\['types'\]"),
        ({"gene_key": "symbol"}, ValueError, "`gene_key=` does nothing"),
        ({"key_added": "a b"}, ValueError, "cannot be stored"),
        ({"compute": {"max_memory": 100}}, ValueError, r"of 4 columns of obsm\['types'\] .* Raise the limit"),
        ({"compute": {"stored_precision": "float16"}, "store": "x"}, ValueError, "no predictions are stored on disk"),
    ],
)  # fmt: skip
def test_predictions_refused(
    typed: SpatialData, of_types: pk.Adapter, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = repr(typed), repr(typed["table"])
    with pytest.raises(error, match=message):
        pk.tl.predict_expression(typed, of_types, **{**QUICK, **options})
    assert (repr(typed), repr(typed["table"])) == before


def test_what_is_mine_stays(typed: SpatialData, of_types: pk.Adapter) -> None:
    typed["table"].obsm["X_peka_types"] = np.ones((typed["table"].n_obs, 2))
    with pytest.raises(ValueError, match=r"`obsm\['X_peka_types'\]` is there and was not made by this call"):
        pk.tl.predict_expression(typed, of_types, **QUICK)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": {"obsm": "type"}}, KeyError, r"obsm\['type'\] is not in the table. Did you mean 'types'"),
        ({"target": {"layer": "x"}}, ValueError, 'a target that is no gene is `target={"obsm": key}`'),
        ({"target": "types"}, ValueError, r'`target=.types.` is not known. .* {"obsm": key}'),
        ({"genes": ["DENSITY_001"]}, ValueError, "`genes=` does nothing with `target="),
        ({"layer": "raw"}, KeyError, "Layer 'raw' not found"),
        ({"layer": "truth"}, ValueError, r"Raw counts are needed.*\(`layer=`\)\.$"),
        ({"readout": {"depth": 2, "head": "low-rank", "head_rank": 5}}, ValueError, "`head_rank=5` does not fit"),
    ],
)  # fmt: skip
def test_fits_refused(typed: SpatialData, options: dict[str, Any], error: type[Exception], message: str) -> None:
    before = repr(typed), repr(typed["table"])
    with pytest.raises(error, match=message):
        pk.tl.fit_adapter(typed, **{**FROZEN, "target": {"obsm": "types"}, **options})
    assert (repr(typed), repr(typed["table"])) == before


def test_only_training_spots_are_looked_at(untiled: SpatialData) -> None:
    table = untiled["table"]
    add_types(table)
    table.obsm["types"].iloc[np.flatnonzero(table.obs["region"] == "P2S1_spots")[:3]] = np.nan
    before = repr(untiled), repr(table)
    with pytest.raises(ValueError, match=r"NaN or infinite in 3 of the \d+ training spots"):
        pk.tl.fit_adapter(untiled, target={"obsm": "types"}, **LINEAR)
    assert (repr(untiled), repr(table)) == before  # tiles that were made for it have gone
    pk.pp.tile(untiled, tile_px=56, mpp=2.0)
    assert pk.tl.fit_adapter(untiled, target={"obsm": "types"}, train=TRAIN, **LINEAR).genes == tuple(NAMES)
