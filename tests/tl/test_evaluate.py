"""tl.evaluate against scipy on raw arrays, and Moran's I in closed form."""

from __future__ import annotations

import logging
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData

import pekasc as pk
from pekasc._ceiling import noise_ceiling
from pekasc._keys import read_uns, write_uns


def morans_i(values: np.ndarray, positions: np.ndarray, k: int = 6) -> float:
    """Return N / W * sum_ij w_ij z_i z_j / sum_i z_i**2 with binary weights to the k nearest others."""
    z = values - values.mean()
    neighbours = cKDTree(positions).query(positions, k + 1)[1][:, 1:]
    return float(len(z) / neighbours.size * (z[:, None] * z[neighbours]).sum() / (z * z).sum())


@pytest.fixture
def adata() -> AnnData:
    """Return three sections in two patients: counts, and predictions of all genes but the last."""
    rng = np.random.default_rng(0)
    n = 150
    counts = rng.poisson(rng.gamma(2, 2, (n, 9)) + 1).astype(np.float32)
    adata = AnnData(counts)
    adata.var_names = [f"g{i}" for i in range(9)]
    adata.obs["section"] = np.repeat(["a", "b", "c"], 50)
    adata.obs["patient"] = np.repeat(["p", "p", "q"], 50)
    adata.obsm["spatial"] = rng.uniform(0, 1000, (n, 2))
    # the first two genes vary smoothly in space
    smooth = adata.obsm["spatial"] / 1000
    adata.layers["mine"] = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    adata.layers["mine"][:, :2] = 3 * smooth + 0.1 * rng.normal(size=(n, 2))
    guess = adata.layers["mine"] + rng.normal(0, 0.5, (n, 9))
    guess[:, 8] = np.nan
    adata.layers["peka"] = guess.astype(np.float32)
    return adata


def test_scores_are_scipys(adata: AnnData) -> None:
    scores = pk.tl.evaluate(adata)
    counts = adata.X.astype(np.float64)
    truth = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    assert sorted(set(scores["group"])) == ["a", "b", "c"] and len(scores) == 3 * 8
    for row in scores.itertuples():
        j, at = adata.var_names.get_loc(row.gene), (adata.obs["section"] == row.group).to_numpy()
        x, y = adata.layers["peka"][at, j].astype(np.float64), truth[at, j]
        assert row.n_spots == 50
        assert row.pearson == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-5)
        assert row.spearman == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-3)  # ties in float32
        assert row.rmse == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-5)
        assert row.variance_explained == pytest.approx(1 - np.mean((x - y) ** 2) / np.var(y), abs=1e-4)
    for metric in ("pearson", "spearman", "rmse"):
        expected = scores.groupby("gene")[metric].mean()
        column = adata.var[f"peka_{metric}"]
        np.testing.assert_allclose(column[:8], expected[adata.var_names[:8]])
        assert np.isnan(column.iloc[8])


def test_ceilings_are_of_the_counts_of_each_group(adata: AnnData) -> None:
    scores = pk.tl.evaluate(adata).set_index(["gene", "group"])
    total = adata.X.sum(axis=1, dtype=np.float64)
    for group in "abc":
        at = (adata.obs["section"] == group).to_numpy()
        expected = noise_ceiling(adata.X[at], total[at])[:8]
        np.testing.assert_allclose(scores["ceiling"].xs(group, level="group"), expected)
        assert 0.4 < expected.max() < 1
    # nothing can be reached where counting noise leaves nothing
    ceiling = scores["ceiling"].where(scores["ceiling"] > 0)
    np.testing.assert_allclose(scores["reached"], scores["pearson"] / ceiling)
    assert scores["reached"].isna().any()
    mean = scores.groupby("gene")[["pearson", "ceiling"]].mean()
    np.testing.assert_allclose(adata.var["peka_ceiling"][:8], mean["ceiling"])
    np.testing.assert_allclose(adata.var["peka_reached"][:8], mean["pearson"] / mean["ceiling"])
    assert adata.var[["peka_ceiling", "peka_reached"]].iloc[8].isna().all()
    # a gene that one group did not measure has a ceiling on the others
    adata.varm["measured"] = pd.DataFrame(True, index=adata.var_names, columns=["a", "b", "c"])
    adata.varm["measured"].loc["g2", "a"] = False
    fewer = pk.tl.evaluate(adata).set_index(["gene", "group"])
    changed = fewer["ceiling"] != scores["ceiling"]
    assert list(fewer.index[changed]) == [("g2", "a")] and np.isnan(fewer.loc[("g2", "a"), "ceiling"])
    assert adata.var.loc["g2", "peka_ceiling"] == pytest.approx(scores["ceiling"]["g2"][["b", "c"]].mean())


def test_what_is_no_log_of_counts_has_no_ceiling(adata: AnnData) -> None:
    scores = pk.tl.evaluate(adata, truth="mine")
    assert scores[["ceiling", "reached"]].isna().all(axis=None) and scores["pearson"].notna().all()
    assert adata.var[["peka_ceiling", "peka_reached"]].isna().all(axis=None)


def test_morans_i_is_the_closed_form_within_sections(adata: AnnData) -> None:
    scores = pk.tl.evaluate(adata, truth="mine")
    for row in scores.itertuples():
        j, at = adata.var_names.get_loc(row.gene), (adata.obs["section"] == row.group).to_numpy()
        where = adata.obsm["spatial"][at]
        assert row.morans_i_measured == pytest.approx(morans_i(adata.layers["mine"][at, j], where), abs=1e-5)
        assert row.morans_i_predicted == pytest.approx(morans_i(adata.layers["peka"][at, j], where), abs=1e-5)
    smooth = scores[scores["gene"].isin(["g0", "g1"])]
    assert (smooth["morans_i_measured"] > 0.5).all()
    np.testing.assert_allclose(smooth["morans_i_ratio"], smooth["morans_i_predicted"] / smooth["morans_i_measured"])
    # no ratio to what is not there
    assert scores.loc[scores["morans_i_measured"] < 0, "morans_i_ratio"].isna().all()
    # a group of two sections: the mean of theirs, not one graph over both
    both = pk.tl.evaluate(adata, truth="mine", groups="patient").set_index(["gene", "group"])
    single = scores.set_index(["gene", "group"])["morans_i_measured"]
    mean = (single["g0", "a"] + single["g0", "b"]) / 2
    assert both.loc[("g0", "p"), "morans_i_measured"] == pytest.approx(mean, abs=1e-6)


def test_groups(adata: AnnData) -> None:
    scores = pk.tl.evaluate(adata, truth="mine", groups="patient").set_index(["gene", "group"])
    assert scores.loc[("g0", "p"), "n_spots"] == 100 and scores.loc[("g0", "q"), "n_spots"] == 50
    x, y = adata.layers["peka"][:100, 3], adata.layers["mine"][:100, 3]
    assert scores.loc[("g3", "p"), "pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    with pytest.raises(KeyError, match="`groups='donor'` not found"):
        pk.tl.evaluate(adata, groups="donor")


def test_training_spots_are_left_out(adata: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    adata.obs["peka_total"] = adata.X.sum(axis=1)
    adata.obs["peka_train"] = (adata.obs["section"] == "a").to_numpy()
    adata.obs.loc[adata.obs_names[50:60], "peka_train"] = True
    with caplog.at_level(logging.INFO, logger="pekasc"):
        scores = pk.tl.evaluate(adata)
    assert "60 of 150 spots left out: the adapter was trained on them, or within half a tile." in caplog.text
    assert scores.groupby("group")["n_spots"].first().to_dict() == {"b": 40, "c": 50}
    whole = pk.tl.evaluate(adata, include_train=True)
    assert sorted(set(whole["group"])) == ["a", "b", "c"]
    adata.obs["peka_train"] = True
    with pytest.raises(ValueError, match=r"trained on every spot .*`fit_adapter\(train=...\)`.*include_train=True"):
        pk.tl.evaluate(adata)


def test_training_spots_of_a_fit_are_left_out(predicted: SpatialData) -> None:
    scores = pk.tl.evaluate(predicted)
    n = int((predicted["table"].obs["region"] == "P2S1_spots").sum())
    assert set(scores["group"]) == {"P2S1_spots"} and set(scores["n_spots"]) == {n}
    assert list(predicted["table"].var.filter(like="peka_")) == [
        "peka_pearson", "peka_ceiling", "peka_reached", "peka_spearman", "peka_rmse", "peka_morans_i_ratio",
    ]  # fmt: skip


def test_constant_genes_are_nan_and_said(adata: AnnData) -> None:
    adata.X[:50, 4] = 0
    adata.layers["peka"][:, 5] = 1.25
    with pytest.warns(UserWarning, match=r"2 genes are constant in a group.*'g4', 'g5'"):
        scores = pk.tl.evaluate(adata).set_index(["gene", "group"])
    for at in (("g4", "a"), ("g5", "a"), ("g5", "b")):
        assert np.isnan(scores.loc[at, "pearson"]) and np.isnan(scores.loc[at, "spearman"])
        assert np.isfinite(scores.loc[at, "rmse"])
    assert np.isfinite(scores.loc[("g4", "b"), "pearson"])
    # the mean is over groups where it is known
    known = scores["pearson"]["g4"].dropna()
    assert len(known) == 2 and adata.var.loc["g4", "peka_pearson"] == pytest.approx(known.mean())


def test_small_groups_are_left_out_with_a_warning(adata: AnnData) -> None:
    adata.obs["patient"] = ["r"] * 2 + ["p"] * 148
    with pytest.warns(UserWarning, match="Group 'r' has 2 spots"):
        scores = pk.tl.evaluate(adata, groups="patient")
    assert set(scores["group"]) == {"p"}


def test_refused(adata: AnnData) -> None:
    before = list(adata.var)
    with pytest.raises(KeyError, match=r"Layer 'other' not found\. Available layers: .*peka.*predict_expression"):
        pk.tl.evaluate(adata, layer="other")
    with pytest.raises(KeyError, match=r"Layer 'raw' not found\. Available layers: \[[^]]*\]\.\W?$"):
        pk.tl.evaluate(adata, truth="raw")
    mixed = adata.copy()
    mixed.layers["peka"][:50, 0] = np.nan
    with pytest.raises(ValueError, match="1 genes of layer 'peka' are predicted in some spots only"):
        pk.tl.evaluate(mixed)
    mixed.layers["peka"][:] = np.nan
    with pytest.raises(ValueError, match="holds no predictions"):
        pk.tl.evaluate(mixed)
    adata.X = adata.layers["mine"]
    with pytest.raises(ValueError, match="Raw counts are needed"):
        pk.tl.evaluate(adata)
    assert list(adata.var) == before


def test_spots_without_counts_were_not_measured(predicted: SpatialData) -> None:
    table = predicted["table"]
    before = pk.tl.evaluate(predicted)
    row = int(np.flatnonzero(table.obs["region"] == "P2S1_spots")[4])
    counts = table.X.toarray()
    counts[row] = 0
    table.X = counts
    after = pk.tl.evaluate(predicted)
    assert (after["n_spots"] == before["n_spots"] - 1).all()
    assert abs(after["rmse"].mean() - before["rmse"].mean()) < 0.05


def test_messages_name_the_arguments_of_this_call(predicted: SpatialData) -> None:
    table = predicted["table"]
    table.layers["log"] = np.log1p(table.X.toarray())
    with pytest.raises(
        ValueError, match=r"\(`counts_layer=`\), or a layer on the scale of the predictions \(`truth=`\)"
    ):
        pk.tl.evaluate(predicted, counts_layer="log")
    table.layers["log"][-1] = np.nan
    with pytest.raises(ValueError, match=r"'log' \(`truth=`\) has NaN in \d+ of the genes"):
        pk.tl.evaluate(predicted, truth="log")


def test_sections_without_a_position_are_named(predicted: SpatialData) -> None:
    table = predicted["table"]
    table.layers["mine"] = np.ones(table.shape, dtype=np.float32)
    record = dict(read_uns(table, "tiles"))  # type: ignore[call-overload]
    record["sections"] = {k: v for k, v in record["sections"].items() if k == "P1S1_spots"}
    write_uns(table, "tiles", record)
    with pytest.raises(ValueError, match=r"spots of \['P2S1_spots'\] have values in layers\['mine'\] but no position"):
        pk.tl.evaluate(predicted, layer="mine")


def test_genes_that_leave_do_not_change_scores(predicted: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    before = pk.tl.evaluate(predicted).set_index("gene")
    table = predicted["table"]
    np.testing.assert_array_equal(table.obs["peka_total"], table.X.sum(axis=1, dtype=np.float64).A1)
    names = table.var_names[~np.isnan(table.layers["peka"]).all(axis=0)][:5]
    few = table[:, names].copy()
    del predicted.tables["table"]
    predicted.tables["table"] = few
    with caplog.at_level(logging.INFO, logger="pekasc"):
        after = pk.tl.evaluate(predicted).set_index("gene")
    assert "Totals are those of the genes there were at prediction" in caplog.text
    np.testing.assert_array_equal(after["rmse"], before.loc[after.index, "rmse"])


def test_predictions_as_stored_are_compared_with_what_was_stored(tiled: SpatialData) -> None:
    table = tiled["table"]
    table.layers["log"] = np.log1p(table.X.toarray())
    readout = pk.Readout.preset("ridge").replace(n_depths=None, depth=2)
    adapter = pk.tl.fit_adapter(
        tiled, method=None, layer="log", target="as_is", train=["P1S1_spots"], readout=readout, progress=False
    )
    pk.tl.predict_expression(tiled, adapter, progress=False)
    right = pk.tl.evaluate(tiled, truth="log")
    stored = pk.tl.evaluate(tiled)
    np.testing.assert_array_equal(stored["rmse"], right["rmse"])
    assert stored[["ceiling", "reached"]].isna().all(axis=None)
    with pytest.raises(ValueError, match=r'as stored \(`target="as_is"`\), not of counts .* `truth='):
        pk.tl.evaluate(tiled, counts_layer="log")
    assert "log1p" not in pk.get.expression(tiled).uns
    gene = right["gene"].iloc[0]
    figure = pk.pl.expression(tiled, gene)
    assert figure.axes[-1].get_ylabel() == "expression"  # not counts per 10,000
    titles = [ax.get_title() for ax in figure.axes]
    plt.close(figure)
    figure = pk.pl.expression(tiled, gene, truth="log")
    assert titles == [ax.get_title() for ax in figure.axes]
    plt.close(figure)
    # a table of predictions alone holds no measured values, and its `X` is no truth
    pk.tl.predict_expression(tiled, adapter, table_added="predicted", progress=False)
    assert "log1p" not in tiled["predicted"].uns
    with pytest.raises(ValueError, match="the layer of those values is not recorded: name .* `truth=`"):
        pk.tl.evaluate(tiled, table_name="predicted")
    del table.layers["log"]
    with pytest.raises(ValueError, match="the layer of those values 'log', is not in this table"):
        pk.tl.evaluate(tiled)


def test_the_only_table_with_tiles_is_taken(predicted: SpatialData) -> None:
    sdata = predicted
    expected = pk.tl.evaluate(sdata)
    sdata.tables["bins"] = sdata.tables.pop("table")
    sdata.tables["cells"] = AnnData(np.ones((3, 2), dtype=np.float32))
    pd.testing.assert_frame_equal(pk.tl.evaluate(sdata), expected)
    gene = str(expected["gene"].iloc[0])
    assert pk.pl.expression(sdata, gene) is not None and pk.pl.tiles(sdata, n=2) is not None
    how: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
    assert pk.tl.fit_adapter(sdata, method=None, readout={"depth": 2, "fields_um": None}, **how).genes
