"""Results in the formats of other tools, and what those draw; what `get.tiles` reads is in tests/pp/test_tile.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from matplotlib import pyplot as plt
from scipy import sparse
from spatialdata import SpatialData

import pekasc as pk

Scene = Callable[..., SpatialData]


@pytest.fixture
def sdata(scene: Scene) -> SpatialData:
    """Return two sections with predictions of some genes, for all spots but one."""
    sdata = sd.concatenate([scene(name="A"), scene(name="B")], concatenate_tables=True)
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    table = sdata["table"]
    predicted = np.random.default_rng(0).normal(1, 0.3, table.shape).astype(np.float32)
    predicted[:, 4:] = np.nan
    predicted[0] = np.nan
    table.layers["peka"] = predicted
    return sdata


@pytest.fixture
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


# expression


def test_genes_and_rows_with_values(sdata: SpatialData) -> None:
    table = sdata["table"]
    adata = pk.get.expression(sdata)
    assert adata.shape == (table.n_obs - 1, 4)
    np.testing.assert_array_equal(adata.X, table.layers["peka"][1:, :4])
    assert list(adata.obs["section"].cat.categories) == ["A_spots", "B_spots"]
    assert adata.uns["log1p"] == {"base": None}
    assert "log1p" not in pk.get.expression(sdata, layer=None).uns
    with pytest.raises(KeyError, match="Layer 'nope' not found. Available layers: \\['peka'\\]"):
        pk.get.expression(sdata, layer="nope")
    table.layers["empty"] = np.full(table.shape, np.nan)
    with pytest.raises(ValueError, match="'empty' holds no values"):
        pk.get.expression(sdata, layer="empty")


def test_a_users_own_columns_stay(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["section"] = ["cortex" if i % 2 else "medulla" for i in range(table.n_obs)]
    table.obs["mine"] = np.arange(table.n_obs)
    before = table.obs.copy()
    adata = pk.get.expression(sdata, layer=None)
    pd.testing.assert_frame_equal(table.obs, before)
    pd.testing.assert_frame_equal(adata.obs[before.columns], before)
    assert list(adata.obs["peka_section"].cat.categories) == ["A_spots", "B_spots"]


def test_of_a_column_with_one_name_a_region_the_names_are_taken(sdata: SpatialData) -> None:
    table = sdata["table"]
    table.obs["section"] = table.obs["region"].map({"A_spots": "first", "B_spots": "second"}).astype(str)
    adata = pk.get.expression(sdata)
    assert list(adata.obs["section"].cat.categories) == ["first", "second"]
    assert "peka_section" not in adata.obs


@pytest.mark.parametrize("stored", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_a_backed_table_is_read(sdata: SpatialData, tmp_path: Path, stored: Callable) -> None:
    table = sdata["table"].copy()
    table.X = stored(table.X)
    table.layers["counts"] = table.X.copy()
    table.obsm["spatial"] = np.zeros((table.n_obs, 2))
    table.write_h5ad(tmp_path / "table.h5ad")
    backed = ad.read_h5ad(tmp_path / "table.h5ad", backed="r")
    for layer in (None, "counts", "peka"):
        np.testing.assert_array_equal(pk.get.expression(backed, layer=layer).X, pk.get.expression(table, layer=layer).X)
    pk.tl.embed_expression(backed, n_components=2)
    pk.tl.embed_expression(table, n_components=2)
    np.testing.assert_array_equal(backed.obsm["X_pca"], table.obsm["X_pca"])
    pd.testing.assert_frame_equal(pk.tl.evaluate(backed), pk.tl.evaluate(table))
    backed.file.close()


def test_a_backed_table_of_an_object_is_read(scene: Scene, tmp_path: Path) -> None:
    sdata = scene()
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    sdata["table"].X = sparse.csr_matrix(sdata["table"].X)
    sdata["table"].write_h5ad(tmp_path / "table.h5ad")
    expected = pk.get.expression(sdata, layer=None)
    del sdata.tables["table"]
    sdata.tables["table"] = ad.read_h5ad(tmp_path / "table.h5ad", backed="r")
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    np.testing.assert_array_equal(pk.get.expression(sdata, layer=None).X, expected.X)
    sdata["table"].file.close()


def test_a_lazy_table_is_refused_with_the_call_that_reads_it(sdata: SpatialData, tmp_path: Path) -> None:
    pytest.importorskip("xarray")
    sdata["table"].write_zarr(tmp_path / "table.zarr")
    lazy = ad.experimental.read_lazy(tmp_path / "table.zarr")
    for call in (pk.get.expression, pk.tl.embed_expression, pk.tl.evaluate):
        with pytest.raises(TypeError, match="to_memory"):
            call(lazy)


# what others draw


@pytest.mark.usefixtures("_closed")
def test_squidpy_and_scanpy_draw_it(sdata: SpatialData) -> None:
    import scanpy as sc
    import squidpy as sq

    adata = pk.get.expression(sdata)
    gene = adata.var_names[0]
    one = adata[adata.obs["section"] == "A_spots"].copy()
    sq.pl.spatial_scatter(one, color=gene, shape=None)
    dots = plt.gcf().axes[0].collections[0]
    np.testing.assert_allclose(dots.get_array(), one.X[:, 0], rtol=1e-6)
    np.testing.assert_allclose(dots.get_offsets(), one.obsm["spatial"], rtol=1e-6)
    assert plt.gcf().axes[0].yaxis_inverted()  # y downwards, as in the image
    sq.pl.spatial_scatter(adata, color=gene, shape=None, library_key="section")
    assert [len(axes.collections[0].get_offsets()) for axes in plt.gcf().axes[:2]] == [11, 12]
    axes = sc.pl.embedding(one, basis="spatial", color=gene, show=False)
    assert len(axes.collections[0].get_offsets()) == one.n_obs


@pytest.mark.usefixtures("_closed")
def test_spatialdata_plot_draws_it_as_a_table_of_the_object(sdata: SpatialData) -> None:
    pytest.importorskip("spatialdata_plot", reason="not installed: it comes with squidpy from 1.8 on")
    adata = pk.get.expression(sdata)
    sdata.tables["predicted"] = adata
    image = sdata.pl.render_images("A_he")
    image.pl.render_shapes("A_spots", color=adata.var_names[0], table_name="predicted").pl.show(coordinate_systems="A")
    assert plt.gcf().axes[0].collections
    only = adata[adata.obs["section"] == "B_spots"].copy()
    del sdata.tables["predicted"]
    assert pk.get.expression(only, layer=None).uns["spatialdata_attrs"]["region"] == "B_spots"


# comparison


@pytest.fixture
def frame() -> pd.DataFrame:
    """Return a comparison of three methods, as `tl.cross_validate` returns it."""
    generator = np.random.default_rng(0)
    rows = [
        {
            "encoder": "tiny", "context_um": context, "genes": genes, "method": method, "readout": readout,
            "fold": fold, "section": section, "seed": 0, "whole_groups": True, "head": "ridge", "teacher": "",
            "pearson": 0.0 if method == "mean" else generator.uniform(0.1, 0.5),
        }
        for context, readout in (("", "Readout(context_um=None)"), ("200", "Readout(context_um=200.0)"))
        for genes in ("svg", "hvg")
        for method in ("mean", "frozen", "frozen-best")
        for fold in ("P1", "P2")
        for section in (f"{fold}S1_spots", "pooled")
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return its rows without context, of one gene set."""
    return frame[(frame["context_um"] == "") & (frame["genes"] == "svg")].reset_index(drop=True)


def test_comparison_sums_up(plain: pd.DataFrame) -> None:
    table = pk.get.comparison(plain)
    assert table.index.names == ["encoder", "context_um", "genes", "method"]
    sections = plain[plain["section"] != "pooled"]
    row = table.loc[("tiny", "", "svg", "frozen")]
    own = sections[sections["method"] == "frozen"].set_index("fold")["pearson"]
    best = sections[sections["method"] == "frozen-best"].set_index("fold")["pearson"]
    assert row["pearson"] == pytest.approx(own.mean())
    assert row["difference"] == pytest.approx((own - best).mean())
    assert row["P1 difference"] == pytest.approx(own["P1"] - best["P1"])
    assert row["n_better"] == int((own > best).sum()) and row["n_folds"] == 2
    assert np.isnan(row["difference_low"])  # two folds have no interval
    many = pd.concat([plain.assign(fold=plain["fold"] + str(i)) for i in range(3)])
    low = pk.get.comparison(many).loc[("tiny", "", "svg", "frozen")]
    assert low["difference_low"] <= low["difference"] <= low["difference_high"]
    with pytest.raises(ValueError, match="`rival='bone'` is not among"):
        pk.get.comparison(plain, rival="bone")
    with pytest.raises(ValueError, match="no comparison of methods: columns .'section'"):
        pk.get.comparison(plain.drop(columns="section"))


def test_comparison_of_several_readouts(frame: pd.DataFrame, plain: pd.DataFrame) -> None:
    # those that differ in their context alone are told apart by it
    both = pk.get.comparison(frame)
    assert both.index.names == ["encoder", "context_um", "genes", "method"] and len(both) == 2 * 2 * 3
    pd.testing.assert_frame_equal(both.loc[[("tiny", "", "svg", m) for m in sorted(set(plain["method"]))]],
                                  pk.get.comparison(plain).sort_index())  # fmt: skip
    # others by all that they are, whatever else differs: here a head, whose rows score 1 more throughout
    plain_one = "Readout(context_um=None)"
    names = {
        plain_one: "Readout(head='a', context_um=None)",
        "Readout(context_um=200.0)": "Readout(head='a', context_um=200.0)",
    }
    other = frame.assign(head="a", readout=frame["readout"].map(names), pearson=frame["pearson"] + 1)
    table = pk.get.comparison(pd.concat([frame, other]))
    assert table.index.names == ["encoder", "context_um", "readout", "genes", "method"] and len(table) == 2 * len(both)
    for (encoder, context, genes, method), row in both.iterrows():
        was = {"": plain_one, "200": "Readout(context_um=200.0)"}[context]
        for readout, more in ((was, 0), (names[was], 1)):
            found = table.loc[(encoder, context, readout, genes, method)]
            assert found["pearson"] == pytest.approx(row["pearson"] + more)
            assert found["difference"] == pytest.approx(row["difference"], nan_ok=True)
    # one of them has no rival
    rival = (other["method"] == "frozen-best").to_numpy()
    alone = pk.get.comparison(pd.concat([frame, other[~rival]])).xs(names[plain_one], level="readout")
    assert alone["difference"].isna().all() and alone["pearson"].notna().all()


def test_a_context_that_is_chosen_is_one_setting_whatever_was_chosen(plain: pd.DataFrame) -> None:
    radii = np.where(plain["fold"] == "P1", "150+300", np.where(plain["method"] == "frozen-best", "300", ""))
    table = pk.get.comparison(plain.assign(context_um=radii, readout="Readout()"))
    expected = pk.get.comparison(plain).droplevel("context_um")
    assert set(table.index.get_level_values("context_um")) == {"auto"} and (table["n_folds"] == 2).all()
    pd.testing.assert_frame_equal(table.droplevel("context_um"), expected)


def test_intervals_are_over_whole_groups_and_frames_of_one_setting(plain: pd.DataFrame) -> None:
    five = pd.concat([plain[plain["fold"] == "P1"].assign(fold=f"patient {i}") for i in range(5)])
    row = ("tiny", "", "svg", "frozen")
    assert np.isfinite(pk.get.comparison(five, rival="mean").loc[row, "difference_low"])
    assert np.isnan(pk.get.comparison(five.assign(whole_groups=False), rival="mean").loc[row, "difference_low"])
    with pytest.raises(ValueError, match=r"twice \(settings: .*'teacher': \['', 'pca'\]"):
        pk.get.comparison(pd.concat([plain, plain.assign(teacher="pca")]), rival="mean")
