"""`tl.embed_tiles` and `tl.embed_expression`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from scipy import sparse
from sklearn.decomposition import PCA

import pekasc as pk
from pekasc._keys import read_uns


@pytest.fixture(scope="module")
def sections() -> sd.SpatialData:
    sdata = pk.datasets.phantom(n_patients=2, size_um=600, n_genes=60)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return sdata


def test_features_follow_the_table(sections: sd.SpatialData) -> None:
    pk.tl.embed_tiles(sections, "tiny", progress=False)
    features = sections["table"].obsm["X_tiny"]
    assert features.dtype == np.float32
    assert features.shape == (sections["table"].n_obs, 512)
    # by rows: the same tiles, embedded as arrays by an adapter-free model
    from pekasc.models.encoders._network import EncoderNetwork
    from pekasc.models.encoders._registry import resolve_encoder
    from pekasc.models.features._embed import embed
    from pekasc.models.runtime._device import resolve_device
    from pekasc.tiling import ArrayTiles

    tiles = ArrayTiles(pk.get.tiles(sections).to_numpy())
    model = EncoderNetwork(resolve_encoder("tiny"), 56)
    expected = embed(model, tiles, [(6,)], batch_size=16, device=resolve_device("cpu"))[(6,)]
    np.testing.assert_allclose(features, expected, atol=1e-4)
    record = read_uns(sections["table"], "X_tiny")
    assert record is not None
    assert (record["tile_px"], record["mpp"], record["depth"]) == (56, 2.0, "6")
    assert record["encoder_digest"] == model.digest


def test_depths_are_joined_and_rows_without_a_tile_are_nan(sections: sd.SpatialData) -> None:
    table = sections["table"]
    table.obs["in_tissue"] = np.arange(table.n_obs) > 2
    try:
        pk.pp.tile(sections, tile_px=56, mpp=2.0)
        pk.tl.embed_tiles(sections, "tiny", key_added="two", progress=False, readout={"depth": (2, -1)})
        pk.tl.embed_tiles(sections, "tiny", key_added="one", progress=False, readout={"depth": 2})
    finally:
        del table.obs["in_tissue"]
        pk.pp.tile(sections, tile_px=56, mpp=2.0)
    assert table.obsm["two"].shape[1] == 1024
    assert np.isnan(table.obsm["two"][:3]).all()
    np.testing.assert_allclose(table.obsm["two"][3:, :512], table.obsm["one"][3:], atol=1e-5)


def test_an_untiled_object_and_a_bad_depth(sections: sd.SpatialData) -> None:
    with pytest.raises(KeyError, match=r"pk\.pp\.tile\(sdata\)"):
        pk.tl.embed_tiles(pk.datasets.phantom(1, size_um=400), "tiny")
    before = set(sections["table"].obsm)
    with pytest.raises(ValueError, match="has 6 blocks: give 1 to 6"):
        pk.tl.embed_tiles(sections, "tiny", key_added="x", readout={"depth": 7})
    with pytest.raises(ValueError, match="only letters, digits"):
        pk.tl.embed_tiles(sections, "tiny", key_added="a/b")
    assert set(sections["table"].obsm) == before


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_pca_is_scikit_learns(sections: sd.SpatialData, kind: str) -> None:
    adata = sections["table"].copy()
    counts = adata.X.toarray()
    adata.X = sparse.csr_matrix(counts) if kind == "sparse" else counts
    pk.tl.embed_expression(adata, n_components=5)
    log = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    region = adata.obs["region"].to_numpy()
    seen = np.all([(counts[region == r] > 0).mean(axis=0) >= 0.1 for r in np.unique(region)], axis=0)
    expected = PCA(5, svd_solver="full").fit_transform(log[:, seen])
    np.testing.assert_allclose(np.abs(adata.obsm["X_pca"]), np.abs(expected), atol=1e-3)


def test_embedding_survives_the_disk(sections: sd.SpatialData, tmp_path: Path) -> None:
    pk.tl.embed_expression(sections, n_components=4, key_added="X_teacher")
    sections.write(tmp_path / "x.zarr")
    back = sd.read_zarr(tmp_path / "x.zarr")["table"]
    np.testing.assert_array_equal(back.obsm["X_teacher"], sections["table"].obsm["X_teacher"])
    assert read_uns(back, "X_teacher") == read_uns(sections["table"], "X_teacher")


def test_unknown_teacher_and_too_many_components(sections: sd.SpatialData) -> None:
    with pytest.raises(ValueError, match=r"choose one of \['pca', 'scvi', 'scfoundation'\]"):
        pk.tl.embed_expression(sections, "scfoundation-x")
    with pytest.raises(ValueError, match="`n_components=5000` does not fit"):
        pk.tl.embed_expression(sections, n_components=5000)


def test_an_adapters_features(tiled: sd.SpatialData, predicted: sd.SpatialData, adapter: pk.Adapter) -> None:
    pk.tl.embed_tiles(tiled, adapter, progress=False, compute={"device": "cpu"})
    np.testing.assert_array_equal(tiled["table"].obsm["X_peka"], predicted["table"].obsm["X_peka"])
    assert read_uns(tiled["table"], "X_peka")["encoder_digest"] == adapter.encoder_digest  # type: ignore[index]
    with pytest.raises(ValueError, match="An adapter has its own depth"):
        pk.tl.embed_tiles(tiled, adapter, progress=False, readout={"depth": 1}, compute={"device": "cpu"})
