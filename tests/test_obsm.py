"""Targets that are columns of obsm: what is read, and what is refused with a way out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from pekasc import _obsm
from pekasc._keys import write_uns


@pytest.fixture
def adata() -> AnnData:
    """Return 20 spots with proportions of three cell types, named, and an array of two columns."""
    adata = AnnData(np.ones((20, 3), dtype=np.float32))
    values = np.random.default_rng(0).dirichlet([1, 2, 3], 20)
    adata.obsm["types"] = pd.DataFrame(values, index=adata.obs_names, columns=["T cell", "B", "tumour"])
    adata.obsm["pair"] = values[:, :2].astype(np.float32)
    return adata


def test_the_argument() -> None:
    assert _obsm.obsm_of("log1p") is None and _obsm.obsm_of("as_is") is None
    assert _obsm.obsm_of({"obsm": "types"}) == "types"
    for wrong in ({}, {"layer": "x"}, {"obsm": "a", "obs": "b"}):
        with pytest.raises(ValueError, match=r'`target=\{.*is not known.*`target=\{"obsm": key\}`'):
            _obsm.obsm_of(wrong)
    with pytest.raises(TypeError, match="`target` must be a string, got int: 3"):
        _obsm.obsm_of({"obsm": 3})
    with pytest.raises(ValueError, match="`target='a b'` cannot be stored"):
        _obsm.obsm_of({"obsm": "a b"})


def test_names_and_values(adata: AnnData) -> None:
    frame = _obsm.obsm_columns(adata, "types")
    assert list(frame) == ["T cell", "B", "tumour"] and (frame.dtypes == np.float64).all()
    np.testing.assert_array_equal(frame, adata.obsm["types"])
    assert list(_obsm.obsm_columns(adata, "pair")) == ["0", "1"]
    adata.obsm["sparse"] = csr_matrix(adata.obsm["pair"])
    np.testing.assert_array_equal(_obsm.obsm_columns(adata, "sparse"), adata.obsm["pair"])
    # nullable columns, flags and whole numbers are numbers
    mixed = pd.DataFrame({"a": pd.array([1.5, None] * 10, "Float64"), 2: [True, False] * 10}, index=adata.obs_names)
    adata.obsm["mixed"] = mixed
    found = _obsm.obsm_columns(adata, "mixed")
    assert list(found) == ["a", "2"]
    np.testing.assert_array_equal(found["a"], [1.5, np.nan] * 10)
    np.testing.assert_array_equal(found["2"], [1.0, 0.0] * 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda names: pd.DataFrame({"a": 1.0, "kind": "x"}, index=names), r"1 columns that are no numbers: .*'kind'"),
        (lambda names: pd.DataFrame({"c": pd.Categorical(["u"] * 20)}, index=names), "no numbers: {'c': 'category'}"),
        (lambda names: pd.DataFrame(np.ones((20, 3)), names, ["a", "b", "a"]), r"names 1 columns more than once .*'a'"),
        (lambda names: pd.DataFrame(np.ones((20, 2)), names, [1, "1"]), r"more than once \(such as \['1'\]\)"),
        (lambda names: pd.DataFrame(np.ones((20, 2)), names, ["a", ""]), "a column without a name"),
        (lambda names: pd.DataFrame(index=names), "has no columns"),
        (lambda names: np.ones((20, 2, 3)), r"has shape \(20, 2, 3\): a target has one row a spot"),
        (lambda names: np.ones((20, 2), dtype=complex), "has dtype complex128: numbers are needed"),
        (lambda names: np.full((20, 2), "x"), "has dtype <U1: numbers are needed"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_numbers(adata: AnnData, make: Any, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's, of repeated names
        adata.obsm["bad"] = make(adata.obs_names)
    with pytest.raises(ValueError, match=r"obsm\['bad'\].*" + words):
        _obsm.obsm_columns(adata, "bad")


def test_one_dimension() -> None:
    # anndata refuses it in most versions, and what reads lazily may give it all the same
    with pytest.raises(ValueError, match=r"shape \(20,\).*reshape\(-1, 1\)"):
        _obsm._array(np.ones(20), "obsm['score']")


def test_no_such_key(adata: AnnData) -> None:
    with pytest.raises(KeyError, match=r"`target`: obsm\['type'\] is not in the table. Did you mean 'types'\?"):
        _obsm.obsm_columns(adata, "type")


def test_training_spots_have_finite_values_that_vary(adata: AnnData) -> None:
    rows = np.arange(5, 20)
    names, values = _obsm.training_target(adata, "types", rows)
    assert list(names) == ["T cell", "B", "tumour"] and values.dtype == np.float32
    np.testing.assert_allclose(values, adata.obsm["types"].iloc[rows], rtol=1e-6)
    adata.obsm["types"].iloc[[0, 7, 9], 1] = [np.nan, np.inf, np.nan]
    words = r"NaN or infinite in 2 of the 15 training spots \(columns \['B'\]\).*`train=np\.isfinite\(.*fill in"
    with pytest.raises(ValueError, match=words):
        _obsm.training_target(adata, "types", rows)
    # the mask that the message gives works; spots that do not train are not looked at
    mask = np.isfinite(np.asarray(adata.obsm["types"], dtype=float)).all(axis=1)
    assert _obsm.training_target(adata, "types", np.flatnonzero(mask))[1].shape == (17, 3)
    adata.obsm["pair"][:] = [1, 2]
    with pytest.raises(ValueError, match="Every column of .* constant over the 20 training spots: there is nothing"):
        _obsm.training_target(adata, "pair", np.arange(20))
    adata.obsm["pair"][3, 0] = 5  # one column that varies can be learned
    _obsm.training_target(adata, "pair", np.arange(20))


def test_a_slash_is_told_before_it_cannot_be_saved(adata: AnnData) -> None:
    adata.obsm["types"].columns = ["T/NK", "B", "tumour"]
    with pytest.warns(UserWarning, match=r"1 columns of obsm\['types'\] have a slash .*'T/NK'"):
        _obsm.training_target(adata, "types", np.arange(20))


def test_measured_values_are_joined_by_name(adata: AnnData) -> None:
    adata.obsm["types"].iloc[2, 0] = np.nan
    values = _obsm.measured_target(adata, "types", pd.Index(["tumour", "T cell"]))
    expected = adata.obsm["types"][["tumour", "T cell"]].to_numpy()
    rows = np.arange(20) != 2
    np.testing.assert_array_equal(values[rows], expected[rows])
    assert np.isnan(values[2]).all()
    with pytest.raises(KeyError, match=re.escape("lacks 1 of the 2 predicted columns: ['stroma']")):
        _obsm.measured_target(adata, "types", pd.Index(["B", "stroma"]))


def test_predicted_columns(adata: AnnData) -> None:
    with pytest.raises(KeyError, match=r"obsm\['X_peka_types'\] not found.*predict_expression"):
        _obsm.predicted_target(adata, "peka", "types")
    assert not list(_obsm.recorded_targets(adata, "peka"))
    adata.obsm["X_peka_types"] = adata.obsm["types"] * 2
    write_uns(adata, "X_peka_types", {"obsm": "types", "key_added": "peka"}, kind="prediction")
    write_uns(adata, "X_mine_types", {"obsm": "types", "key_added": "mine"}, kind="prediction")
    assert [key for key, _ in _obsm.recorded_targets(adata, "peka")] == ["types"]
    assert not list(_obsm.recorded_targets(adata, "mine"))  # its values have gone
    assert _obsm.target_column(adata, "peka", "types:T cell") == ("types", "T cell")
    np.testing.assert_array_equal(
        _obsm.predicted_column(adata, "peka", "types", "T cell"), 2 * adata.obsm["types"]["T cell"]
    )
    with pytest.raises(KeyError, match=r"no column 'T cel'. Did you mean 'T cell'\?"):
        _obsm.predicted_column(adata, "peka", "types", "T cel")
    adata.var_names = ["a", "types:T cell", "c"]
    assert _obsm.target_column(adata, "peka", "types:T cell") is None  # a gene of that name is that gene
    assert _obsm.target_column(adata, "peka", "a") is None
