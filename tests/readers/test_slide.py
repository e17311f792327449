"""From a slide on disk to clusters of predicted expression; what is half there is an error that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scanpy as sc
import spatialdata as sd

import pekasc as pk


def test_from_a_slide_on_disk_to_clusters(slide_folder: Path, tmp_path: Path) -> None:
    adapter = pk.Adapter.load(slide_folder / "adapter")
    sdata = pk.io.read_slide(slide_folder / "slide.svs")
    record = sdata.attrs["pekasc"]
    assert record["image_mpp"] == {"slide": 1.0} and record["objective_power"] == {"slide": 10}
    pk.pp.tile_grid(
        sdata, "slide", tile_px=adapter.spec.tile_px, mpp=adapter.spec.mpp, stride_um=56, min_sharpness=None
    )
    pk.tl.predict_expression(
        sdata, adapter, table_name="grid", store=tmp_path / "p.zarr", compute={"device": "cpu"}, progress=False
    )
    sdata.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    assert again.attrs["pekasc"] == record
    pk.io.attach_predictions(again)
    adata = pk.get.expression(again, table_name="grid")
    assert adata.n_obs > 50 and list(adata.var_names) == list(adapter.genes) and np.isfinite(adata.X).all()
    sc.pp.neighbors(adata, n_neighbors=8, use_rep="X")
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False)
    n_clusters = adata.obs["leiden"].nunique()
    assert 1 < n_clusters < adata.n_obs / 4
    # clusters of tissue, not of chance: they explain where a tile lies
    xy = adata.obsm["spatial"]
    clusters = adata.obs.groupby("leiden", observed=True).indices.values()
    within = sum(((xy[rows] - xy[rows].mean(axis=0)) ** 2).sum() for rows in clusters)
    assert within < 0.9 * ((xy - xy.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("share", [0.03, 0.5, 0.98])
def test_half_a_slide(slide_folder: Path, tmp_path: Path, share: float) -> None:
    content = (slide_folder / "slide.svs").read_bytes()
    (tmp_path / "half.svs").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"half\.svs' .*is damaged or cut short: .*Download it again"):
        pk.io.read_slide(tmp_path / "half.svs")
