"""Which spots, groups and genes a user's arguments mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pekasc.tl._select import by_label, default_groups, is_boolean, obs_groups, training_mask, wanted_genes

GENES = np.array([f"G{i}" for i in range(5)], dtype=object)


@pytest.fixture
def adata() -> AnnData:
    """Return six spots of two sections of two patients."""
    obs = pd.DataFrame(
        {
            "region": pd.Categorical(["a_spots"] * 3 + ["b_spots"] * 3),
            "section": ["A"] * 3 + ["B"] * 3,
            "patient": ["p", "p", "p", "q", "q", "q"],
            "tumour": [True, False, True, False, False, True],
            "spot_id": range(6),
        },
        index=[f"s{i}" for i in range(6)],
    )
    adata = AnnData(np.ones((6, 5), dtype=np.float32), obs=obs, var=pd.DataFrame(index=GENES.astype(str)))
    adata.uns["spatialdata_attrs"] = {
        "region": ["a_spots", "b_spots"],
        "region_key": "region",
        "instance_key": "spot_id",
    }
    return adata


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("tumour", [0, 2, 5]),
        ([True, False, False, False, False, True], [0, 5]),
        (np.arange(6) > 3, [4, 5]),
        (pd.Series(np.arange(6) < 2, index=[f"s{i}" for i in range(5, -1, -1)]), [4, 5]),  # by its index
        (["a_spots"], [0, 1, 2]),
        (["B"], [3, 4, 5]),  # by obs["section"]
        (["A", "b_spots"], [0, 1, 2, 3, 4, 5]),
        (np.array(["B"]), [3, 4, 5]),
    ],
    ids=["all", "column", "list", "array", "series", "region", "section", "both", "array of sections"],
)
def test_training_spots(adata: AnnData, train: Any, expected: list[int]) -> None:
    mask = training_mask(adata, train)
    assert mask.dtype == bool and np.flatnonzero(mask).tolist() == expected


def test_a_nullable_column_is_boolean_where_nothing_is_missing(adata: AnnData) -> None:
    adata.obs["nullable"] = pd.array([True, False, True, True, False, False], dtype="boolean")
    assert training_mask(adata, "nullable").tolist() == [True, False, True, True, False, False]
    adata.obs["holes"] = pd.array([True, None, True, True, False, False], dtype="boolean")
    assert not is_boolean(adata.obs["holes"])
    with pytest.raises(ValueError, match=r"needs a boolean column"):
        training_mask(adata, "holes")


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ("tumor", KeyError, r"`train='tumor'` .*`train=\['tumor'\]`"),
        ("patient", ValueError, "needs a boolean column"),
        ([True], ValueError, "length 1, the table has 6 rows"),
        ([], ValueError, "leaves no spots"),
        (np.zeros(6, bool), ValueError, "leaves no spots"),
        (["C"], KeyError, r"section 'C', which is not there\. Sections: \['A', 'B', 'a_spots', 'b_spots'\]"),
        (pd.Series([True] * 6, index=list("abcdef")), ValueError, "The index of the Series `train=` does not"),
    ],
)
def test_training_spots_that_are_none(adata: AnnData, train: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        training_mask(adata, train)


def test_groups_are_patients_where_there_are_two_else_sections(adata: AnnData) -> None:
    rows = np.arange(6)
    assert default_groups(adata, rows) == "patient"
    assert default_groups(adata, rows[:3]) is None  # one patient
    assert obs_groups(adata, "patient", rows[2:4]).tolist() == ["p", "q"]
    assert obs_groups(adata, None, rows[2:4]).tolist() == ["a_spots", "b_spots"]
    adata.obs.loc["s4", "patient"] = None
    with pytest.raises(ValueError, match=r"1 spots have no patient in `obs\['patient'\]`, others have"):
        default_groups(adata, rows)
    assert default_groups(adata, rows[:4]) == "patient"  # nothing outside is looked at
    with pytest.raises(ValueError, match=r"1 training (rows|spots) have no group in `obs\['patient'\]`"):
        obs_groups(adata, "patient", rows)
    with pytest.raises(KeyError, match=r"`groups='donor'` not found in `obs`\. Available columns: .*'patient'"):
        obs_groups(adata, "donor", rows)
    with pytest.raises(
        KeyError, match=r"`groups='pateint'` not found in `obs`\. Did you mean 'patient'\? Available columns: "
    ):
        obs_groups(adata, "pateint", rows)
    del adata.obs["patient"]
    assert default_groups(adata, rows) is None


@pytest.mark.parametrize(
    "genes",
    [
        ["G3", "G1"], ("G1", "G3", "G1"), np.array(["G3", "G1"]), "marker", np.array([False, True, False, True, False]),
        pd.Series([True, False, True, False, False], index=["G3", "G4", "G1", "G0", "G2"]),
    ],
    ids=["list", "twice", "array", "column", "mask", "series"],
)  # fmt: skip
def test_genes(adata: AnnData, genes: Any) -> None:
    adata.var["marker"] = [False, True, False, True, False]
    assert wanted_genes(adata, GENES, genes, np.arange(5)).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("genes", "error", "message"),
    [
        ([], ValueError, "`genes=` is empty"),
        (np.zeros(5, bool), ValueError, "`genes=` is empty"),
        (np.ones(4, bool), ValueError, r"The mask `genes=` has shape \(4,\), the table has 5 genes"),
        (["G1", "g9"], KeyError, r"1 of 2 genes .* not in the table: \['g9'\]"),
        ("marker", KeyError, r"`genes='marker'` is no boolean column of `var`"),
        (["X", "Y"], ValueError, "None of the 2 genes"),
        (pd.Series([True] * 5), ValueError, None),
    ],
)
def test_genes_that_are_none(adata: AnnData, genes: Any, error: type[Exception], message: str | None) -> None:
    if message is None:
        # a Series without names counts by position, as an array does
        assert wanted_genes(adata, GENES, genes, np.arange(5)).tolist() == [0, 1, 2, 3, 4]
        return
    with pytest.raises(error, match=message):
        wanted_genes(adata, GENES, genes, np.arange(5))


def test_genes_that_are_antibodies(adata: AnnData) -> None:
    adata.var["feature_types"] = ["Gene Expression", "Antibody Capture", *["Gene Expression"] * 3]
    columns = np.array([0, 2, 3, 4])
    names = np.asarray(GENES)[columns]
    assert wanted_genes(adata, names, ["G3", "G0"], columns).tolist() == [0, 2]
    assert wanted_genes(adata, names, np.array([False, True, True, False, True]), columns).tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"1 of the 2 .* no gene expression by .*\['G1'\] \(Antibody Capture\)"):
        wanted_genes(adata, names, ["G1", "G3"], columns)
    with pytest.raises(ValueError, match="`genes=` is empty: the mask holds no True"):
        wanted_genes(adata, names, np.arange(5) == 1, columns)


def test_what_is_no_series_with_names_stays_as_it_is(adata: AnnData) -> None:
    for values in ([1, 2], np.arange(3), pd.Series([1, 2, 3])):
        assert by_label(values, adata.obs_names, "train=") is values
    with pytest.raises(ValueError, match="does not hold the table's names"):
        by_label(pd.Series([1, 2], index=["s0", "s0"]), adata.obs_names, "train=")
