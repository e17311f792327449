"""Measured values stay what they were at prediction: totals when genes leave the table, and the scale of the target."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData

from pekasc._expression import TARGETS, log1p_cp10k
from pekasc._keys import write_uns
from pekasc._measured import measured, totals_to_record


@pytest.fixture
def adata() -> AnnData:
    """Return counts of 12 genes in 30 spots, one of them without any, with totals as a prediction records them."""
    raw = np.random.default_rng(0).poisson(3, (30, 12)).astype(np.float32)
    raw[4] = 0
    adata = AnnData(raw)
    recorded = totals_to_record(adata, None)
    assert recorded is not None
    adata.obs["peka_total"] = recorded[0]
    write_uns(adata, "peka", {"target": TARGETS["log1p"], **recorded[1]})
    return adata


def test_totals_stay_when_genes_leave(adata: AnnData, recwarn: pytest.WarningsRecorder) -> None:
    whole = log1p_cp10k(adata)
    values, known = measured(adata, "peka")
    np.testing.assert_array_equal(values, whole)
    assert not known[4] and known.sum() == 29
    few = adata[:, :3].copy()
    few.X[7] = 0  # measured, and none of these three
    values, known = measured(few, "peka")
    rows = np.arange(30) != 7
    np.testing.assert_array_equal(values[rows], whole[rows, :3])
    assert known[7] and not known[4]
    # rows of another object that were never predicted have totals of their own
    few.obs.loc[few.obs_names[2], "peka_total"] = np.nan
    values, _ = measured(few, "peka")
    np.testing.assert_allclose(values[2], np.log1p(1e4 * few.X[2] / few.X[2].sum()), rtol=1e-6)
    np.testing.assert_array_equal(values[3], whole[3, :3])
    assert not recwarn.list


def test_counts_that_were_replaced_have_totals_of_their_own(adata: AnnData) -> None:
    thinned = adata.copy()
    thinned.X = np.floor(adata.X / 2)  # all genes are there: no reason for other totals
    np.testing.assert_array_equal(measured(thinned, "peka")[0], log1p_cp10k(thinned))
    more = adata[:, :6].copy()
    more.X = more.X * 10
    with pytest.warns(UserWarning, match=r"totals recorded in `obs\['peka_total'\]` are below those of the counts"):
        np.testing.assert_array_equal(measured(more, "peka")[0], log1p_cp10k(more))
    other = adata[:, :6].copy()
    other.layers["spliced"] = np.floor(other.X / 2)
    more = other.copy()
    more.layers["spliced"] = more.layers["spliced"] * 20
    with pytest.warns(UserWarning, match="below those of the counts"):
        np.testing.assert_array_equal(measured(more, "peka", "spliced")[0], log1p_cp10k(more, "spliced"))
    gone = adata[:, :6].copy()
    del gone.obs["peka_total"]
    with pytest.warns(UserWarning, match=r"`obs\['peka_total'\]` with the totals over 12 genes has gone, 6"):
        measured(gone, "peka")


def test_counts_that_moved_to_a_layer_keep_their_totals(adata: AnnData) -> None:
    whole = log1p_cp10k(adata)
    few = adata[:, :6].copy()
    few.layers["counts"] = few.X.copy()
    few.X = np.log1p(few.X)  # as scanpy's users do
    np.testing.assert_array_equal(measured(few, "peka")[0], whole[:, :6])


def test_the_layer_of_the_counts_is_recorded(adata: AnnData) -> None:
    adata.layers["spliced"] = np.floor(adata.X / 2)
    recorded = totals_to_record(adata, "spliced")
    assert recorded is not None
    adata.obs["peka_total"] = recorded[0]
    write_uns(adata, "peka", {"target": TARGETS["log1p"], **recorded[1]})
    np.testing.assert_array_equal(measured(adata, "peka")[0], log1p_cp10k(adata, "spliced"))
    del adata.layers["spliced"]
    with pytest.warns(UserWarning, match=r"were in layers\['spliced'\], which is not in the table any more"):
        measured(adata, "peka")


def test_a_scale_that_was_lost_is_not_guessed(adata: AnnData) -> None:
    adata.obs["peka_train"] = False
    del adata.uns["pekasc"]
    measured(adata, "peka")  # totals say that it was counts
    del adata.obs["peka_total"]
    with pytest.raises(ValueError, match=r"scale of layers\['peka'\] is not known: .*joining objects drops it"):
        measured(adata, "peka")


def test_tables_without_counts_have_no_totals(adata: AnnData) -> None:
    assert totals_to_record(AnnData(np.log1p(adata.X)), None) is None
    assert totals_to_record(AnnData(obs=adata.obs), None) is None
    log = AnnData(np.log1p(adata.X), layers={"raw": adata.X})
    recorded = totals_to_record(log, "raw")
    assert recorded is not None and recorded[1] == {"counts_layer": "raw", "n_genes_in_total": 12}
