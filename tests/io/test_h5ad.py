"""Counts, names, columns and centres of an AnnData file, as anndata itself reads them; what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pekasc.io._h5ad import read_h5ad

N, M = 5, 4
COUNTS = np.random.default_rng(0).poisson(1.0, (N, M))
COLUMNS: dict[str, Any] = {
    "whole": np.arange(N), "flag": [True, False] * 2 + [True], "kind": pd.Categorical(["a", "b", None, "a", "b"]),
    "numbers": pd.Categorical([3, 1, 3, 3, 1]), "missing": pd.array([1, None, 3, 4, 5], dtype="Int64"),
}  # fmt: skip


def write(path: Path, x: Any = None) -> Path:
    obs = pd.DataFrame(COLUMNS, index=[f"spot{i}" for i in range(N)])
    adata = ad.AnnData(
        sparse.csr_matrix(COUNTS) if x is None else x, obs, pd.DataFrame(index=[f"g{i}" for i in range(M)])
    )
    adata.obsm["spatial"] = np.arange(2 * N).reshape(N, 2)
    adata.uns["anything"] = {"a": [1, 2]}
    adata.write_h5ad(path / "a.h5ad")
    return path / "a.h5ad"


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray, lambda x: x.astype(np.float16)])
def test_what_anndata_reads(tmp_path: Path, kind: Callable[..., Any]) -> None:
    file = write(tmp_path, kind(COUNTS))
    found, expected = read_h5ad(file, [*COLUMNS, "not there"]), ad.read_h5ad(file)
    np.testing.assert_array_equal(found.counts.toarray(), COUNTS)
    assert found.counts.dtype == np.float32 and found.counts.format == "csr"
    assert list(found.rows) == list(expected.obs_names) and list(found.genes) == list(expected.var_names)
    np.testing.assert_array_equal(found.spatial, expected.obsm["spatial"])
    assert list(found.obs) == list(COLUMNS)
    for name in COLUMNS:
        # what is missing is NaN or pd.NA, by the version of pandas
        ours, theirs = (
            [None if pd.isna(value) else value for value in frame[name]] for frame in (found.obs, expected.obs)
        )
        assert ours == theirs


def _set(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(h5: h5py.File) -> None:
        kept = dict(h5[name].attrs) if name in h5 else {}
        if name in h5:
            del h5[name]
        if value is not None:
            h5[name] = value
            h5[name].attrs.update(kept)

    return change


def _attribute(name: str, key: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda h5: h5[name].attrs.__setitem__(key, value)


INDPTR = sparse.csr_matrix(COUNTS).indptr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("X", None), "'X' is missing"),
        (_set("obsm/spatial", None), "'obsm/spatial' is missing: there are no spot centres"),
        (_set("obsm/spatial", np.zeros((N - 1, 2))), r"'obsm/spatial' has shape \(4, 2\) for 5 rows"),
        (_set("obsm/spatial", np.zeros((N, 1))), "'obsm/spatial' has shape"),
        (_set("obsm/spatial", np.zeros(N)), "must be numbers with 2 axes"),
        (_set("obs", np.zeros(N)), "'obs' is no table as anndata writes it since 0.7"),
        (_set("obs/_index", None), "'obs/_index' is missing"),
        (_set("var/_index", np.arange(M)), "'var/_index' must be strings"),
        (_set("obs/whole", np.arange(3)), "'obs/whole' has 3 values for 5 rows"),
        (_set("obs/kind/codes", np.full(N, 7, np.int8)), "'obs/kind' has codes that are none of its 2 categories"),
        (_set("obs/kind/codes", np.full(N, -2, np.int8)), "'obs/kind' has codes that are none"),
        (_set("obs/missing/mask", np.zeros(2, bool)), "'obs/missing' has 5 values and 2 marks"),
        (_set("X/data", None), "'X/data' is missing"),
        (_set("X/data", np.ones(3)), "'X' has 3 values"),
        (_set("X/indices", np.full(INDPTR[-1], M)), "'X/indices' has indices beyond 4 columns"),
        (_set("X/indices", np.full(INDPTR[-1], -1)), "'X/indices' has indices beyond"),
        (_set("X/indices", np.zeros(INDPTR[-1])), "must be numbers"),
        (_set("X/indptr", INDPTR[::-1].copy()), "'X/indptr' does not divide"),
        (_set("X/indptr", INDPTR[:-1]), "'X/indptr' does not divide"),
        (_attribute("X", "shape", [N, M + 1]), r"'X' has shape \[5 5\] for 5 rows and 4 genes"),
        (_attribute("X", "encoding-type", "pickle"), "'X' must be one of"),
        (_attribute("obs", "_index", "../X/data"), "'obs' names no column as its index"),
        (_attribute("obs/whole", "categories", 1), "'obs/whole' is written as by anndata before 0.8"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[h5py.File], None], message: str) -> None:
    file = write(tmp_path)
    with h5py.File(file, "a") as h5:
        change(h5)
    with pytest.raises(ValueError, match=rf"a.h5ad' cannot be read: .*{message}"):
        read_h5ad(file, list(COLUMNS))


def test_a_dense_matrix_of_other_rows(tmp_path: Path) -> None:
    file = write(tmp_path, COUNTS.astype(float))
    with h5py.File(file, "a") as h5:
        _set("X", np.zeros((N, M + 1)))(h5)
    with pytest.raises(ValueError, match=r"'X' has shape \(5, 5\) for 5 rows and 4 genes"):
        read_h5ad(file, [])
