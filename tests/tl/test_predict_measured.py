"""predict_expression(measured="kriging"): maps between spots are pulled to them, per section, and say how far."""

from __future__ import annotations

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

import pekasc as pk
from pekasc._keys import read_uns
from pekasc.models.kriging import fit_kriging
from pekasc.tl._predict_measured import adapter_digest

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
    return pk.tl.fit_adapter(copied(_slide), **FROZEN)


@pytest.fixture(scope="module")
def calibrated(adapter: pk.Adapter) -> pk.Adapter:
    return pk.tl.calibrate(adapter)


@pytest.fixture(scope="module")
def _pulled(_slide: SpatialData, adapter: pk.Adapter) -> SpatialData:
    sdata = copied(_slide)
    pk.tl.predict_expression(sdata, adapter, table_name="grid", key_added="plain", **CPU)
    plain = sdata["grid"].copy()
    sdata = copied(_slide)
    pk.tl.predict_expression(sdata, adapter, **PULL)
    sdata.tables["plain"] = plain
    return sdata


def copied(sdata: SpatialData) -> SpatialData:
    return SpatialData(
        images=dict(sdata.images), shapes={name: shapes.copy() for name, shapes in sdata.shapes.items()},
        tables={name: table.copy() for name, table in sdata.tables.items()},
    )  # fmt: skip


@pytest.fixture
def slide(_slide: SpatialData) -> SpatialData:
    return copied(_slide)


@pytest.fixture
def pulled(_pulled: SpatialData) -> SpatialData:
    return copied(_pulled)


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
    expected = fit_kriging(np.asarray(table.obsm["spatial"])[own], residuals, np.median(total) / total)
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
    elif how == "no counts":
        table.X = table.X * 0.5
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
        ("", {"measured_table": "spots"}, KeyError, "'spots' not found"),
        ("", {"measured_table": "grid"}, ValueError, "`measured_table='grid'` has no measurements to pull predictions"),
        ("grid alone", {}, ValueError, "`measured_table='grid'` has no measurements .* Name the table of the spots"),
        ("other image", {}, ValueError,
         r"No spots of `measured_table='table'` lie on an image of the tiles of 'grid': they are on 'P1S1_he' "
         r"\(coordinate system 'P1S1'\), the tiles on 'P2S1_he' \(coordinate system 'P2S1'\)\. Make the grid on"),
        ("few", {}, ValueError, "No section of 'grid' has 25 spots with measurements in `measured_table='table'`"),
        ("empty", {}, ValueError, "No section of 'grid' has 25 spots with measurements"),
        ("no counts", {}, ValueError, "`measured_table='table'`: the adapter's predictions are pulled to counts, which "
         "are not there. Raw counts are needed"),
        ("other genes", {}, ValueError, r"`measured_table='table'`: None of the \d+ genes"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Section .* is predicted without a pull")
def test_bad_input_changes_nothing(
    slide: SpatialData, adapter: pk.Adapter, how: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    change(slide, how)
    before = repr(slide), {name: repr(table) for name, table in slide.tables.items()}
    with pytest.raises(error, match=message):
        pk.tl.predict_expression(slide, adapter, **{**PULL, **options})
    assert (repr(slide), {name: repr(table) for name, table in slide.tables.items()}) == before


def test_a_section_with_few_spots_is_said(slide: SpatialData, adapter: pk.Adapter) -> None:
    table = slide["table"]
    second = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    spots_of(slide, np.setdiff1d(np.arange(table.n_obs), second[10:]))
    with pytest.warns(UserWarning) as caught:
        pk.tl.predict_expression(slide, adapter, measured="kriging", **CPU)
    assert any(
        "Section 'P2S1_spots' is predicted without a pull: of its 10 spots in 'table', with measurements and a "
        "prediction, 10 spots are fewer than 25" in str(one.message)
        for one in caught
    )
    assert list(said(slide, "table")["sections"]) == ["P1S1_spots"]


def test_tiles_beyond_the_range_are_counted_or_an_error(slide: SpatialData, adapter: pk.Adapter) -> None:
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
    pk.tl.predict_expression(slide, adapter, **{**PULL, "measured_table": "corner"})
    facts = said(slide)["sections"]["P2S1_he_grid"]
    distance = np.linalg.norm(np.asarray(grid.obsm["spatial"])[:, None] - at[near], axis=2).min(axis=1)
    assert facts["n_beyond"] == (distance > facts["range_um"]).sum()
    assert facts["nearest_um"] == pytest.approx(distance.min(), abs=0.1)
    # a grid of the far tiles alone, with spots whose range is shrunk to reach none of them
    part = grid[far].copy()
    part.uns["spatialdata_attrs"] = grid.uns["spatialdata_attrs"]
    replace_table(slide, "grid", TableModel.parse(part))
    from pekasc.tl import _predict_measured

    fit = _predict_measured.fit_kriging

    def short(*parts: Any) -> Any:
        from dataclasses import replace

        return replace(fit(*parts), range_um=5.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_predict_measured, "fit_kriging", short)
        with pytest.raises(ValueError, match=r"No tile of 'grid' lies within the range of a spot .* range is 5 um"):
            pk.tl.predict_expression(slide, adapter, **{**PULL, "measured_table": "corner"})


def test_an_image_of_two_pixel_sizes_is_an_error(slide: SpatialData, adapter: pk.Adapter) -> None:
    tiles = dict(slide["grid"].uns["pekasc"]["tiles"])
    section = tiles["sections"]["P2S1_he_grid"]
    changed = {**section, "mpp": 1.1, "source": "image_mpp", "um_to_px": np.asarray(section["um_to_px"]) / 1.1}
    slide["grid"].uns["pekasc"]["tiles"] = {**tiles, "sections": {"P2S1_he_grid": changed}}
    with pytest.raises(ValueError, match=r"'P2S1_he' has 1.1 um per pixel for the tiles of 'grid' and 1 for those of"):
        pk.tl.predict_expression(slide, adapter, **PULL)


def test_spots_without_tiles_are_tiled(_slide: SpatialData, pulled: SpatialData, adapter: pk.Adapter) -> None:
    slide = copied(_slide)
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
