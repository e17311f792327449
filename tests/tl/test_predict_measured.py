"""predict_expression(measured="kriging"): maps between spots are pulled to them, per section, and say how far."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import TableModel
from tests.tl.conftest import copy_of

import pekasc as pk
from pekasc._keys import read_uns
from pekasc._sections import tiled_sections
from pekasc.models.kriging import fit_kriging
from pekasc.tiling import Stain
from pekasc.tl._predict_measured import adapter_digest, prediction_inputs_digest
from pekasc.tl._predict_spots import counting_variance

RIDGE = pk.Readout.preset("ridge").replace(n_depths=None, depth=2)
CPU: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
FROZEN: dict[str, Any] = {"method": None, "train": ["P1S1_spots"], "readout": RIDGE, **CPU}
TILES: dict[str, Any] = {"tile_px": 56, "mpp": 2.0}
GRID: dict[str, Any] = {**TILES, "min_sharpness": None, "max_pen": None}
PULL: dict[str, Any] = {"table_name": "grid", "measured": "kriging", **CPU}
SHIFT = 1.5


@pytest.fixture(scope="module")
def _slide() -> SpatialData:
    """Return two sections with spots, and a grid of 50 um on the second, where a gene is far from its prediction."""
    sdata = pk.datasets.phantom(n_patients=2, size_um=800, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, **TILES)
    pk.pp.tile_grid(sdata, "P2S1_he", stride_um=50, **GRID)
    return sdata


@pytest.fixture(scope="module")
def adapter(_slide: SpatialData) -> pk.Adapter:
    return pk.tl.fit_adapter(copy_of(_slide), **FROZEN)


@pytest.fixture(scope="module")
def calibrated(adapter: pk.Adapter) -> pk.Adapter:
    return pk.tl.calibrate(adapter)


@pytest.fixture(scope="module")
def _pulled(_slide: SpatialData, adapter: pk.Adapter) -> SpatialData:
    sdata = copy_of(_slide)
    pk.tl.predict_expression(sdata, adapter, table_name="grid", key_added="plain", **CPU)
    plain = sdata["grid"].copy()
    sdata = copy_of(_slide)
    pk.tl.predict_expression(sdata, adapter, **PULL)
    sdata.tables["plain"] = plain
    return sdata


@pytest.fixture
def slide(_slide: SpatialData) -> SpatialData:
    return copy_of(_slide)


@pytest.fixture
def pulled(_pulled: SpatialData) -> SpatialData:
    return copy_of(_pulled)


def said(sdata: SpatialData, table: str = "grid", key: str = "peka") -> dict[str, Any]:
    return dict(read_uns(sdata[table], key)["measured"])


def replace_table(sdata: SpatialData, name: str, table: Any) -> None:
    if name in sdata.tables:
        del sdata.tables[name]
    sdata.tables[name] = table


def test_the_map_is_the_plain_one_and_the_kriging_of_residuals(pulled: SpatialData, adapter: pk.Adapter) -> None:
    # written down again with arrays: counts, totals, predictions at the spots
    grid, plain = pulled["grid"], np.asarray(pulled["plain"].layers["plain"])
    pk.tl.predict_expression(pulled, adapter, key_added="own", **CPU)
    table = pulled["table"]
    own = (table.obs["region"] == "P2S1_spots").to_numpy()
    counts = table.X[own].toarray().astype(float)
    total = counts.sum(axis=1)
    columns = table.var_names.get_indexer(grid.var_names)
    log = np.log1p(1e4 * counts / total[:, None])[:, columns]
    residuals = log - table.layers["own"][own][:, columns]
    counting = counting_variance(log, table.layers["own"][own][:, columns], total)
    places = np.asarray(table.obsm["spatial"])[own]
    expected = fit_kriging(places, residuals, np.median(total) / total, counting)
    pull, deviation = expected.at(np.asarray(grid.obsm["spatial"]))
    np.testing.assert_allclose(grid.layers["peka_kriging_sd"], deviation, atol=1e-4)
    moved = expected.pulled
    assert moved.any() and not moved.all()
    np.testing.assert_array_equal(grid.layers["peka"][:, ~moved], plain[:, ~moved])
    np.testing.assert_allclose(grid.layers["peka"], np.maximum(plain + pull, np.minimum(plain, 0)), atol=1e-4)
    assert grid.layers["peka"].dtype == grid.layers["peka_kriging_sd"].dtype == np.float32
    facts = said(pulled)
    assert (facts["method"], facts["table"], list(facts["sections"])) == ("kriging", "table", ["P2S1_he_grid"])
    section = facts["sections"]["P2S1_he_grid"]
    assert section["n_spots"] == own.sum() and section["n_pulled"] == moved.sum()
    assert section["range_um"] == pytest.approx(expected.range_um)
    assert (section["n_measured"], section["n_trained"], section["n_beyond"]) == (grid.n_vars, 0, 0)


def test_it_is_nearer_to_the_truth(pulled: SpatialData) -> None:
    grid = pulled["grid"]
    truth = pk.datasets.phantom_truth(pulled, "P2S1_he", coords_um=grid.obsm["spatial"])[
        list(grid.var_names)
    ].to_numpy()
    depends = pulled["table"].var.loc[grid.var_names, "phantom_depends_on"].to_numpy() != "nothing"
    before, after = (
        np.square(np.asarray(values) - truth)[:, depends].mean()
        for values in (pulled["plain"].layers["plain"], grid.layers["peka"])
    )
    assert after < 0.8 * before


def test_other_readers_of_predictions_go_on(pulled: SpatialData) -> None:
    grid = pulled["grid"]
    adata = pk.get.expression(pulled, table_name="grid")
    np.testing.assert_array_equal(adata.X, grid.layers["peka"])
    deviation = pk.get.expression(pulled, layer="peka_kriging_sd", table_name="grid")
    assert deviation.shape == grid.shape
    truth = pk.datasets.phantom_truth(pulled, "P2S1_he", coords_um=adata.obsm["spatial"])
    grid.layers["truth"] = truth[list(grid.var_names)].to_numpy()
    scores = pk.tl.evaluate(pulled, truth="truth", table_name="grid")
    assert scores.set_index("gene")["pearson"].filter(like="STATE").mean() > 0.4
    figure = pk.pl.slide(pulled, color=grid.var_names[0], table_name="grid")
    assert figure.axes
    with pytest.raises(ValueError, match=r"layers\['peka'\] was pulled to measured spots, and intervals are known"):
        pk.get.interval(pulled, total=1000, table_name="grid")


def test_predictions_of_the_adapter_at_the_spots_are_used(
    slide: SpatialData, pulled: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    pk.tl.predict_expression(slide, adapter, **CPU)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(slide, adapter, **PULL)
    assert "Predictions at the spots are those of layers['peka']." in caplog.text
    np.testing.assert_allclose(slide["grid"].layers["peka"], pulled["grid"].layers["peka"], atol=1e-4)
    # those of another adapter, or pulled ones, are not
    other = pk.tl.fit_adapter(slide, **{**FROZEN, "train": ["P2S1_spots"]})
    assert adapter_digest(other) != adapter_digest(adapter)
    pk.tl.predict_expression(slide, other, **CPU)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(slide, adapter, **PULL)
    assert "Predictions at the spots" not in caplog.text
    np.testing.assert_allclose(slide["grid"].layers["peka"], pulled["grid"].layers["peka"], atol=1e-4)


def test_what_the_spots_did_not_tell_is_counted(slide: SpatialData, adapter: pk.Adapter) -> None:
    # a gene that the table lacks, one that the section did not measure, and spots without counts
    table = slide["table"]
    first, second = adapter.genes[:2]
    measured = pd.DataFrame(True, index=table.var_names, columns=["P1S1_spots", "P2S1_spots"])
    measured.loc[first, "P2S1_spots"] = False
    table.varm["measured"] = measured
    rows = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    counts = table.X.tolil()
    counts[rows[:3]] = 0
    table.X = counts.tocsr()
    replace_table(slide, "table", table[:, table.var_names != second].copy())
    pk.tl.predict_expression(slide, adapter, **PULL)
    facts, grid = said(slide)["sections"]["P2S1_he_grid"], slide["grid"]
    assert facts["n_measured"] == grid.n_vars - 2 and facts["n_spots"] == rows.size - 3
    missing = grid.var_names.isin([first, second])
    assert np.isnan(grid.layers["peka_kriging_sd"][:, missing]).all()
    assert np.isfinite(grid.layers["peka_kriging_sd"][:, ~missing]).all()
    assert np.isfinite(grid.layers["peka"]).all()


def test_totals_of_other_genes_are_warned_of(slide: SpatialData, adapter: pk.Adapter) -> None:
    replace_table(slide, "table", slide["table"][:, list(adapter.genes[:8])].copy())
    with pytest.warns(
        UserWarning, match="over 8 genes here, and were over 24 in the training.* a pull to these values"
    ):
        pk.tl.predict_expression(slide, adapter, **PULL)


def test_every_section_is_pulled_to_its_own_spots(slide: SpatialData, adapter: pk.Adapter) -> None:
    # the rows of one table: half of the spots of the second section are a gap, the first is not in the table of spots
    table = slide["table"]
    second = (table.obs["region"] == "P2S1_spots").to_numpy()
    left = np.asarray(table.obsm["spatial"])[:, 0] < 520
    spots = table[second & left].copy()
    spots.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": ["P2S1_spots"]}
    slide.tables["left"] = spots
    before = table.copy()
    pk.tl.predict_expression(slide, adapter, **CPU)
    plain = np.asarray(slide["table"].layers["peka"])
    pk.tl.predict_expression(slide, adapter, measured="kriging", measured_table="left", **CPU)
    table = slide["table"]
    np.testing.assert_array_equal(table.X.toarray(), before.X.toarray())
    there = np.isin(table.var_names, adapter.genes)
    np.testing.assert_array_equal(table.layers["peka"][~second], plain[~second])
    assert np.isnan(table.layers["peka_kriging_sd"][~second]).all()
    deviation = table.layers["peka_kriging_sd"][second][:, there]
    assert np.isfinite(deviation).all()
    assert (table.layers["peka"][second] != plain[second]).any()
    # the farther, the less is known
    assert deviation[~left[second]].mean() > deviation[left[second]].mean()
    # and what a prediction was pulled to is nothing to score it with
    trained = table.obs["peka_train"].to_numpy()
    np.testing.assert_array_equal(trained, ~second | (second & left))
    assert set(pk.tl.evaluate(slide)["n_spots"]) == {(second & ~left).sum()}
    # a plain prediction takes everything of it away
    pk.tl.predict_expression(slide, adapter, **CPU)
    assert "peka_kriging_sd" not in slide["table"].layers
    np.testing.assert_array_equal(slide["table"].layers["peka"], plain)


def test_an_adapter_of_the_same_spots_is_warned_of(slide: SpatialData, adapter: pk.Adapter) -> None:
    pk.pp.tile_grid(slide, "P1S1_he", stride_um=50, table_added="first", **GRID)
    n = int((slide["table"].obs["region"] == "P1S1_spots").sum())
    with pytest.warns(UserWarning, match=rf"trained on {n} of the {n} spots .*layers\['peka_kriging_sd'\] too small"):
        pk.tl.predict_expression(slide, adapter, **{**PULL, "table_name": "first"})
    assert said(slide, "first")["sections"]["P1S1_he_first"]["n_trained"] == n


def test_the_store_holds_the_same_and_brings_it_back(
    slide: SpatialData, pulled: SpatialData, adapter: pk.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pekasc.models.features import _predictions

    monkeypatch.setattr(_predictions, "_SHARD_BYTES", 1)
    monkeypatch.setattr(_predictions, "_ROWS", 32)
    expected = pulled["grid"]
    for _ in range(2):  # the second finds all of it
        pk.tl.predict_expression(slide, adapter, store=tmp_path / "store", **PULL)
        for name in ("peka", "peka_kriging_sd"):
            layer = slide["grid"].layers[name]
            assert isinstance(layer, da.Array) and layer.numblocks[0] > 1
            np.testing.assert_allclose(layer.compute(), expected.layers[name], atol=1e-5)
    kept = {path.name for path in (tmp_path / "store").iterdir()}
    # another pull is another prediction
    table = slide["table"]
    table.X = table.X * 2
    table.X[:, 0] = 0
    pk.tl.predict_expression(slide, adapter, store=tmp_path / "store", **PULL)
    assert len({path.name for path in (tmp_path / "store").iterdir()} - kept) == 2
    slide.write(tmp_path / "slide.zarr")
    read = sd.read_zarr(tmp_path / "slide.zarr")
    assert not {"peka", "peka_kriging_sd"} & set(read["grid"].layers)
    pk.io.attach_predictions(read)
    for name in ("peka", "peka_kriging_sd"):
        np.testing.assert_array_equal(read["grid"].layers[name].compute(), slide["grid"].layers[name].compute())


def test_a_calibrated_adapter_leaves_intervals_out(slide: SpatialData, calibrated: pk.Adapter) -> None:
    pk.tl.predict_expression(slide, calibrated, table_name="grid", **CPU)
    assert {"peka_lower", "peka_upper"} <= set(slide["grid"].layers)
    pk.tl.predict_expression(slide, calibrated, abstain=0.05, **PULL)
    grid = slide["grid"]
    assert {name for name in grid.layers if name} == {"peka", "peka_kriging_sd"}
    assert "peka_novelty" in grid.obs and "peka_trust" in grid.var
    out = (grid.obs["peka_novelty"] < 0.05).to_numpy()
    assert out.any() and not out.all()
    for name in ("peka", "peka_kriging_sd"):
        np.testing.assert_array_equal(np.isnan(grid.layers[name]).all(axis=1), out)
        np.testing.assert_array_equal(np.isnan(grid.layers[name]).any(axis=1), out)
    pk.tl.predict_expression(slide, calibrated, table_name="grid", **CPU)
    assert {name for name in slide["grid"].layers if name} == {"peka", "peka_lower", "peka_upper"}


def test_values_as_stored_are_pulled_without_a_floor(slide: SpatialData) -> None:
    table = slide["table"]
    rng = np.random.default_rng(0)
    scores = np.asarray(table.layers["truth"]) - 3 + rng.normal(0, 0.1, table.shape)
    second = (table.obs["region"] == "P2S1_spots").to_numpy()
    scores[second] -= 5
    table.layers["scores"] = scores.astype(np.float32)
    adapter = pk.tl.fit_adapter(slide, target="as_is", layer="scores", genes=list(table.var_names[:12]), **FROZEN)
    pk.tl.predict_expression(slide, adapter, **PULL)
    made = np.asarray(slide["grid"].layers["peka"])
    assert made.shape[1] == 12 and abs(made.mean() - scores[second][:, :12].mean()) < 0.3
    del slide["table"].layers["scores"]
    with pytest.raises(
        ValueError, match=r"`measured_table='table'`: .* values on the scale of its training, .*'scores'"
    ):
        pk.tl.predict_expression(slide, adapter, **PULL)


def spots_of(slide: SpatialData, rows: np.ndarray) -> None:
    table = slide["table"]
    part = table[rows].copy()
    regions = sorted(part.obs["region"].astype(str).unique())
    part.obs["region"] = part.obs["region"].cat.remove_unused_categories()
    part.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": regions}
    replace_table(slide, "table", part)


def change(slide: SpatialData, how: str) -> None:
    table = slide["table"]
    second = (table.obs["region"] == "P2S1_spots").to_numpy()
    if how == "other image":
        spots_of(slide, ~second)
    elif how == "few":
        spots_of(slide, np.flatnonzero(second)[:10])
    elif how == "one place":
        shapes = slide.shapes["P2S1_spots"]
        slide.shapes["P2S1_spots"] = shapes.set_geometry([shapes.geometry.iloc[0]] * len(shapes))
        pk.pp.tile(slide, **TILES, image_mpp=1.0)
    elif how == "no counts":
        table.X = table.X * 0.5
    elif how == "no values":
        table.X = None
        for layer in [name for name in table.layers if name is not None]:
            del table.layers[layer]
    elif how == "empty":
        table.X = table.X * 0
    elif how == "other genes":
        table.var_names = [f"ENSG{i}" for i in range(table.n_vars)]
    elif how == "grid alone":
        del slide.tables["table"]


@pytest.mark.parametrize(
    ("how", "options", "error", "message"),
    [
        ("", {"measured": "idw"}, ValueError, r"`measured='idw'` is unknown: use one of \['kriging'\], or None"),
        ("", {"measured": None, "measured_table": "table"}, ValueError,
         "`measured_table='table'` does nothing without `measured=\"kriging\"`"),
        ("", {"measured_table": "spots"}, KeyError,
         r"'spots' not found .* Available tables: \['table', 'grid'\]. Name that of the spots with `measured_table=`"),
        ("", {"measured_table": "grid"}, ValueError, "`measured_table='grid'` has no measurements to pull predictions "
         r"to: it holds no genes\. Name"),
        ("grid alone", {}, ValueError,
         r"`measured_table='grid'` has no measurements .* Name the table of the spots with `measured_table=`\.$"),
        ("no values", {}, ValueError, r"'table'` has no measurements .*: it holds no values \(`X` or a layer\)\. Name"),
        ("other image", {}, ValueError,
         r"No spots of `measured_table='table'` lie on an image of the tiles of 'grid': they are on 'P1S1_he' "
         r"\(coordinate system 'P1S1'\), the tiles on 'P2S1_he' \(coordinate system 'P2S1'\)\. Make the grid on"),
        ("few", {}, ValueError, r"^No section of 'grid' can be pulled to `measured_table='table'`: 'P2S1_he_grid': of "
         r"its 10 spots in 'table', 10 can be used \(with measurements and a prediction\), but kriging needs at least "
         r"25 spots\. Predict without `measured=`\.$"),
        ("empty", {}, ValueError, "of its .* none has measurements and a prediction. Predict without `measured=`"),
        ("one place", {}, ValueError, "but more than half of the spots share their position with another"),
        ("no counts", {}, ValueError, "`measured_table='table'`: the adapter's predictions are pulled to counts, and "
         "those of this table cannot be used. Raw counts are needed, but `X` has values that are no integers .* "
         r"Put them into `X` or layers\['counts'\] of that table, or name another with `measured_table=`\.$"),
        ("other genes", {}, ValueError, r"`measured_table='table'`: None of the \d+ genes"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(
    slide: SpatialData, adapter: pk.Adapter, how: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    change(slide, how)
    before = repr(slide), {name: repr(table) for name, table in slide.tables.items()}
    with pytest.raises(error, match=message):
        pk.tl.predict_expression(slide, adapter, **{**PULL, **options})
    assert (repr(slide), {name: repr(table) for name, table in slide.tables.items()}) == before


def test_a_section_with_few_spots_is_said(
    slide: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    table = slide["table"]
    second = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    spots_of(slide, np.setdiff1d(np.arange(table.n_obs), second[10:]))
    with caplog.at_level(logging.INFO, logger="pekasc"), pytest.warns(UserWarning) as caught:
        pk.tl.predict_expression(slide, adapter, measured="kriging", **CPU)
    assert "Sections without measured spots" not in caplog.text  # it has some
    assert any(
        "Section 'P2S1_spots' is predicted without a pull: of its 10 spots in 'table', 10 can be used (with "
        "measurements and a prediction), but kriging needs at least 25 spots." == str(one.message)
        for one in caught
    )
    assert list(said(slide, "table")["sections"]) == ["P1S1_spots"]


def test_tiles_beyond_the_range_are_counted_or_an_error(
    slide: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    # spots in one corner: the rest of the slide is too far
    table = slide["table"]
    at = np.asarray(table.obsm["spatial"])
    second = (table.obs["region"] == "P2S1_spots").to_numpy()
    near = np.flatnonzero(second)[np.argsort(np.abs(at[second] - [650, 400]).max(axis=1))[:30]]
    # noise, whose best range is a short one or none
    spots = table[near].copy()
    spots.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": ["P2S1_spots"]}
    slide.tables["corner"] = spots
    grid = slide["grid"]
    far = np.asarray(grid.obsm["spatial"])[:, 0] < 200
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(slide, adapter, **{**PULL, "measured_table": "corner"})
    facts = said(slide)["sections"]["P2S1_he_grid"]
    assert f"{facts['n_beyond']} of {facts['n_tiles']} tiles are farther than the range from every spot." in caplog.text
    distance = np.linalg.norm(np.asarray(grid.obsm["spatial"])[:, None] - at[near], axis=2).min(axis=1)
    assert facts["n_beyond"] == (distance > facts["range_um"]).sum()
    assert facts["nearest_um"] == pytest.approx(distance.min(), abs=0.1)
    # a grid of the far tiles alone, with spots whose range is shrunk to reach none of them
    part = grid[far].copy()
    part.uns["spatialdata_attrs"] = grid.uns["spatialdata_attrs"]
    replace_table(slide, "grid", TableModel.parse(part))
    from pekasc.tl import _predict_spots

    fit = _predict_spots.fit_kriging

    def short(*parts: Any) -> Any:
        from dataclasses import replace

        return replace(fit(*parts), range_um=5.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_predict_spots, "fit_kriging", short)
        with pytest.raises(ValueError, match=r"No tile of 'grid' lies within the range of a spot .* range is 5 um"):
            pk.tl.predict_expression(slide, adapter, **{**PULL, "measured_table": "corner"})


def test_an_image_of_two_pixel_sizes_is_an_error(slide: SpatialData, adapter: pk.Adapter) -> None:
    tiles = dict(slide["grid"].uns["pekasc"]["tiles"])
    section = tiles["sections"]["P2S1_he_grid"]
    changed = {**section, "mpp": 1.1, "source": "image_mpp", "um_to_px": np.asarray(section["um_to_px"]) / 1.1}
    slide["grid"].uns["pekasc"]["tiles"] = {**tiles, "sections": {"P2S1_he_grid": changed}}
    with pytest.raises(ValueError, match=r"'P2S1_he' has 1.1 um per pixel .* 'table': tile both with the right pixel"):
        pk.tl.predict_expression(slide, adapter, **PULL)


def test_spots_without_tiles_are_tiled(_slide: SpatialData, pulled: SpatialData, adapter: pk.Adapter) -> None:
    slide = copy_of(_slide)
    for name in [name for name in slide.shapes if name.endswith("spots_tiles")]:
        del slide.shapes[name]
    table = slide["table"]
    del table.obs["tile_inside"], table.uns["pekasc"]["tiles"]
    with pytest.raises(ValueError, match="`measured_table='table'`: the adapter's"):
        table.X = table.X * 0.5
        pk.tl.predict_expression(slide, adapter, **PULL)
    assert read_uns(slide["table"], "tiles") is None
    table.X = table.X * 2
    pk.tl.predict_expression(slide, adapter, **PULL)
    np.testing.assert_allclose(slide["grid"].layers["peka"], pulled["grid"].layers["peka"], atol=1e-4)


def test_it_is_about_genes(slide: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(slide, target={"obsm": "phantom_states"}, **FROZEN)
    with pytest.raises(ValueError, match="`measured=` does nothing with this adapter, which predicts no genes"):
        pk.tl.predict_expression(slide, adapter, **PULL)


@pytest.fixture(scope="module")
def _wide() -> SpatialData:
    """Return one section on which half of the spots are enough, with a grid."""
    sdata = pk.datasets.phantom(n_patients=1, size_um=1200, mpp=1.0, n_genes=24, random_state=5)
    pk.pp.tile_grid(sdata, "P1S1_he", stride_um=80, **GRID)
    return sdata


def two_regions(wide: SpatialData, names: tuple[str, ...] = ("A", "B")) -> SpatialData:
    """Return the section with its left and right spots as regions A and B, tiled."""
    slide = copy_of(wide)
    table, shapes = slide["table"], slide.shapes["P1S1_spots"]
    order = np.argsort(np.asarray(table.obsm["spatial"])[:, 0], kind="stable")
    halves = dict(zip(("A", "B"), np.array_split(order, 2), strict=True))
    part = table[np.concatenate([halves[name] for name in names])].copy()
    part.obs["region"] = pd.Categorical(np.repeat(list(names), [len(halves[name]) for name in names]))
    part.obs = part.obs.drop(columns=["array_row", "array_col"])
    part.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": list(names)}
    replace_table(slide, "table", part)
    for name in names:
        slide.shapes[name] = shapes.loc[
            table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy()[halves[name]]
        ]
    pk.pp.tile(slide, **TILES, image_mpp=1.0)
    return slide


def change_counts_of_b(slide: SpatialData) -> None:
    table = slide["table"]
    counts = table.X.toarray()
    counts[(table.obs["region"] == "B").to_numpy()] = counts[(table.obs["region"] == "B").to_numpy()][:, ::-1]
    table.X = counts


def test_regions_that_share_an_image_are_pulled_to_their_own_spots(
    _wide: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    made = {}
    for how in ("both", "B differs", "A"):
        slide = two_regions(_wide, ("A",) if how == "A" else ("A", "B"))
        if how == "B differs":
            change_counts_of_b(slide)
        pk.tl.predict_expression(slide, adapter, measured="kriging", **CPU)
        own = (slide["table"].obs["region"] == "A").to_numpy()
        made[how] = np.asarray(slide["table"].layers["peka"])[own]
        facts = said(slide, "table")["sections"]
        assert facts["A"]["n_spots"] == own.sum() and set(facts) == set(slide["table"].obs["region"])
    np.testing.assert_allclose(made["both"], made["A"], atol=1e-4)
    np.testing.assert_allclose(made["B differs"], made["A"], atol=1e-4)
    # where A alone was measured, B of the same table has no pull
    slide = two_regions(_wide)
    table = slide["table"]
    own = (table.obs["region"] == "A").to_numpy()
    measured = table[own].copy()
    measured.obs["region"] = measured.obs["region"].cat.remove_unused_categories()
    measured.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": ["A"]}
    slide.tables["measured"] = measured
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(slide, adapter, measured="kriging", measured_table="measured", **CPU)
    assert "Sections without measured spots, which are not pulled: B." in caplog.text
    assert np.isnan(slide["table"].layers["peka_kriging_sd"][~own]).all()
    np.testing.assert_allclose(slide["table"].layers["peka"][own], made["A"], atol=1e-4)


def test_tiles_of_a_grid_belong_to_the_region_of_the_nearest_spot(_wide: SpatialData, adapter: pk.Adapter) -> None:
    slide = two_regions(_wide)
    pk.tl.predict_expression(slide, adapter, **PULL)
    before = np.asarray(slide["grid"].layers["peka"]).copy()
    facts = said(slide)["sections"]
    assert set(facts) == {"P1S1_he_grid, A", "P1S1_he_grid, B"}
    assert sum(fact["n_tiles"] for fact in facts.values()) == slide["grid"].n_obs
    change_counts_of_b(slide)
    pk.tl.predict_expression(slide, adapter, **PULL)
    moved = (np.asarray(slide["grid"].layers["peka"]) != before).any(axis=1)
    places, table = np.asarray(slide["grid"].obsm["spatial"]), slide["table"]
    far = np.linalg.norm(places[:, None] - np.asarray(table.obsm["spatial"])[None], axis=2)
    nearest = (table.obs["region"] == "B").to_numpy()[far.argmin(axis=1)]
    np.testing.assert_array_equal(moved, nearest)


def test_predictions_of_other_tiles_are_made_again(
    _wide: SpatialData, adapter: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    slide = two_regions(_wide)
    pk.tl.predict_expression(slide, adapter, **PULL)
    expected = np.asarray(slide["grid"].layers["peka"])
    pk.pp.tile(slide, **TILES, image_mpp=1.3, strict=False)
    pk.tl.predict_expression(slide, adapter, **CPU)
    pk.pp.tile(slide, **TILES, image_mpp=1.0, strict=False)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.tl.predict_expression(slide, adapter, **PULL)
    assert "Predictions at the spots" not in caplog.text
    np.testing.assert_allclose(slide["grid"].layers["peka"], expected, atol=1e-4)


def test_the_digest_of_an_adapter_and_of_tiles_tells_what_predictions_depend_on(
    slide: SpatialData, adapter: pk.Adapter
) -> None:
    stain = Stain("reinhard", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    others = [stain, dataclasses.replace(stain, second=(1.0, 1.0, 2.0))]
    digests = {adapter_digest(dataclasses.replace(adapter, stain=one)) for one in (None, *others)}
    assert len(digests) == 3 and adapter_digest(adapter) in digests
    sections, spec = tiled_sections(slide)
    section = sections[0]
    changed = [
        [dataclasses.replace(section, mpp=1.1), *sections[1:]],
        [dataclasses.replace(section, centres_px=section.centres_px + 1), *sections[1:]],
        [dataclasses.replace(section, rows=section.rows[::-1]), *sections[1:]],
        sections[1:],
    ]
    found = {prediction_inputs_digest(one, spec, "float32") for one in (sections, *changed)}
    assert len(found | {prediction_inputs_digest(sections, spec, "float16")}) == 6
    assert prediction_inputs_digest(list(sections), spec, "float32") in found


def test_the_deviation_says_how_far_the_map_is_from_the_truth(slide: SpatialData, adapter: pk.Adapter) -> None:
    # two genes of noise have another mean in this section than in training: they are off by a constant
    table, grid = slide["table"], slide["grid"]
    truth = pk.datasets.phantom_truth(slide, "P2S1_he", coords_um=grid.obsm["spatial"])
    factor = np.where(truth.columns.isin(["NOISE_001", "NOISE_002"]), 4.0, 1.0)
    table.X = table.X.multiply(factor[truth.columns.get_indexer(table.var_names)]).tocsr()
    rates = np.expm1(truth.to_numpy(dtype=np.float64)) * factor
    truth = pd.DataFrame(np.log1p(1e4 * rates / rates.sum(axis=1, keepdims=True)), columns=truth.columns)
    pk.tl.predict_expression(slide, adapter, table_name="grid", key_added="peka", **CPU)
    plain = np.asarray(slide["grid"].layers["peka"])
    pk.tl.predict_expression(slide, adapter, **PULL)
    grid = slide["grid"]
    added = np.asarray(grid.layers["peka"]) - plain
    z = (truth[list(grid.var_names)].to_numpy() - grid.layers["peka"]) / grid.layers["peka_kriging_sd"]
    moved = (added != 0).any(axis=0)
    same = moved & (np.ptp(added, axis=0) < 1e-5)
    # counts of the phantom are overdispersed, which cannot be told from errors of the map
    for genes in (moved & ~same, same, ~moved):
        rms = np.sqrt(np.square(z[:, genes]).mean(axis=0))
        assert 0.3 < np.sqrt(np.mean(rms**2)) < 1.3 and rms.max() < 1.8


def test_spots_without_a_prediction_of_a_gene_are_left_out(
    slide: SpatialData, pulled: SpatialData, adapter: pk.Adapter
) -> None:
    pk.tl.predict_expression(slide, adapter, **CPU)
    table = slide["table"]
    rows = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    one, other = table.var_names.get_indexer(adapter.genes[:2])
    table.layers["peka"][rows[5], one] = np.nan
    table.layers["peka"][rows[: rows.size // 2], other] = np.nan
    said_of = (
        rf"Spots of 'P2S1_spots': 1 spot left out: predictions there are NaN for {adapter.genes[0]}; "
        rf"not pulled: {adapter.genes[1]} \(predictions are NaN at more than 10% of the spots\)"
    )
    with pytest.warns(UserWarning, match=said_of):
        pk.tl.predict_expression(slide, adapter, **PULL)
    grid, facts = slide["grid"], said(slide)["sections"]["P2S1_he_grid"]
    assert np.isfinite(grid.layers["peka"]).all()
    assert (facts["n_spots"], facts["n_measured"]) == (rows.size - 1, len(adapter.genes) - 1)
    there = grid.var_names != adapter.genes[1]
    assert np.isfinite(grid.layers["peka_kriging_sd"][:, there]).all()
    # a spot less is a small change
    assert np.abs(grid.layers["peka"] - pulled["grid"].layers["peka"])[:, there].mean() < 0.1


def test_training_spots_are_counted_among_those_that_pull(slide: SpatialData, adapter: pk.Adapter) -> None:
    pk.pp.tile_grid(slide, "P1S1_he", stride_um=100, table_added="first", **GRID)
    table = slide["table"]
    rows = np.flatnonzero(table.obs["region"] == "P1S1_spots")
    counts = table.X.toarray()
    counts[rows[:6]] = 0
    table.X = counts
    message = rf"trained on {rows.size - 6} of the {rows.size - 6} spots .* residuals are those of unseen tissue\.$"
    with pytest.warns(UserWarning, match=message):
        pk.tl.predict_expression(slide, adapter, **{**PULL, "table_name": "first"})


def test_scores_of_spots_pulled_to_themselves_say_why_there_are_none(slide: SpatialData, adapter: pk.Adapter) -> None:
    pk.tl.predict_expression(slide, adapter, measured="kriging", **CPU)
    with pytest.raises(
        ValueError, match=r"layers\['peka'\] is pulled to what was measured at its spots, or the adapter"
    ):
        pk.tl.evaluate(slide)


def test_another_target_under_the_key_has_other_training_spots(slide: SpatialData, adapter: pk.Adapter) -> None:
    target = pk.tl.fit_adapter(slide, target={"obsm": "phantom_states"}, **FROZEN)
    pk.tl.predict_expression(slide, target, **CPU)
    first = (slide["table"].obs["region"] == "P1S1_spots").to_numpy()
    n, more = int(first.sum()), int((~first).sum())
    message = rf"was trained on {n} of these rows .* this one on {n} with {more} more pulled to what was measured there"
    with pytest.raises(ValueError, match=message):
        pk.tl.predict_expression(slide, adapter, measured="kriging", **CPU)


def test_a_missing_value_as_stored_is_named(slide: SpatialData) -> None:
    table = slide["table"]
    table.layers["scores"] = np.asarray(table.layers["truth"]).astype(np.float32)
    adapter = pk.tl.fit_adapter(slide, target="as_is", layer="scores", genes=list(table.var_names[:6]), **FROZEN)
    table.layers["scores"][-1, 2] = np.nan
    message = (
        r"values on the scale of its training, and those of this table cannot be used\. .*found 1 values that are NaN"
    )
    with pytest.raises(ValueError, match=message):
        pk.tl.predict_expression(slide, adapter, **PULL)
