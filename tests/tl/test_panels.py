"""Genes that only some sections measured, from the table to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData, read_zarr
from tests.tl.conftest import copy_of

import pekasc as pk
from pekasc._panels import Panels
from pekasc.tl import _fit_adapter

REGIONS = ["P1S1_spots", "P2S1_spots", "P3S1_spots"]
FROZEN: dict[str, Any] = {"method": None, "compute": {"device": "cpu"}, "progress": False}
SHALLOW: dict[str, Any] = {**FROZEN, "readout": pk.Readout(head="low-rank", depth=2, context_um=None, smooth_um=None)}


@pytest.fixture(scope="session")
def _three() -> SpatialData:
    sdata = pk.datasets.phantom(n_patients=3, size_um=600, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    return sdata


@pytest.fixture
def three(_three: SpatialData) -> SpatialData:
    """Return three patients with a section each, tiled."""
    return copy_of(_three)


def _panels(sdata: SpatialData) -> dict[str, list[str]]:
    """Return all genes of the first patient, some of the second, others of the third."""
    genes = list(sdata["table"].var_names)
    return {REGIONS[0]: genes, REGIONS[1]: genes[:20], REGIONS[2]: [*genes[:16], *genes[20:22]]}


def _measured(sdata: SpatialData) -> pd.DataFrame:
    table = sdata["table"]
    return pd.DataFrame({r: table.var_names.isin(own) for r, own in _panels(sdata).items()}, index=table.var_names)


@pytest.fixture(scope="session")
def mixed(_three: SpatialData) -> pk.Adapter:
    """Return an adapter of all genes."""
    sdata = copy_of(_three)
    return pk.tl.fit_adapter(sdata, panels=_panels(sdata), genes=list(sdata["table"].var_names), **SHALLOW)


def test_each_gene_is_learned_and_scored_where_it_was_measured(three: SpatialData, mixed: pk.Adapter) -> None:
    scores = mixed.gene_scores
    assert scores["n_groups"].tolist() == [3] * 16 + [2] * 6 + [1] * 2
    # one section alone has the last two: no other can score what is learned from it
    assert scores["n_sections"].iloc[16:].tolist() == [2] * 6 + [0] * 2
    assert scores["pearson"].iloc[22:].isna().all() and scores["pearson"].iloc[:22].notna().any()
    assert mixed.info["total_genes"] == list(three["table"].var_names[:16])
    assert "8 of them learned from 1 to 2 of the groups only" in str(mixed)


def test_what_the_table_holds_of_other_genes_is_not_read(three: SpatialData, mixed: pk.Adapter) -> None:
    table = three["table"]
    measured = _measured(three)
    regions = table.obs["region"].astype(str).to_numpy()
    counts = np.asarray(table.X.toarray() if hasattr(table.X, "toarray") else table.X)
    counts[~measured.T.loc[regions].to_numpy()] = 77
    table.X = counts
    table.varm["measured"] = measured  # says what `panels=` said
    again = pk.tl.fit_adapter(three, genes=list(table.var_names), **SHALLOW)
    # sparse and dense counts differ in rounding
    pd.testing.assert_frame_equal(again.gene_scores, mixed.gene_scores, rtol=1e-3, atol=1e-4)
    tiles = pk.get.tiles(three)[:5].to_numpy()
    np.testing.assert_allclose(again.predict(tiles, mpp=4.0), mixed.predict(tiles, mpp=4.0), rtol=1e-5)


def test_genes_by_default_are_those_of_the_groups_that_measured_them(three: SpatialData) -> None:
    table = three["table"]
    table.varm["measured"] = _measured(three)
    counts = table.X.toarray() if hasattr(table.X, "toarray") else np.array(table.X)
    regions = table.obs["region"].astype(str).to_numpy()
    counts[:, [0, 17, 23]] = 0
    counts[regions == REGIONS[0], 0] = 5  # shared, detected in one group only
    counts[regions != REGIONS[2], 17] = 5  # detected in both groups that measured it
    counts[regions == REGIONS[0], 23] = 5
    table.X = counts
    adapter = pk.tl.fit_adapter(three, **SHALLOW)
    names = list(table.var_names)
    assert names[0] not in adapter.genes and {names[17], names[23]} <= set(adapter.genes)


def test_totals_are_over_what_all_training_sections_share(
    three: SpatialData, mixed: pk.Adapter, tmp_path: Path
) -> None:
    mixed.save(tmp_path / "adapter")
    adapter = pk.Adapter.load(tmp_path / "adapter")
    pd.testing.assert_frame_equal(adapter.gene_scores, mixed.gene_scores)
    pk.tl.predict_expression(three, adapter, progress=False, compute={"device": "cpu"})
    table = three["table"]
    counts = table.X.toarray() if hasattr(table.X, "toarray") else np.array(table.X)
    total = counts[:, :16].sum(axis=1, dtype=float)
    np.testing.assert_allclose(table.obs["peka_total"], total)
    table.varm["measured"] = _measured(three)
    three.write(tmp_path / "store.zarr")
    three = read_zarr(tmp_path / "store.zarr")
    scores = pk.tl.evaluate(three, include_train=True).set_index(["gene", "group"])
    expected = np.log1p(1e4 * counts / total[:, None])
    regions = table.obs["region"].astype(str).to_numpy()
    names = list(table.var_names)
    for gene, region in ((3, REGIONS[1]), (17, REGIONS[1]), (23, REGIONS[0])):
        rows = regions == region
        rmse = np.sqrt(np.square(table.layers["peka"][rows, gene] - expected[rows, gene]).mean())
        assert scores.loc[(names[gene], region), "rmse"] == pytest.approx(rmse, rel=1e-5)
        assert scores.loc[(names[gene], region), "n_spots"] == rows.sum()
    for gene, region in ((17, REGIONS[2]), (20, REGIONS[1]), (23, REGIONS[2])):
        row = scores.loc[(names[gene], region)]
        assert row["n_spots"] == 0 and row.drop("n_spots").isna().all()
    # the mean over groups is over those that measured the gene
    assert three["table"].var["peka_pearson"].iloc[23] == scores.loc[(names[23], REGIONS[0]), "pearson"]
    # genes that leave take nothing from the totals
    few = three["table"][:, [3, 17, 23]].copy()
    again = pk.tl.evaluate(few, include_train=True).set_index(["gene", "group"])
    assert again.loc[(names[17], REGIONS[1]), "rmse"] == pytest.approx(scores.loc[(names[17], REGIONS[1]), "rmse"])


def test_a_group_of_several_sections_is_scored_on_those_that_measured_a_gene(
    three: SpatialData, mixed: pk.Adapter
) -> None:
    pk.tl.predict_expression(three, mixed, progress=False, compute={"device": "cpu"})
    table = three["table"]
    table.obs["all"] = "one"
    table.varm["measured"] = _measured(three)
    both = pk.tl.evaluate(three, include_train=True, groups="all").set_index("gene")
    regions = table.obs["region"].astype(str).to_numpy()
    assert list(both.index) == list(table.var_names)
    assert both["n_spots"].iloc[[0, 17, 20, 23]].tolist() == [
        len(regions), (regions != REGIONS[2]).sum(), (regions != REGIONS[1]).sum(), (regions == REGIONS[0]).sum(),
    ]  # fmt: skip
    # a layer to compare with may lack what was not measured
    table.layers["other"] = np.array(table.layers["peka"])
    table.layers["other"][regions == REGIONS[1], 23] = np.nan
    with_truth = pk.tl.evaluate(three, include_train=True, groups="all", truth="other")
    assert (with_truth["rmse"] == 0).all()
    table.layers["other"][regions == REGIONS[0], 23] = np.nan
    with pytest.raises(ValueError, match="has NaN in 1 of the genes"):
        pk.tl.evaluate(three, include_train=True, truth="other")


def test_the_teacher_sees_the_genes_that_all_measured(three: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def made(*args: Any, **kwargs: Any) -> Any:
        given.update(kwargs)
        raise RuntimeError("enough")

    monkeypatch.setattr(_fit_adapter, "make_teacher", made)
    with pytest.raises(RuntimeError, match="enough"):
        pk.tl.fit_adapter(three, panels=_panels(three), compute={"device": "cpu"}, progress=False)
    shared = list(three["table"].var_names[:16])
    assert list(given["genes"]) == shared and given["expression"].shape[1] == 16
    assert given["expressed"].max() < 16


def test_an_adapter_is_trained_with_mixed_panels(three: SpatialData) -> None:
    recipe = {"rank": 8, "n_clusters": 4, "teacher_components": 5, "epochs": 1, "cluster_head_epochs": 2}
    adapter = pk.tl.fit_adapter(
        three, panels=_panels(three), recipe=recipe, readout={"depth": 2}, compute={"device": "cpu"}, progress=False
    )
    assert adapter.info["head"] == "blend"
    assert adapter.gene_scores["n_groups"].isin([1, 2, 3]).all() and (adapter.gene_scores["n_groups"] < 3).any()
    assert adapter.history["val_error"].notna().any()
    found = adapter.predict(pk.get.tiles(three)[:3].to_numpy(), mpp=4.0)
    assert np.isfinite(found).all()


def test_panels_that_do_not_fit(three: SpatialData) -> None:
    panels = _panels(three)
    genes = list(three["table"].var_names)

    def fit(**kwargs: Any) -> None:
        pk.tl.fit_adapter(three, **{**SHALLOW, **kwargs})

    with pytest.raises(KeyError, match=r"no panel for the region \['P3S1_spots'\]"):
        fit(panels={r: panels[r] for r in REGIONS[:2]})
    with pytest.raises(KeyError, match=r"region 'P3S1_spot', which is not in the table.*Did you mean 'P3S1_spots'"):
        fit(panels={REGIONS[0]: genes, REGIONS[1]: genes, "P3S1_spot": genes})
    with pytest.raises(KeyError, match=rf"panels\['P1S1_spots'\].*not in the table.*Did you mean {genes[0]}"):
        fit(panels={**panels, REGIONS[0]: [genes[0] + "x", *genes[1:]]})
    with pytest.raises(ValueError, match=r"No gene was measured by all training sections .*P1S1_spots 2, P2S1_spots 3"):
        fit(panels={REGIONS[0]: genes[:2], REGIONS[1]: genes[2:5], REGIONS[2]: genes})
    with pytest.raises(ValueError, match=rf"1 of the 2 genes asked for are in the panel of no .*\['{genes[23]}'\]"):
        fit(panels={**panels, REGIONS[0]: genes[:23]}, genes=[genes[0], genes[23]])
    with pytest.raises(ValueError, match="None of the 1 genes was measured in two training groups"):
        fit(panels=panels, genes=[genes[23]])
    with pytest.raises(TypeError, match="mapping from regions to genes, got list"):
        fit(panels=[genes])
    # only what is trained on needs a panel
    fit(panels={r: panels[r] for r in REGIONS[:2]}, train=REGIONS[:2])


def test_varm_that_does_not_fit(three: SpatialData, mixed: pk.Adapter) -> None:
    table = three["table"]
    frame = _measured(three)
    pk.tl.predict_expression(three, mixed, progress=False, compute={"device": "cpu"})
    for wrong, error, words in (
        (frame.astype(float), TypeError, "must be boolean, its column 'P1S1_spots' has dtype float64"),
        (frame.astype("boolean").mask(~frame), TypeError, "with missing values"),
        (frame.to_numpy(), TypeError, "must be a DataFrame of genes x regions"),
        (frame[REGIONS[:2]], KeyError, r"no column for the region \['P3S1_spots'\]"),
    ):
        table.varm["measured"] = wrong
        for call in (lambda: pk.tl.fit_adapter(three, **SHALLOW), lambda: pk.tl.evaluate(three, include_train=True)):
            with pytest.raises(error, match=words):
                call()
    table.varm["measured"] = frame
    with pytest.raises(ValueError, match=r"Sections measured different genes .*fit_adapter` learns each gene"):
        pk.tl.cross_validate(three, methods=["mean"], progress=False)
    # all measured all
    table.varm["measured"] = frame | True
    assert len(pk.tl.cross_validate(three, methods=["mean"], progress=False))


def test_masks_name_panels_as_names_do(three: SpatialData) -> None:
    table, panels = three["table"], _panels(three)
    frame = _measured(three)
    table.var["third"] = frame[REGIONS[2]]
    masks = {REGIONS[0]: panels[REGIONS[0]], REGIONS[1]: frame[REGIONS[1]].to_numpy(), REGIONS[2]: "third"}
    rows = np.arange(table.n_obs)
    names, columns = table.var_names.to_numpy(dtype=object), np.arange(table.n_vars)
    by_name, by_mask = (pk.tl._panels.training_panels(table, rows, p, names, columns) for p in (panels, masks))
    assert isinstance(by_name, Panels) and isinstance(by_mask, Panels)
    np.testing.assert_array_equal(by_name.of(rows), by_mask.of(rows))
    np.testing.assert_array_equal(by_name.of(rows[:1])[0], frame[table.obs["region"].iloc[0]])
