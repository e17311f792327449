"""Counts and targets: which matrix holds counts, and log1p of counts per 10,000 as scanpy has it."""

from __future__ import annotations

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from pekasc._expression import (
    close_genes,
    counts,
    dense,
    gene_columns,
    gene_names,
    gene_positions,
    log1p_cp10k,
    target_matrix,
)


def table(matrix: np.ndarray | sparse.spmatrix | None = None, **layers: np.ndarray) -> AnnData:
    if matrix is None:
        matrix = np.random.default_rng(0).poisson(2, (20, 8)).astype(np.float32)
    return AnnData(matrix, layers=layers)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_log1p_is_scanpys(kind: type, dtype: type) -> None:
    raw: np.ndarray = np.random.default_rng(1).poisson(1.5, (30, 12)).astype(dtype)
    raw[:, 0] += 1
    ours = log1p_cp10k(table(kind(raw)))
    reference = AnnData(raw.astype(np.float32))
    sc.pp.normalize_total(reference, target_sum=1e4)
    sc.pp.log1p(reference)
    assert ours.dtype == np.float32
    dense = ours.toarray() if sparse.issparse(ours) else ours
    np.testing.assert_allclose(dense, reference.X, rtol=1e-5, atol=1e-6)
    assert sparse.issparse(ours) == (kind is not np.asarray)


def test_a_spot_without_counts_is_zero_and_no_spot_depends_on_another() -> None:
    adata = table()
    adata.X[3] = 0
    whole = log1p_cp10k(adata)
    assert not whole[3].any() and np.isfinite(whole).all()
    np.testing.assert_array_equal(log1p_cp10k(adata[[5, 1]].copy()), whole[[5, 1]])


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_totals_are_over_gene_expression(kind: type) -> None:
    raw = np.random.default_rng(3).poisson(2, (20, 8)).astype(np.float32) + 1
    genes_only = dense(log1p_cp10k(table(kind(raw[:, :6]))))
    adata = table(kind(raw))
    adata.var["feature_types"] = ["Gene Expression"] * 6 + ["Antibody Capture", "Negative Control Probe"]
    np.testing.assert_array_equal(gene_columns(adata), np.arange(6))
    np.testing.assert_array_equal(dense(log1p_cp10k(adata))[:, :6], genes_only)
    adata.var["feature_types"] = "GEX"
    with pytest.warns(UserWarning, match=r"""None of the 8 features is "Gene Expression" .*\['GEX'\]: all are taken"""):
        assert gene_columns(adata).size == 8


def test_the_input_is_not_changed() -> None:
    adata = table(sparse.csr_matrix(np.random.default_rng(2).poisson(2, (9, 4)).astype(np.float32)))
    before = adata.X.copy()
    log1p_cp10k(adata)
    assert (adata.X != before).nnz == 0


def test_counts_are_found(caplog: pytest.LogCaptureFixture) -> None:
    raw = np.random.default_rng(0).poisson(2, (20, 8)).astype(np.float32)
    other = raw + 1
    np.testing.assert_array_equal(counts(table(raw, counts=other)), raw)  # X holds integers
    np.testing.assert_array_equal(counts(table(raw, mine=other), "mine"), other)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        np.testing.assert_array_equal(counts(table(np.log1p(raw), counts=raw)), raw)
    assert 'taking layers["counts"]' in caplog.text


@pytest.mark.parametrize(
    ("change", "what"),
    [(-1.0, "negative values"), (np.nan, "1 values that are NaN"), (np.inf, "infinite"), (0.5, "no integers")],
)
def test_what_cannot_be_counts_is_refused(change: float, what: str) -> None:
    raw = np.random.default_rng(0).poisson(2, (20, 8)).astype(np.float32)
    raw[2, 3] = change
    for matrix in (raw, sparse.csr_matrix(raw)):
        with pytest.raises(ValueError, match=rf"Raw counts are needed, but `X` has .*{what}"):
            counts(table(matrix))
    with pytest.raises(ValueError, match=r"layers\['mine'\] has"):
        counts(table(np.abs(np.rint(np.nan_to_num(raw, posinf=1))), mine=raw), "mine")
    with pytest.raises(ValueError, match=r'Neither `X` nor layers\["counts"\]'):
        counts(table(raw, counts=raw))


def test_log_data_are_refused_with_both_ways_out() -> None:
    with pytest.raises(ValueError, match=r'`layer=`.*`?target="as_is"'):
        target_matrix(table(np.log1p(table().X)))
    with pytest.raises(KeyError, match=r"Layer 'raw' not found\. Available layers: \['mine'\]"):
        counts(table(None, mine=table().X), "raw")


def test_target_as_is() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_array_equal(target_matrix(table(values), target="as_is"), values.astype(np.float32))
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match=r'`target="as_is"` needs finite values, found 1 '):
        target_matrix(table(values), target="as_is")
    with pytest.raises(ValueError, match="`target='log2'` is not known"):
        target_matrix(table(), target="log2")


def test_gene_names() -> None:
    adata = table()
    adata.var = pd.DataFrame({"symbol": list("ABCDEFGH")}, index=[f"ENSG{i}" for i in range(8)])
    assert list(gene_names(adata))[:2] == ["ENSG0", "ENSG1"]
    names = gene_names(adata, "symbol")
    np.testing.assert_array_equal(gene_positions(names, ["C", "nope", "A"]), [2, -1, 0])
    with pytest.raises(KeyError, match=r"`gene_key='name'` not found in `var`.*symbol"):
        gene_names(adata, "name")
    adata.var["symbol"] = list("ABCDEFGG")
    with pytest.raises(ValueError, match=r"names 1 genes more than once \(such as \['G'\]\)"):
        gene_names(adata, "symbol")
    assert "ERBB2" in close_genes("ERB2", np.array(["ERBB2", "MKI67"]))
    assert close_genes("xyz", np.array(["ERBB2"])) == ""


def test_totals_of_small_types_do_not_overflow() -> None:
    x = np.full((3, 100), 900, dtype=np.float32)  # 90,000 a spot, more than half precision holds
    np.testing.assert_allclose(log1p_cp10k(AnnData(x.astype(np.float16))), log1p_cp10k(AnnData(x)), rtol=1e-6)


def test_a_backed_sparse_matrix_is_read(tmp_path: Path) -> None:
    x = sparse.csr_matrix(np.random.default_rng(0).poisson(1, (20, 8)).astype(np.float32))
    AnnData(x).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(dense(counts(backed)), x.toarray())
