"""tl.predict_expression: what is written, what survives the disk, and what an adapter refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
import squidpy as sq
from spatialdata import SpatialData

import pekasc as pk
from pekasc._keys import read_uns

CPU: dict[str, Any] = {"device": "cpu"}
QUICK: dict[str, Any] = {"compute": CPU, "progress": False}


def test_slots(tiled: SpatialData, adapter: pk.Adapter) -> None:
    # a spot without a tile, and a gene that the adapter does not know
    shapes = tiled.shapes["P2S1_spots_tiles"]
    tiled.shapes["P2S1_spots_tiles"] = shapes.drop(index=shapes.index[3])
    table = tiled["table"]
    missing = int(np.flatnonzero((table.obs["region"] == "P2S1_spots") & (table.obs["spot_id"] == shapes.index[3]))[0])
    unknown = replace(adapter, genes=(*adapter.genes[:-1], "OTHER"))
    with pytest.warns(UserWarning, match=r"not in the table are left out: 1 of the adapter's \d+ .*OTHER"):
        pk.tl.predict_expression(tiled, unknown, **QUICK)
    layer, features = table.layers["peka"], table.obsm["X_peka"]
    assert layer.dtype == np.float32 and features.dtype == np.float32
    assert layer.shape == table.shape and features.shape == (table.n_obs, 512)
    known = table.var_names.isin(adapter.genes[:-1])
    assert known.sum() == len(adapter.genes) - 1
    assert np.isnan(layer[:, ~known]).all()
    assert np.isnan(layer[missing]).all() and np.isnan(features[missing]).all()
    others = np.arange(table.n_obs) != missing
    assert np.isfinite(layer[np.ix_(others, known)]).all()
    assert (table.obs["peka_train"] == (table.obs["region"] == "P1S1_spots")).all()
    assert table.X.dtype == np.float32 and sorted(k for k in table.layers if k) == ["peka", "truth"]


def test_predictions_are_the_adapters_on_the_same_tiles(predicted: SpatialData, adapter: pk.Adapter) -> None:
    table = predicted["table"]
    tiles = pk.get.tiles(predicted).to_numpy()
    np.testing.assert_array_equal(table.obsm["X_peka"], adapter.embed(tiles, mpp=2.0, compute=CPU))
    columns = table.var_names.get_indexer(adapter.genes)
    np.testing.assert_allclose(
        table.layers["peka"][:, columns], adapter.predict(tiles, mpp=2.0, compute=CPU), rtol=0, atol=1e-5
    )
    # a batch holds tiles of one section: bits are the same in the same batches, and on some processors only in them
    for region in table.obs["region"].unique():
        rows = (table.obs["region"] == region).to_numpy()
        found = adapter.predict(tiles[rows], mpp=2.0, compute=CPU)
        np.testing.assert_array_equal(table.layers["peka"][rows][:, columns], found)


def test_it_learned_something(predicted: SpatialData) -> None:
    # a sanity check on another patient: what depends on the density of nuclei is easy
    scores = pk.tl.evaluate(predicted).set_index("gene")["pearson"]
    assert scores[scores.index.str.startswith("DENSITY")].median() > 0.3


def test_order_of_rows_does_not_matter(tiled: SpatialData, predicted: SpatialData, adapter: pk.Adapter) -> None:
    order = np.random.default_rng(0).permutation(tiled["table"].n_obs)
    table = tiled["table"][order].copy()
    del tiled.tables["table"]
    tiled.tables["table"] = table
    pk.tl.predict_expression(tiled, adapter, **QUICK)
    expected = predicted["table"].layers["peka"][order]
    # batches are other ones
    np.testing.assert_allclose(tiled["table"].layers["peka"], expected, atol=1e-5)


def test_untiled_sections_are_tiled_as_the_adapter_was_trained(
    untiled: SpatialData, predicted: SpatialData, adapter: pk.Adapter
) -> None:
    pk.tl.predict_expression(untiled, adapter, **QUICK)
    np.testing.assert_array_equal(untiled["table"].layers["peka"], predicted["table"].layers["peka"])
    assert read_uns(untiled["table"], "tiles")["tile_px"] == 56


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b, check_names=False)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, err_msg=where)
    else:
        assert a == b and type(a) is type(b), f"{where}: {a!r} became {b!r}"


def test_all_slots_survive_the_disk(predicted: SpatialData, adapter: pk.Adapter, tmp_path: Path) -> None:
    pk.tl.fit_adapter(predicted, train=["P1S1"], method=None, readout="ridge", **QUICK)
    pk.tl.embed_tiles(predicted, "tiny", **QUICK, readout={"depth": (1, 2)})
    pk.tl.embed_expression(predicted, n_components=5)
    pk.tl.evaluate(predicted)
    pk.tl.predict_expression(predicted, adapter, table_added="predicted", **QUICK)
    predicted.write(tmp_path / "a.zarr")
    read = sd.read_zarr(tmp_path / "a.zarr")
    for name in ("table", "predicted"):
        before, after = predicted[name], read[name]
        pd.testing.assert_frame_equal(before.obs, after.obs, check_categorical=False)
        pd.testing.assert_frame_equal(before.var, after.var)
        # from anndata 0.13 on, `layers[None]` is `X`
        layers = {key for key in before.layers if key is not None}
        assert layers == {key for key in after.layers if key is not None}
        for key in layers:
            assert before.layers[key].dtype == after.layers[key].dtype
            np.testing.assert_array_equal(before.layers[key], after.layers[key])
        assert set(before.obsm) == set(after.obsm)
        for key in set(before.obsm) - {"phantom_states"}:
            np.testing.assert_array_equal(before.obsm[key], after.obsm[key])
        keys = set(before.uns["pekasc"])
        assert keys == set(after.uns["pekasc"])
        for key in keys:
            assert_same(read_uns(before, key), read_uns(after, key), key)
    assert {"peka", "X_peka", "X_tiny", "X_pca", "adapter", "tiles"} <= set(read["table"].uns["pekasc"])
    # the encoder is a string on disk, not a file for every field, and a row when it is read
    for key in ("peka", "X_peka", "X_tiny", "adapter"):
        assert isinstance(read["table"].uns["pekasc"][key]["encoder"], str)
        record = read_uns(read["table"], key)
        assert record is not None and pk.models.Encoder.from_dict(record["encoder"]) == adapter.encoder
    assert {"peka_pearson", "peka_rmse", "peka_morans_i_ratio"} <= set(read["table"].var)
    # and is good for more
    np.testing.assert_array_equal(pk.get.tiles(read).to_numpy(), pk.get.tiles(predicted).to_numpy())
    again = pk.tl.evaluate(read)
    pd.testing.assert_frame_equal(again, pk.tl.evaluate(predicted))


def test_a_table_of_its_own_keeps_genes_that_the_table_lacks(tiled: SpatialData, adapter: pk.Adapter) -> None:
    table = tiled["table"]
    names = list(table.var_names)
    table.var_names = [f"ENSG{i}" for i in range(table.n_vars)]
    table.var["symbol"] = names
    with pytest.raises(ValueError, match=r"None of the \d+ genes .*`gene_key=` \(columns there: .*symbol.*table_added"):
        pk.tl.predict_expression(tiled, adapter, **QUICK)
    assert "peka" not in table.layers
    pk.tl.predict_expression(tiled, adapter, table_added="predicted", **QUICK)
    new = tiled["predicted"]
    assert list(new.var_names) == list(adapter.genes)
    assert "peka" not in table.layers
    np.testing.assert_array_equal(new.X, new.layers["peka"])
    for column in ("region", "spot_id"):
        assert list(new.obs[column]) == list(table.obs[column])
    got = pk.get.expression(tiled, layer="peka", table_name="predicted")
    assert list(got.var_names) == list(adapter.genes) and got.n_obs == table.n_obs
    assert np.ptp(got.obsm["spatial"], axis=0).max() < 700
    sc.pp.pca(got, n_comps=3)
    # the same cell twice gives the same object
    pk.tl.predict_expression(tiled, adapter, table_added="predicted", **QUICK)
    np.testing.assert_array_equal(tiled["predicted"].X, new.X)
    with pytest.raises(ValueError, match="is there already and was not made by this call"):
        pk.tl.predict_expression(tiled, adapter, table_added="predicted", key_added="other", **QUICK)
    # the same values by the column with the names
    pk.tl.predict_expression(tiled, adapter, gene_key="symbol", **QUICK)
    columns = [names.index(gene) for gene in adapter.genes]
    np.testing.assert_array_equal(table.layers["peka"][:, columns], new.X)


def test_subset_of_genes(tiled: SpatialData, predicted: SpatialData, adapter: pk.Adapter) -> None:
    genes = [adapter.genes[5], adapter.genes[2]]
    pk.tl.predict_expression(tiled, adapter, genes=genes, key_added="few", **QUICK)
    table = tiled["table"]
    columns = table.var_names.get_indexer(genes)
    np.testing.assert_array_equal(table.layers["few"][:, columns], predicted["table"].layers["peka"][:, columns])
    assert np.isnan(np.delete(table.layers["few"], columns, axis=1)).all()
    assert {"X_few"} <= set(table.obsm) and "few_train" in table.obs
    assert list(pk.get.expression(tiled, layer="few").var_names) == sorted(genes, key=list(table.var_names).index)
    pk.tl.predict_expression(tiled, adapter, genes=genes[0], table_added="one", **QUICK)
    assert list(tiled["one"].var_names) == genes[:1]
    with pytest.raises(KeyError, match=r"does not predict 1 of the 2 genes asked for: .*DENSITY_01.*Did you mean"):
        pk.tl.predict_expression(tiled, adapter, genes=[genes[0], "DENSITY_01"], **QUICK)


def test_downstream_on_predictions(predicted: SpatialData, adapter: pk.Adapter) -> None:
    adata = pk.get.expression(predicted)
    assert list(adata.var_names) == [g for g in predicted["table"].var_names if g in adapter.genes]
    assert adata.uns["log1p"] == {"base": None} and isinstance(adata.obs["section"].dtype, pd.CategoricalDtype)
    sc.pp.pca(adata, n_comps=4)
    sc.pp.neighbors(adata, n_neighbors=5, method="gauss")  # the usual one compiles for half a minute
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    assert adata.obs["leiden"].nunique() > 1
    sq.gr.spatial_neighbors_knn(adata, library_key="section")
    between = adata.obsp["spatial_connectivities"].tocoo()
    section = adata.obs["section"].to_numpy()
    assert (section[between.row] == section[between.col]).all()
    sq.gr.spatial_autocorr(adata, mode="moran", n_perms=None)
    assert adata.uns["moranI"]["I"].notna().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute": {"max_memory": 1000}}, ValueError, r"more than `Compute\.max_memory`.*table_added="),
        ({"key_added": "a b"}, ValueError, "cannot be stored"),
        ({"table_added": "a/b"}, ValueError, "`table_added=.*cannot be stored"),
        ({"table_added": "P1S1_he"}, ValueError, "there already"),
        ({"genes": ["NOPE"]}, KeyError, "does not predict 1 of the 1 genes"),
        ({"genes": []}, ValueError, "`genes=` is empty: name at least one gene"),
        ({"table_name": "cells"}, KeyError, "Table 'cells' not found"),
        ({"compute": {**CPU, "precision": "fp16"}}, ValueError, "needs a GPU"),
        ({"compute": {"device": "cuda:99"}}, ValueError, "`device='cuda:99'` cannot be used"),
        (
            {"compute": {"batch_size": 8}},
            ValueError,
            "no field 'batch_size'. Did you mean 'embed_batch_size'",
        ),
        ({"compute": 3}, TypeError, "`compute` must be None, a pekasc.Compute, the name of a preset or a mapping"),
    ],
)
def test_refused(
    tiled: SpatialData, adapter: pk.Adapter, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = repr(tiled), repr(tiled["table"])
    with pytest.raises(error, match=message):
        pk.tl.predict_expression(tiled, adapter, **{**QUICK, **options})
    assert (repr(tiled), repr(tiled["table"])) == before


@pytest.mark.parametrize(("tile_px", "mpp"), [(112, 1.0), (56, 1.0), (112, 2.0)])
def test_other_tiles_are_refused(untiled: SpatialData, adapter: pk.Adapter, tile_px: int, mpp: float) -> None:
    pk.pp.tile(untiled, tile_px=tile_px, mpp=mpp)
    with pytest.raises(ValueError, match=rf"on tiles of 56 px at 2 um/px .* these have {tile_px} px at {mpp:g}"):
        pk.tl.predict_expression(untiled, adapter, **QUICK)


def test_another_encoder_is_refused(untiled: SpatialData, adapter: pk.Adapter) -> None:
    other = replace(adapter, encoder=replace(adapter.encoder, weights="random"))
    before = repr(untiled), repr(untiled["table"])
    with pytest.raises(ValueError, match=r"on encoder 'tiny' with weights \w{12}, but the weights found now are"):
        pk.tl.predict_expression(untiled, other, **QUICK)
    assert (repr(untiled), repr(untiled["table"])) == before
    with pytest.raises(ValueError, match="weights found now"):
        other.merge()


def test_only_adapters(tiled: SpatialData) -> None:
    with pytest.raises(
        TypeError, match=r"`adapter` must be a pekasc.Adapter, got str. Read it: `pekasc.Adapter.load\('mine'\)`"
    ):
        pk.tl.predict_expression(tiled, "mine", **QUICK)  # type: ignore[arg-type]


def test_a_slide_without_a_table(_plain: SpatialData, frozen: pk.Adapter) -> None:
    size = f"tile_px={frozen.spec.tile_px}, mpp={frozen.spec.mpp:g}"
    slide = SpatialData(images={"slide": _plain["P1S1_he"]})
    with pytest.raises(KeyError) as error:
        pk.tl.predict_expression(slide, frozen, **QUICK)
    assert error.value.args[0] == (
        f"There is no table: for a slide without spots run `pekasc.pp.tile_grid(sdata, 'slide', {size})` first, then "
        "this call with `table_name='grid'`."
    )


def test_tiles_of_a_name_that_is_not_there(tiled: SpatialData, frozen: pk.Adapter) -> None:
    before = repr(tiled), repr(tiled["table"])
    with pytest.raises(
        KeyError,
        match=r"No tiles 'tils' \(there are: 'tiles'\). To make them, run `pk.pp.tile\(sdata, key_added='tils'\)`",
    ):
        pk.tl.predict_expression(tiled, frozen, key="tils", **QUICK)
    with pytest.raises(KeyError, match=r"No tiles 'tils' \(there are: 'tiles'\)"):
        pk.get.tiles(tiled, key="tils")
    assert (repr(tiled), repr(tiled["table"])) == before


@pytest.mark.parametrize("how", ["pixel size", "jitter", "other names"])
def test_training_spots_are_known_again(untiled: SpatialData, adapter: pk.Adapter, how: str) -> None:
    table = untiled["table"]
    first = (table.obs["region"] == "P1S1_spots").to_numpy()
    if how == "pixel size":
        table.uns["pekasc"]["image_mpp"] = {f"{s}_he": 1.001 for s in ("P1S1", "P2S1")}
    elif how == "jitter":
        untiled.shapes["P1S1_spots"] = untiled.shapes["P1S1_spots"].assign(
            geometry=lambda spots: spots.geometry.translate(2.3, -1.7)
        )
    else:
        # patients swap their names: what the image shows counts
        swap = {"P1S1_spots": "P2S1_spots", "P2S1_spots": "P1S1_spots"}
        table.obs["region"] = table.obs["region"].astype(str).map(swap).astype("category")
        one, two = untiled.shapes["P1S1_spots"], untiled.shapes["P2S1_spots"]
        untiled.shapes["P1S1_spots"], untiled.shapes["P2S1_spots"] = two, one
    pk.tl.predict_expression(untiled, adapter, **QUICK)
    np.testing.assert_array_equal(untiled["table"].obs["peka_train"], first)


def test_another_patient_with_the_same_names_is_not_taken_for_the_training_data(adapter: pk.Adapter) -> None:
    other = pk.datasets.phantom(n_patients=1, size_um=700, mpp=1.0, n_genes=24, random_state=5)
    pk.tl.predict_expression(other, adapter, **QUICK)
    assert set(other["table"].obs["region"]) == {"P1S1_spots"} and not other["table"].obs["peka_train"].any()


def test_sections_added_after_tiling_are_not_left_out_in_silence(untiled: SpatialData, adapter: pk.Adapter) -> None:
    whole = untiled["table"]
    del untiled.tables["table"]
    first = whole[whole.obs["region"] == "P1S1_spots"].copy()
    first.uns["spatialdata_attrs"] = {**whole.uns["spatialdata_attrs"], "region": ["P1S1_spots"]}
    untiled.tables["table"] = first
    pk.pp.tile(untiled, tile_px=56, mpp=2.0)
    whole.uns["pekasc"] = untiled["table"].uns["pekasc"]
    del untiled.tables["table"]
    untiled.tables["table"] = whole
    with pytest.warns(UserWarning, match=r"Spots without a tile 'tiles' are left out: (\d+) of \1 in 'P2S1_spots'\."):
        pk.tl.predict_expression(untiled, adapter, **QUICK)


def test_scores_of_an_earlier_prediction_go(predicted: SpatialData, adapter: pk.Adapter) -> None:
    pk.tl.evaluate(predicted)
    predicted["table"].var["mine"] = 1
    assert "peka_pearson" in predicted["table"].var
    pk.tl.predict_expression(predicted, adapter, genes=list(adapter.genes[:2]), **QUICK)
    assert not any(name.startswith("peka_") for name in predicted["table"].var) and "mine" in predicted["table"].var


def test_what_is_there_is_not_replaced(tiled: SpatialData, adapter: pk.Adapter) -> None:
    table = tiled["table"]
    table.layers["counts"] = table.X.copy()
    for key in ("tiles", "image_mpp", "counts"):
        before = repr(table)
        with pytest.raises(ValueError, match=r"Take another"):
            pk.tl.predict_expression(tiled, adapter, key_added=key, **QUICK)
        assert repr(table) == before
    what_it_says = {
        "tiles": r"`uns\[\"pekasc\"\]\['tiles'\]` holds .* must not replace",
        "spatial": r"`obsm\['spatial'\]` is there and was not made by this call",
        "region": r"`obs\['region'\]` is there and was not made by this call",
        "spot_id": r"`obs\['spot_id'\]` is there and was not made by this call",
    }
    for key in ("tiles", "spatial"):
        with pytest.raises(ValueError, match=what_it_says[key]):
            pk.tl.embed_tiles(tiled, "tiny", key_added=key, **QUICK)
    for key in ("tiles", "region", "spot_id"):
        with pytest.raises(ValueError, match=what_it_says[key]):
            pk.pp.split(tiled, groups="patient", key_added=key)
    with pytest.raises(ValueError, match="must not replace"):
        pk.tl.embed_expression(tiled, n_components=3, key_added="tiles")
    assert pk.get.tiles(tiled).shape[0] == table.n_obs
    # one's own result may be replaced
    for _ in range(2):
        pk.tl.predict_expression(tiled, adapter, **QUICK)
        pk.tl.embed_tiles(tiled, adapter, **QUICK)
    with pytest.raises(ValueError, match="there already"):
        pk.tl.predict_expression(tiled, adapter, table_added="TABLE", **QUICK)
