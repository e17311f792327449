"""pp.split: groups stay together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData

import pekasc as pk


@pytest.fixture
def adata() -> AnnData:
    groups = np.repeat(["c", "a", "d", "b", "e"], [40, 10, 20, 25, 5])
    order = np.random.default_rng(0).permutation(100)
    obs = pd.DataFrame(
        {"patient": pd.Categorical(groups[order], categories=list("fedcba"))}, index=map(str, range(100))
    )
    return AnnData(np.zeros((100, 1), np.float32), obs=obs)


def test_one_fold_for_each_group(adata: AnnData) -> None:
    pk.pp.split(adata, groups="patient")
    expected = adata.obs["patient"].astype(str).map({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4})
    np.testing.assert_array_equal(adata.obs["fold"], expected)
    assert adata.obs["fold"].dtype == np.int64
    assert adata.uns["pekasc"]["fold"] == {"groups": "patient", "n_folds": 5, "kind": "split"}


def test_folds_of_several_groups_are_even(adata: AnnData) -> None:
    pk.pp.split(adata, groups="patient", n_folds=2, key_added="half")
    folds = adata.obs.groupby("patient", observed=True)["half"].nunique()
    assert (folds == 1).all()
    # 40 + 10 and 25 + 20 + 5
    assert adata.obs["half"].value_counts().to_dict() == {0: 50, 1: 50}
    again = adata.copy()
    pk.pp.split(again, groups="patient", n_folds=2, key_added="half")
    np.testing.assert_array_equal(adata.obs["half"], again.obs["half"])


def test_numbers_and_strings(adata: AnnData) -> None:
    adata.obs["number"] = np.arange(100) % 3 + 9
    pk.pp.split(adata, groups="number")
    np.testing.assert_array_equal(adata.obs["fold"], np.arange(100) % 3)
    adata.obs["name"] = adata.obs["patient"].astype(str)
    pk.pp.split(adata, groups="name")
    assert adata.obs["fold"].nunique() == 5


def test_spatialdata(scene: Callable[..., SpatialData]) -> None:
    sdata = scene()
    sdata["table"].obs["patient"] = ["p", "q"] * 6
    pk.pp.split(sdata, groups="patient")
    np.testing.assert_array_equal(sdata["table"].obs["fold"], [0, 1] * 6)
    with pytest.raises(KeyError, match="Available tables"):
        pk.pp.split(sdata, groups="patient", table_name="cells")


def test_errors(adata: AnnData) -> None:
    columns = list(adata.obs)
    with pytest.raises(KeyError, match=r"Groups 'donor' not found in `obs`. Available columns: \['patient'\]"):
        pk.pp.split(adata, groups="donor")
    with pytest.raises(KeyError, match=r"Groups 'pateint' not found in `obs`. Did you mean 'patient'\? Available"):
        pk.pp.split(adata, groups="pateint")
    with pytest.raises(ValueError, match="`n_folds=6` must be between 2 and 5"):
        pk.pp.split(adata, groups="patient", n_folds=6)
    with pytest.raises(ValueError, match="`n_folds=1` must be between 2 and 5"):
        pk.pp.split(adata, groups="patient", n_folds=1)
    with pytest.raises(TypeError, match="`n_folds` must be an integer"):
        pk.pp.split(adata, groups="patient", n_folds=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="would overwrite the groups"):
        pk.pp.split(adata, groups="patient", key_added="patient")
    with pytest.raises(ValueError, match="cannot be stored"):
        pk.pp.split(adata, groups="patient", key_added="my fold")
    with pytest.raises(ValueError, match="is a view"):
        pk.pp.split(adata[:50], groups="patient")
    assert list(adata.obs) == columns and not adata.uns
    adata.obs["one"] = "same"
    with pytest.raises(ValueError, match=r"`obs\['one'\]` has a single group, 'same': nothing to hold out"):
        pk.pp.split(adata, groups="one")
    adata.obs.loc[["3", "7"], "patient"] = None
    with pytest.raises(ValueError, match=r"2 rows have no group in `obs\['patient'\]`: '3', '7'"):
        pk.pp.split(adata, groups="patient")


def test_names_that_are_not_unique_are_refused(adata: AnnData) -> None:
    adata.obs_names = ["a"] * adata.n_obs
    with pytest.raises(
        ValueError, match="The table has duplicate obs names: 'a'. Make them unique with `adata.obs_names_make_unique"
    ):
        pk.pp.split(adata, groups="patient")
