"""Predictions into a store: the same values whatever the parts, continued after a kill, left there when written."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData

import pekasc as pk
from pekasc._expression import log1p_cp10k
from pekasc._keys import read_uns
from pekasc.models.features import _predictions
from pekasc.tl import _predict_rows, _section_features

RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
FROZEN: dict[str, Any] = {"method": None, "train": ["P1S1_spots"], "compute": {"device": "cpu"}, "progress": False}
GRID: dict[str, Any] = {"tile_px": 56, "mpp": 2.0, "min_sharpness": None, "max_pen": None}
CPU: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}


@pytest.fixture(scope="module")
def slide() -> SpatialData:
    """Return two sections with spots, and a grid of 50 um on the second."""
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    pk.pp.tile_grid(sdata, "P2S1_he", stride_um=50, **GRID)
    return sdata


@pytest.fixture(scope="module")
def adapter(slide: SpatialData) -> pk.Adapter:
    """Return a frozen encoder whose head looks 210 um around."""
    return pk.tl.fit_adapter(slide, readout=RIDGE.replace(depth=2, context_um=210), **FROZEN)


@pytest.fixture
def grid(slide: SpatialData) -> SpatialData:
    return SpatialData(
        images=dict(slide.images),
        shapes={k: v for k, v in slide.shapes.items() if "grid" in k},
        tables={"grid": slide["grid"].copy()},
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_predictions, "_SHARD_BYTES", 1)
    monkeypatch.setattr(_predictions, "_ROWS", 32)
    yield


def test_a_table_without_genes_gets_those_of_the_adapter(
    grid: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    obs = grid["grid"].obs.copy()
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(grid, adapter, **CPU)
    assert "Using the only table, 'grid'" in caplog.text
    table = grid["grid"]
    assert list(table.var_names) == list(adapter.genes) and table.X is None
    assert table.layers["peka"].dtype == np.float32 and np.isfinite(table.layers["peka"]).all()
    assert set(obs) < set(table.obs) and not table.obs["peka_train"].any() and "peka_total" not in table.obs
    pk.tl.predict_expression(grid, adapter, **CPU)  # again: the same
    np.testing.assert_array_equal(grid["grid"].layers["peka"], table.layers["peka"])
    adata = pk.get.expression(grid)
    assert adata.shape == table.shape and adata.uns["log1p"] == {"base": None}


@pytest.mark.usefixtures("small_parts")
def test_parts_and_the_store_change_nothing(
    grid: SpatialData, adapter: pk.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pk.tl.predict_expression(grid, adapter, **CPU)
    whole = grid["grid"].layers["peka"]
    for tiles, chunk in ((1, 7), (7, 64), (256, 256)):
        monkeypatch.setattr(_predict_rows, "_TILES", tiles)
        monkeypatch.setattr(_section_features, "_CHUNK", chunk)
        folder = tmp_path / f"store {tiles}"
        pk.tl.predict_expression(grid, adapter, store=folder, **CPU)
        layer = grid["grid"].layers["peka"]
        assert isinstance(layer, da.Array) and layer.npartitions > 1
        np.testing.assert_allclose(np.asarray(layer), whole, atol=1e-5)
    record = read_uns(grid["grid"], "peka")
    assert record["store"] == str(folder) and (folder / record["array"]).is_dir()


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_call_continues(
    grid: SpatialData, adapter: pk.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pk.tl.predict_expression(grid, adapter, store=tmp_path / "whole", **CPU)
    whole = np.asarray(grid["grid"].layers["peka"])
    before = grid["grid"].copy()
    calls = []

    def failing(*args: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict_rows(*args)

    predict_rows = _predict_rows.predict_rows
    monkeypatch.setattr(_predict_rows, "predict_rows", failing)
    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        pk.tl.predict_expression(grid, adapter, store=store, **CPU)
    assert read_uns(grid["grid"], "peka")["store"] == read_uns(before, "peka")["store"]  # as it was
    n_parts = len(list((tmp_path / "whole").glob("predictions-*/c/*/0")))
    done = {file: file.stat().st_mtime_ns for file in store.glob("predictions-*/c/*/0")}
    assert len(done) == 2 < n_parts
    pk.tl.predict_expression(grid, adapter, store=store, **CPU)
    assert len(calls) == 3 + n_parts - 2
    assert all(file.stat().st_mtime_ns == at for file, at in done.items())
    np.testing.assert_array_equal(np.asarray(grid["grid"].layers["peka"]), whole)


def test_predictions_stay_in_the_store_when_the_object_is_written(
    grid: SpatialData, adapter: pk.Adapter, tmp_path: Path
) -> None:
    pk.tl.predict_expression(grid, adapter, store=tmp_path / "store", **CPU)
    values = np.asarray(grid["grid"].layers["peka"])
    grid.write(tmp_path / "slide.zarr")
    assert not list((tmp_path / "slide.zarr/tables/grid/layers").glob("peka*"))
    again = sd.read_zarr(tmp_path / "slide.zarr")
    assert not again["grid"].layers and again["grid"].shape == values.shape
    pk.io.attach_predictions(again)
    np.testing.assert_array_equal(np.asarray(again["grid"].layers["peka"]), values)
    # a copy of the table is written without them, too; a subset or result is an array like any other
    again["grid"].copy().write_zarr(tmp_path / "table.zarr")
    assert not list((tmp_path / "table.zarr/layers").glob("peka*"))
    subset = again["grid"][:, :3].copy()
    subset.write_zarr(tmp_path / "subset.zarr")
    assert (tmp_path / "subset.zarr/layers/peka").is_dir()
    few = pk.get.expression(again, genes=[adapter.genes[2], adapter.genes[0]])
    np.testing.assert_array_equal(few.X, values[:, [2, 0]])
    with pytest.raises(KeyError, match=r"`genes=`: \['nope'\] not found"):
        pk.get.expression(again, genes=["nope"])
    # moved, gone, another's
    shutil.move(tmp_path / "store", tmp_path / "moved")
    moved = sd.read_zarr(tmp_path / "slide.zarr")
    with pytest.raises(FileNotFoundError, match="it was moved or deleted. Give its new place as `store=`"):
        pk.io.attach_predictions(moved)
    pk.io.attach_predictions(moved, store=tmp_path / "moved")
    np.testing.assert_array_equal(np.asarray(moved["grid"].layers["peka"]), values)
    fewer = moved["grid"][:10].copy()
    del fewer.layers["peka"]
    del moved.tables["grid"]
    moved.tables["grid"] = fewer
    with pytest.raises(ValueError, match=r"other predictions than the table's: \d+ rows and 24 genes, 10 and 24"):
        pk.io.attach_predictions(moved, store=tmp_path / "moved")
    del moved.tables["grid"].uns["pekasc"]["peka"]
    with pytest.raises(KeyError, match=r"No table has predictions in a store: \['grid'\]"):
        pk.io.attach_predictions(moved)


def test_a_table_that_was_changed_never_gets_the_values_of_other_rows(
    grid: SpatialData, adapter: pk.Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pk.tl.predict_expression(grid, adapter, store=tmp_path / "store", **CPU)
    table = grid["grid"]
    values = np.asarray(table.layers["peka"])
    order = np.random.default_rng(0).permutation(table.n_obs)
    del grid.tables["grid"]
    grid.tables["grid"] = table[order].copy()
    grid.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.io.attach_predictions(again)  # what was reordered was written with the object
    assert "layers['peka'] was written with the table, and stays" in caplog.text
    np.testing.assert_array_equal(np.asarray(again["grid"].layers["peka"]), values[order])
    for other in (again["grid"], table[:, ::-1].copy()):
        del other.layers["peka"]
        with pytest.raises(ValueError, match="has other rows or genes than when its predictions 'peka' were"):
            pk.io.attach_predictions(other)
        assert not other.layers
    # other names of rows and regions are no other rows
    table.obs_names = [f"tile {i}" for i in range(table.n_obs)]
    table.obs["region"] = table.obs["region"].cat.rename_categories(["renamed"])
    del table.layers["peka"]
    pk.io.attach_predictions(table)
    np.testing.assert_array_equal(np.asarray(table.layers["peka"]), values)


def test_a_table_with_genes_has_a_layer_of_its_shape_in_the_store(
    slide: SpatialData, adapter: pk.Adapter, tmp_path: Path
) -> None:
    pk.tl.predict_expression(slide, adapter, genes=list(adapter.genes[:5]), **CPU)
    inside = slide["table"].layers["peka"]
    pk.tl.predict_expression(
        slide, adapter, genes=list(adapter.genes[:5]), store=tmp_path / "store",
        compute={"device": "cpu", "stored_precision": "float16"}, progress=False,
    )  # fmt: skip
    layer = slide["table"].layers["peka"]
    assert layer.dtype == np.float16 and layer.shape == slide["table"].shape
    np.testing.assert_allclose(np.asarray(layer), inside, rtol=2e-3, atol=1e-3)
    assert len(pk.tl.evaluate(slide)) == 5
    with pytest.raises(ValueError, match="'stored_precision' does nothing .*: no predictions are stored"):
        pk.tl.predict_expression(slide, adapter, compute={"stored_precision": "float16"}, progress=False)


def test_the_context_of_a_grid_is_that_of_the_lattice(slide: SpatialData, adapter: pk.Adapter) -> None:
    assert adapter.info["pitch_um"] == pytest.approx(100) and len(adapter.info["neighbour_offsets_um"]["210"]) == 18
    spots = np.flatnonzero(slide["table"].obs["region"] == "P2S1_spots")
    coords = np.asarray(slide["table"].obsm["spatial"])[spots]
    section = np.zeros(len(coords))
    as_trained = adapter.neighbours(coords, section)[210]
    # a grid that holds the lattice: the mean is over the same places, whatever lies between
    between = coords + [25.0, 12.0]
    both = np.concatenate([coords, between])
    rows = adapter.neighbours(both, np.zeros(len(both)), grid=True)[210][: len(coords)]
    np.testing.assert_allclose(rows[:, : len(coords)].toarray(), as_trained.toarray(), atol=1e-12)
    assert rows[:, len(coords) :].nnz == 0


def _arrays(sdata: SpatialData) -> dict[str, Any]:
    """Return positions and sections of all rows; the phantom has 1 um per unit, its table the order of its shapes."""
    labels = sdata["table"].obs["region"].astype(str).to_numpy()
    points = [point for region in ("P1S1_spots", "P2S1_spots") for point in sdata[region].geometry]
    return {"coords_um": np.array([(point.x, point.y) for point in points]), "section": labels}


def _layer(sdata: SpatialData, adapter: pk.Adapter) -> np.ndarray:
    layer = np.asarray(sdata["table"].layers["peka"])
    return layer[:, sdata["table"].var_names.get_indexer(list(adapter.genes))]


@pytest.mark.usefixtures("small_parts")
def test_a_blend_is_the_same_from_arrays_in_memory_and_in_parts(
    tiled: SpatialData, blend: pk.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = blend.reading.use().members
    assert [member.name for member in members] == ["frozen:low-rank", "adapted:ridge", "adapted:low-rank"]
    assert [member.weight for member in members] == pytest.approx([0.5, 0.25, 0.25])
    assert blend.context_um == 150 and blend.fields_um == (224.0,) and members[0].fields == {1}
    pk.tl.predict_expression(tiled, blend, **CPU)
    whole = _layer(tiled, blend)
    tiles, wide = (pk.get.tiles(tiled, field_um=width).to_numpy() for width in (None, 224))
    made = blend.predict(tiles, mpp=2.0, fields={224: wide}, compute={"device": "cpu"}, **_arrays(tiled))
    np.testing.assert_allclose(whole, made, atol=1e-4)
    adapted = blend.embed(tiles, mpp=2.0, compute={"device": "cpu"})
    np.testing.assert_allclose(tiled["table"].obsm["X_peka"], adapted, atol=1e-5)
    blend.save(tmp_path / "adapter")
    loaded = pk.Adapter.load(tmp_path / "adapter")
    for size, chunk in ((1, 7), (7, 64), (256, 256)):
        monkeypatch.setattr(_predict_rows, "_TILES", size)
        monkeypatch.setattr(_section_features, "_CHUNK", chunk)
        pk.tl.predict_expression(tiled, loaded, store=tmp_path / f"store {size}", **CPU)
        np.testing.assert_allclose(_layer(tiled, blend), whole, atol=1e-4)
        np.testing.assert_allclose(np.asarray(tiled["table"].obsm["X_peka"]), adapted, atol=1e-5)


def test_without_positions_or_wide_tiles_heads_that_need_none_predict(
    tiled: SpatialData, blend: pk.Adapter, trained_options: dict[str, Any]
) -> None:
    """They are those of a fit without; the training is the same."""
    narrow = pk.Readout(context_um=150, fields_um=None, n_components=10)
    plain = pk.tl.fit_adapter(tiled, **{**trained_options, "readout": narrow})
    tiles, wide = (pk.get.tiles(tiled, field_um=width).to_numpy() for width in (None, 224))
    how: dict[str, Any] = {"mpp": 2.0, "compute": {"device": "cpu"}}
    where = _arrays(tiled)
    full = blend.predict(tiles, fields={224: wide}, **where, **how)
    alone, no_fields = blend.predict(tiles, **how), blend.predict(tiles, **where, **how)
    np.testing.assert_allclose(no_fields, plain.predict(tiles, **where, **how), atol=1e-4)
    np.testing.assert_allclose(alone, plain.predict(tiles, **how), atol=1e-4)
    np.testing.assert_allclose(blend.predict(tiles, fields={224: wide}, **how), alone, atol=1e-5)
    assert blend.predict(tiles[:0], **how).shape == (0, len(blend.genes))
    for one, other in ((full, no_fields), (full, alone), (no_fields, alone)):
        assert np.abs(one - other).max() > 1e-2
    # any of them is better than nothing on the tissue that all were fitted on
    table = tiled["table"]
    measured = log1p_cp10k(table).toarray()[:, table.var_names.get_indexer(list(blend.genes))]
    error = np.square(measured - measured.mean(axis=0)).mean()
    assert all(np.square(one - measured).mean() < error for one in (full, no_fields, alone))


def test_a_section_without_wide_tiles_is_predicted_without(
    tiled: SpatialData, blend: pk.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: Any, **how: Any) -> None:
        raise ValueError("nothing beyond the patches")

    monkeypatch.setattr("pekasc.tl._predict_rows.further_readers", none)
    with pytest.warns(UserWarning, match="wider field of view cannot be read here, .* predict: nothing beyond the pat"):
        pk.tl.predict_expression(tiled, blend, **CPU)
    tiles = pk.get.tiles(tiled).to_numpy()
    made = blend.predict(tiles, mpp=2.0, compute={"device": "cpu"}, **_arrays(tiled))
    np.testing.assert_allclose(_layer(tiled, blend), made, atol=1e-4)
    assert read_uns(tiled["table"], "peka")["fields_um"] == []  # type: ignore[index]


def test_without_a_wide_field_context_may_have_other_radii(
    tiled: SpatialData, blend: pk.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that were fitted without it chose theirs by themselves."""

    def none(*args: Any, **how: Any) -> None:
        raise ValueError("nothing beyond the patches")

    members = tuple(
        replace(m, head=replace(m.head, context_um=210.0)) if m.variant == 1 and m.head.context_um else m
        for m in blend.reading.members
    )
    other = replace(blend, reading=replace(blend.reading, members=members))
    assert other.reading.use().radii_um == (150,) != other.reading.use(fields=False).radii_um
    monkeypatch.setattr("pekasc.tl._predict_rows.further_readers", none)
    with pytest.warns(UserWarning, match="wider field of view cannot be read here"):
        pk.tl.predict_expression(tiled, other, **CPU)
    made = other.predict(pk.get.tiles(tiled).to_numpy(), mpp=2.0, compute={"device": "cpu"}, **_arrays(tiled))
    np.testing.assert_allclose(_layer(tiled, other), made, atol=1e-4)
    used = read_uns(tiled["table"], "peka")["context_um"]  # type: ignore[index]
    assert list(used) == list(other.reading.use(fields=False).radii_um)


def test_a_store_takes_nothing_of_another_reading(tiled: SpatialData, tmp_path: Path, counted: list[int]) -> None:
    """Of one encoder at one depth: scores are those of a reading, and no features."""
    table = tiled["table"]
    n = table.n_obs
    low_rank = RIDGE.replace(head="low-rank", depth=2, head_rank=3)
    for readout in (RIDGE.replace(depth=2), low_rank, low_rank.replace(context_um=150)):
        adapter = pk.tl.fit_adapter(tiled, **{**FROZEN, "readout": readout})
        pk.tl.predict_expression(tiled, adapter, **CPU)
        whole = _layer(tiled, adapter)
        counted.clear()
        pk.tl.predict_expression(tiled, adapter, store=tmp_path / "store", **CPU)
        assert sum(counted) == n
        np.testing.assert_allclose(_layer(tiled, adapter), whole, atol=1e-5)
        # and all of its own, also once it was saved and loaded
        adapter.save(tmp_path / "adapter")
        loaded = pk.Adapter.load(tmp_path / "adapter")
        counted.clear()
        pk.tl.predict_expression(tiled, loaded, store=tmp_path / "store", **CPU)
        assert sum(counted) == 0
        np.testing.assert_allclose(_layer(tiled, adapter), whole, atol=1e-5)
    pk.tl.embed_tiles(tiled, adapter, store=tmp_path / "store", **CPU)
    assert sum(counted) == n and table.obsm["X_peka"].shape == (n, 512)


def test_a_coarse_grid_is_warned_of(grid: SpatialData, adapter: pk.Adapter) -> None:
    pk.pp.tile_grid(grid, "P2S1_he", stride_um=80, **GRID, table_added="coarse")
    with pytest.warns(UserWarning, match="are 80 um apart, and the training spots, .* 100 um: .* at most 50 um"):
        pk.tl.predict_expression(grid, adapter, table_name="coarse", **CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* um apart, and the training spots")
        pk.tl.predict_expression(grid, adapter, table_name="grid", **CPU)  # 50 um, half of 100


def test_tiles_at_the_spots_are_predicted_as_the_spots_are(slide: SpatialData) -> None:
    frozen = pk.tl.fit_adapter(slide, readout=RIDGE.replace(depth=2), **FROZEN)
    pk.tl.predict_expression(slide, frozen, **CPU)
    with pytest.raises(ValueError, match="'P2S1_spots_tiles' is taken .* under another name"):
        pk.pp.tile_grid(slide, "P2S1_he", shapes="P2S1_spots", tissue=False, **GRID, table_added="at_spots")
    slide.shapes["other"] = slide.shapes["P2S1_spots"]
    pk.pp.tile_grid(slide, "P2S1_he", shapes="other", tissue=False, **GRID, table_added="at_spots")
    pk.tl.predict_expression(slide, frozen, table_name="at_spots", **CPU)
    spots = slide["table"][slide["table"].obs["region"] == "P2S1_spots"]
    order = slide["at_spots"].obs.reset_index().set_index("tile_id").loc[spots.obs["spot_id"], "index"]
    found = slide["at_spots"][order].layers["peka"]
    np.testing.assert_allclose(found, spots[:, list(frozen.genes)].layers["peka"], atol=1e-4)


def test_the_only_table_with_tiles_is_taken(
    grid: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    grid.tables["notes"] = AnnData(np.ones((3, 2)))
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(grid, adapter, **CPU)
    assert "Using the only table with tiles, 'grid'." in caplog.text
    assert grid["grid"].layers["peka"].shape == pk.get.expression(grid).shape
    assert len(pk.get.tiles(grid)) == grid["grid"].n_obs
    pk.pp.tile_grid(grid, "P2S1_he", stride_um=100, **GRID, table_added="coarse")
    with pytest.raises(KeyError, match=r"'table' not found .*Available tables: \['notes', 'grid', 'coarse'\]"):
        pk.tl.predict_expression(grid, adapter, **CPU)


def test_errors_of_a_grid_name_the_call_that_makes_it(grid: SpatialData, adapter: pk.Adapter) -> None:
    del grid.shapes["P2S1_he_grid_tiles"]
    call = r"Run `pk.pp.tile_grid\(sdata, 'P2S1_he', tile_px=56, mpp=2, stride_um=50\)` again"
    with pytest.raises(KeyError, match=call):
        pk.tl.predict_expression(grid, adapter, **CPU)
    grid.shapes["cells"] = grid.shapes["P2S1_he_grid"]
    pk.pp.tile_grid(grid, "P2S1_he", shapes="cells", tile_px=28, mpp=2.0, table_added="cells_table")
    with pytest.raises(ValueError, match="Tile with `tile_px=56, mpp=2` .* and of a grid `pekasc.pp.tile_grid`"):
        pk.tl.predict_expression(grid, adapter, table_name="cells_table", **CPU)
    del grid.shapes["cells_tiles"]
    call = (
        r"Run `pk.pp.tile_grid\(sdata, 'P2S1_he', tile_px=28, mpp=2, shapes='cells', table_added='cells_table'\)` again"
    )
    with pytest.raises(KeyError, match=call):
        pk.get.tiles(grid, table_name="cells_table")


def test_another_adapter_brings_its_own_genes(slide: SpatialData, grid: SpatialData, adapter: pk.Adapter) -> None:
    pk.tl.predict_expression(grid, adapter, **CPU)
    five = pk.tl.fit_adapter(slide, genes=list(adapter.genes[:5]), readout=RIDGE.replace(depth=1), **FROZEN)
    pk.tl.predict_expression(grid, five, **CPU)
    assert list(grid["grid"].var_names) == list(five.genes) and set(grid["grid"].layers) == {"peka"}
    # beside predictions under another key, only genes that are there
    pk.tl.predict_expression(grid, adapter, key_added="all", genes=list(adapter.genes[:5]), **CPU)
    assert set(grid["grid"].layers) == {"peka", "all"} and grid["grid"].n_vars == 5
    # the user's own columns stay
    grid["grid"].obs["umi_total"] = 1.0
    with pytest.raises(ValueError, match=r"`key_added='umi'` would replace `obs\['umi_total'\]`"):
        pk.tl.predict_expression(grid, five, key_added="umi", **CPU)
