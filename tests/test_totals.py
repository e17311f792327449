"""Totals stay what they were at prediction when genes leave the table, and are used for those counts only."""

from __future__ import annotations

from collections.abc import Callable

import anndata
import numpy as np
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from pekasc._expression import dense, log1p_cp10k
from pekasc._measured import measured
from pekasc._totals import totals_to_record


def test_totals_stay_when_genes_leave(counted: AnnData, recwarn: pytest.WarningsRecorder) -> None:
    whole = log1p_cp10k(counted)
    values, known = measured(counted, "peka")
    np.testing.assert_array_equal(values, whole)
    assert not known[4] and known.sum() == 29
    few = counted[:, :3].copy()
    values, known = measured(few, "peka")
    rows = np.arange(30) != 7
    np.testing.assert_array_equal(values[rows], whole[rows, :3])
    assert known[7] and not known[4]  # measured, and none of these three
    # rows of another object that were never predicted have totals of their own
    few.obs.loc[few.obs_names[2], "peka_total"] = np.nan
    values, _ = measured(few, "peka")
    np.testing.assert_allclose(values[2], np.log1p(1e4 * few.X[2] / few.X[2].sum()), rtol=1e-6)
    np.testing.assert_array_equal(values[3], whole[3, :3])
    assert not recwarn.list


def test_counts_that_were_replaced_have_totals_of_their_own(counted: AnnData) -> None:
    thinned = counted.copy()
    thinned.X = np.floor(counted.X / 2)  # all genes are there: no reason for other totals
    np.testing.assert_array_equal(measured(thinned, "peka")[0], log1p_cp10k(thinned))
    more = counted[:, :6].copy()
    more.X = more.X * 10
    with pytest.warns(UserWarning, match=r"totals recorded in `obs\['peka_total'\]` are below those of the counts"):
        np.testing.assert_array_equal(measured(more, "peka")[0], log1p_cp10k(more))
    other = counted[:, :6].copy()
    other.layers["spliced"] = np.floor(other.X / 2)
    more = other.copy()
    more.layers["spliced"] = more.layers["spliced"] * 20
    with pytest.warns(UserWarning, match="below those of the counts"):
        np.testing.assert_array_equal(measured(more, "peka", "spliced")[0], log1p_cp10k(more, "spliced"))
    gone = counted[:, :6].copy()
    del gone.obs["peka_total"]
    with pytest.warns(UserWarning, match=r"`obs\['peka_total'\]` with the totals over 12 genes has gone, 6"):
        measured(gone, "peka")


def test_counts_that_moved_to_a_layer_keep_their_totals(counted: AnnData) -> None:
    whole = log1p_cp10k(counted)
    few = counted[:, :6].copy()
    few.layers["counts"] = few.X.copy()
    few.X = np.log1p(few.X)  # as scanpy's users do
    np.testing.assert_array_equal(measured(few, "peka")[0], whole[:, :6])


def test_totals_are_not_those_of_fewer_counts(counted: AnnData) -> None:
    few = counted[:, :6].copy()
    few.X = np.floor(few.X / 2)  # other counts, whose totals are below those recorded
    with pytest.warns(UserWarning, match=r"of \d+ counts compared are not what they were when the totals .* recorded"):
        np.testing.assert_array_equal(measured(few, "peka")[0], log1p_cp10k(few))
    # rows may have left too, and `uns`, as joining objects drops it
    part = few[10:20, ::-1].copy()
    del part.uns["pekasc"]
    with pytest.warns(UserWarning, match="over the 6 genes left"):
        np.testing.assert_array_equal(measured(part, "peka")[0], log1p_cp10k(part))
    spliced = counted[:, :6].copy()
    spliced.layers["spliced"] = np.floor(spliced.X / 2)
    with pytest.warns(UserWarning, match="counts compared"):
        measured(spliced, "peka", "spliced")


@pytest.mark.parametrize("sparse", [False, True])
def test_totals_stay_with_their_rows(
    counted: AnnData, record_totals: Callable[..., None], sparse: bool, recwarn: pytest.WarningsRecorder
) -> None:
    whole = log1p_cp10k(counted)
    if sparse:
        counted.X = csr_matrix(counted.X)
        record_totals(counted)
    part = counted[::-2, [7, 2, 5]].copy()
    joined = anndata.concat([part, counted[:6, [2, 5, 7]]], index_unique="-", join="outer")
    assert "pekasc" not in joined.uns
    values, _ = measured(joined, "peka")
    at = [joined.var_names.get_loc(str(gene)) for gene in (2, 5, 7)]
    expected = np.vstack([whole[::-2], whole[:6]])[:, [2, 5, 7]]
    np.testing.assert_array_equal(dense(values)[:, at], expected)
    assert not [w for w in recwarn.list if "Measured values" in str(w.message)]  # joining may warn of its own


def test_totals_that_cannot_be_checked_are_said(counted: AnnData) -> None:
    whole = log1p_cp10k(counted)
    few = counted[:, :6].copy()
    few.var_names = [f"ENSG{i}" for i in range(6)]
    with pytest.warns(UserWarning, match=r"nothing is left to tell .* `obsm\['peka_total_check'\]`"):
        np.testing.assert_array_equal(measured(few, "peka")[0], whole[:, :6])
    few = counted[:, :6].copy()
    del few.obsm["peka_total_check"]
    with pytest.warns(UserWarning, match="nothing is left to tell"):
        measured(few, "peka")


def test_genes_of_one_name_say_nothing(
    counted: AnnData, record_totals: Callable[..., None], recwarn: pytest.WarningsRecorder
) -> None:
    counted.var_names = ["a", "a", *"bcdefghijk"]
    record_totals(counted)
    few = counted[:, 1:7].copy()  # its name is one gene's now
    np.testing.assert_array_equal(measured(few, "peka")[0], log1p_cp10k(counted)[:, 1:7])
    assert not [str(w.message) for w in recwarn.list if "counts compared" in str(w.message)]


def test_tables_without_counts_have_no_totals(counted: AnnData) -> None:
    assert totals_to_record(AnnData(np.log1p(counted.X)), None) is None
    assert totals_to_record(AnnData(obs=counted.obs), None) is None
    log = AnnData(np.log1p(counted.X), layers={"raw": counted.X})
    recorded = totals_to_record(log, "raw")
    assert recorded is not None and recorded[2] == {"counts_layer": "raw", "n_genes_in_total": 12}
