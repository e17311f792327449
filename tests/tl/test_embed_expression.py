"""`tl.embed_expression`: the embedding of a table, by rows, on disk, and what cannot be embedded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from scipy import sparse
from sklearn.decomposition import PCA

import pekasc as pk
from pekasc._keys import read_uns


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_pca_is_scikit_learns(tiled: sd.SpatialData, kind: str) -> None:
    adata = tiled["table"].copy()
    counts = adata.X.toarray()
    adata.X = sparse.csr_matrix(counts) if kind == "sparse" else counts
    pk.tl.embed_expression(adata, n_components=5)
    log = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    region = adata.obs["region"].to_numpy()
    seen = np.all([(counts[region == r] > 0).mean(axis=0) >= 0.1 for r in np.unique(region)], axis=0)
    expected = PCA(5, svd_solver="full").fit_transform(log[:, seen])
    np.testing.assert_allclose(np.abs(adata.obsm["X_pca"]), np.abs(expected), atol=1e-3)


def test_embedding_survives_the_disk(tiled: sd.SpatialData, tmp_path: Path) -> None:
    pk.tl.embed_expression(tiled, n_components=4, key_added="X_teacher")
    tiled.write(tmp_path / "x.zarr")
    back = sd.read_zarr(tmp_path / "x.zarr")["table"]
    np.testing.assert_array_equal(back.obsm["X_teacher"], tiled["table"].obsm["X_teacher"])
    assert read_uns(back, "X_teacher") == read_uns(tiled["table"], "X_teacher")


def test_unknown_teacher_and_too_many_components(tiled: sd.SpatialData) -> None:
    with pytest.raises(ValueError, match=r"choose one of \['pca', 'scvi', 'scfoundation'\]"):
        pk.tl.embed_expression(tiled, "scfoundation-x")
    with pytest.raises(ValueError, match="`n_components=5000` does not fit"):
        pk.tl.embed_expression(tiled, n_components=5000)


@pytest.mark.parametrize("field", ["embed_batch_size", "max_memory", "cache", "accumulate"])
def test_fields_of_compute_that_embed_tiles(tiled: sd.SpatialData, field: str) -> None:
    with pytest.raises(ValueError, match=f"`compute`: {field!r} does nothing in this call: "):
        pk.tl.embed_expression(tiled, n_components=3, compute={field: getattr(pk.Compute(), field)})
    assert "X_pca" not in tiled["table"].obsm
