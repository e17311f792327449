"""`io.read_hest` on generated folders that are laid out like HEST-1k."""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import spatialdata
import tifffile
from spatialdata import SpatialData

import pekasc as pk
from pekasc._settings import HINT
from pekasc.io import _tiff

Make = Callable[..., Any]
MPP, SIDE_PX = 1.0, 112
pytestmark = pytest.mark.filterwarnings("ignore:.*tiles show no tissue")


def by_barcode(sdata: SpatialData, key: str = "tiles") -> dict[tuple[str, str], np.ndarray]:
    """Return all tiles by sample and barcode."""
    tiles = pk.get.tiles(sdata, key=key)
    obs = sdata["table"].obs.loc[tiles.coords["tile"].values, ["section", "barcode"]]
    return dict(zip(map(tuple, obs.astype(str).to_numpy()), tiles.values, strict=True))


def rewrite_patches(file: Path, **changes: Any) -> None:
    """Write a file of patches again with other data sets (... leaves one out), the attributes kept."""
    with h5py.File(file) as h5:
        attrs = dict(h5["img"].attrs)
        data = {name: h5[name][:] for name in h5} | changes
    with h5py.File(file, "w") as h5:
        for name, values in data.items():
            if values is not ...:
                h5[name] = values
        if "img" in h5:
            h5["img"].attrs.update(attrs)


def edit_expression(file: Path, change: Callable[[anndata.AnnData], Any]) -> None:
    adata = anndata.read_h5ad(file)
    (change(adata) or adata).write_h5ad(file)


def test_one_sample(hest: Make) -> None:
    folder = hest()
    sdata = pk.io.read_hest(folder.path, "INT1")
    assert list(sdata.images) == ["INT1_he"] and list(sdata.shapes) == ["INT1_spots"]
    table = sdata["table"]
    assert list(table.obs_names) == [f"INT1_{b}" for b in folder.barcodes["INT1"]]
    assert (table.obs["section"] == "INT1").all() and (table.obs["patient"] == "Patient 1").all()
    np.testing.assert_array_equal(table.X.toarray(), folder.counts["INT1"])
    assert table.X.dtype == np.float32 and table.X.format == "csr"
    np.testing.assert_array_equal(table.obsm["spatial"], folder.centres["INT1"])
    level = spatialdata.get_pyramid_levels(sdata.images["INT1_he"], n=0)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(level), 0, -1), folder.pixels["INT1"])
    spots = sdata.shapes["INT1_spots"]
    np.testing.assert_array_equal(spots.get_coordinates().to_numpy(), folder.centres["INT1"])
    np.testing.assert_allclose(spots["radius"], 55 / 2 / MPP)
    assert table.uns["pekasc"]["image_mpp"] == {"INT1_he": MPP}
    assert json.loads(table.uns["pekasc"]["hest"]["INT1"])["species"] == "Homo sapiens"


def test_several_samples_keep_the_genes_that_all_have(hest: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = hest(2)
    edit_expression(folder.file("st", "INT2"), lambda adata: adata[:, ::-1][:, :15].copy())
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_hest(folder.path, ["INT2", "INT1"])
    assert "15 genes are in all samples; left out: 5 of INT1" in caplog.text
    table = sdata["table"]
    assert table.n_vars == 15
    assert list(table.obs["section"].cat.categories) == ["INT2", "INT1"]
    for name in ("INT1", "INT2"):
        own = table[table.obs["section"] == name]
        truth = folder.counts[name].loc[own.obs["barcode"], own.var_names]
        np.testing.assert_array_equal(own.X.toarray(), truth)
        np.testing.assert_array_equal(own.obsm["spatial"], folder.centres[name])


def test_genes_can_be_chosen(hest: Make) -> None:
    folder = hest(2)
    sdata = pk.io.read_hest(folder.path, ["INT1", "INT2"], genes=["gene007", "gene002"])
    table = sdata["table"]
    assert list(table.var_names) == ["gene007", "gene002"]
    rows = (table.obs["section"] == "INT2").to_numpy()
    np.testing.assert_array_equal(table.X.toarray()[rows], folder.counts["INT2"][["gene007", "gene002"]])
    with pytest.raises(KeyError, match="1 of 2 genes asked for are not in sample 'INT1': 'nothing'"):
        pk.io.read_hest(folder.path, "INT1", genes=["gene007", "nothing"])


@pytest.mark.parametrize("n", [1, 2])
def test_tiles_are_the_stored_patches(hest: Make, n: int) -> None:
    folder = hest(n)
    sdata = pk.io.read_hest(folder.path, [f"INT{i + 1}" for i in range(n)])
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    assert not sdata["table"].uns["pekasc"]["tiles"]["sections"]["INT1_spots"]["patches"]
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP, patches=True, key_added="stored")
    assert sdata["table"].uns["pekasc"]["stored"]["sections"]["INT1_spots"]["patches"]
    for key in ("tiles", "stored"):
        tiles = by_barcode(sdata, key)
        assert len(tiles) == sum(map(len, folder.patches.values()))
        for (name, barcode), tile in tiles.items():
            np.testing.assert_array_equal(tile, folder.patches[name][barcode])


def test_patches_are_enough(hest: Make) -> None:
    folder = hest(2, image=False)
    sdata = pk.io.read_hest(folder.path, ["INT1", "INT2"])
    assert not sdata.images
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    table = sdata["table"]
    for (name, barcode), tile in by_barcode(sdata).items():
        np.testing.assert_array_equal(tile, folder.patches[name][barcode])
    # what lies outside is known from the size that the metadata states
    with_image = pk.io.read_hest(hest(2).path, ["INT1", "INT2"])
    pk.pp.tile(with_image, tile_px=SIDE_PX, mpp=MPP)
    np.testing.assert_array_equal(table.obs["tile_inside"], with_image["table"].obs["tile_inside"])
    folder = hest(image=False)
    folder.edit_metadata("INT1", fullres_px_width=None)
    unknown = pk.io.read_hest(folder.path, "INT1")
    pk.pp.tile(unknown, tile_px=SIDE_PX, mpp=MPP)
    assert unknown["table"].obs["tile_inside"].isna().all()
    assert len(by_barcode(unknown)) == len(folder.patches["INT1"])


def test_every_tool_works_on_patches(hest: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = hest(2, image=False)
    sdata = pk.io.read_hest(folder.path, ["INT1", "INT2"])
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    pk.tl.embed_tiles(sdata, "tiny", progress=False, compute={"device": "cpu"})
    assert np.isfinite(sdata["table"].obsm["X_tiny"]).all()
    with caplog.at_level(HINT, logger="pekasc"):
        adapter = pk.tl.fit_adapter(
            sdata,
            train=["INT1_spots"],
            method=None,
            progress=False,
            genes=["gene000", "gene001"],
            compute={"device": "cpu"},
        )
    # which have nothing around them
    assert adapter.fields_um == ()
    assert "Field of view: the tile alone, since 448 um cannot be read: " in caplog.text
    assert "has stored patches and no image: nothing beyond" in caplog.text
    pk.tl.predict_expression(sdata, adapter, progress=False, compute={"device": "cpu"})
    trained = sdata["table"].obs["peka_train"].to_numpy(dtype=bool)
    np.testing.assert_array_equal(trained, sdata["table"].obs["section"] == "INT1")
    assert len(pk.tl.evaluate(sdata)) == 2
    pk.pl.tiles(sdata, n=2)
    pk.pl.expression(sdata, "gene000")
    # the same tissue with its image is known as what the adapter was trained on
    again = pk.io.read_hest(hest(1).path, "INT1")
    pk.tl.predict_expression(again, adapter, progress=False, compute={"device": "cpu"})
    assert again["table"].obs["peka_train"].all()


def test_wider_tiles_than_the_stored_patches_come_from_the_image(hest: Make) -> None:
    how: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
    both = pk.io.read_hest(hest().path, "INT1")
    pk.pp.tile(both, tile_px=SIDE_PX, mpp=MPP, patches=True)
    pk.tl.embed_tiles(both, "tiny", readout={"depth": 1, "fields_um": 2 * SIDE_PX * MPP}, **how)
    pk.pp.tile(both, tile_px=SIDE_PX, mpp=2 * MPP, patches=False, key_added="wide")
    pk.tl.embed_tiles(both, "tiny", key="wide", key_added="wide_features", readout={"depth": 1}, **how)
    features, wide = both["table"].obsm["X_tiny"], both["table"].obsm["wide_features"]
    tiled = ~np.isnan(features[:, 0])
    np.testing.assert_allclose(features[tiled, wide.shape[1] :], wide[tiled], atol=1e-5)
    patches = pk.io.read_hest(hest(image=False).path, "INT1")
    pk.pp.tile(patches, tile_px=SIDE_PX, mpp=MPP)
    with pytest.raises(ValueError, match="has stored patches and no image: nothing beyond"):
        pk.tl.embed_tiles(patches, "tiny", readout={"fields_um": 2 * SIDE_PX * MPP}, **how)


def test_patches_are_averaged_down(hest: Make) -> None:
    folder = hest(image=False)
    sdata = pk.io.read_hest(folder.path, "INT1")
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    for (name, barcode), tile in by_barcode(sdata).items():
        patch = folder.patches[name][barcode].reshape(28, 4, 28, 4, 3).mean(axis=(1, 3))
        assert np.abs(tile - patch).max() <= 0.501
    pk.pp.tile(sdata, tile_px=64, mpp=1.75)  # no whole factor
    assert pk.get.tiles(sdata).shape == (len(folder.patches["INT1"]), 64, 64, 3)


def test_patches_of_another_field_of_view(hest: Make) -> None:
    sdata = pk.io.read_hest(hest(image=False).path, "INT1")
    with pytest.raises(ValueError, match=r"'INT1_spots' show 112 um, the tiles are to show 56 um .*take `mpp=1`"):
        pk.pp.tile(sdata, tile_px=112, mpp=0.5)
    assert "tiles" not in sdata["table"].uns["pekasc"]


def test_spots_without_a_patch_get_no_tile(hest: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = hest(image=False)
    file = folder.file("patches", "INT1")
    with h5py.File(file) as h5:
        left_out = h5["barcode"][:3, 0].astype(str)
        kept = {name: h5[name][3:] for name in h5}
    rewrite_patches(file, **kept)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_hest(folder.path, "INT1")
    n = len(folder.barcodes["INT1"])
    assert f"{n - 3} of {n} spots have a stored patch of 112 px (112 um)" in caplog.text
    with pytest.warns(UserWarning, match=f"3 of {n} spots have no stored patch and get no tile"):
        pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    obs = sdata["table"].obs
    assert set(obs["barcode"][obs["tile_inside"].isna()]) == set(left_out)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once is enough: no call can tile them
        tiles = by_barcode(sdata)
    assert not {barcode for _, barcode in tiles} & set(left_out)
    for (name, barcode), tile in tiles.items():
        np.testing.assert_array_equal(tile, folder.patches[name][barcode])


def test_a_table_that_was_cut_and_reordered_keeps_its_patches(hest: Make) -> None:
    folder = hest(image=False)
    sdata = pk.io.read_hest(folder.path, "INT1")
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    table = sdata["table"]
    keep = np.random.default_rng(0).permutation(table.n_obs)[:20]
    del sdata.tables["table"]
    sdata.tables["table"] = table[keep].copy()
    tiles = by_barcode(sdata)
    assert len(tiles) == 20
    for (name, barcode), tile in tiles.items():
        np.testing.assert_array_equal(tile, folder.patches[name][barcode])


@pytest.mark.parametrize("image", [True, False])
def test_round_trip(hest: Make, tmp_path: Path, image: bool) -> None:
    folder = hest(2, image=image)
    sdata = pk.io.read_hest(folder.path, ["INT1", "INT2"])
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    before = pk.get.tiles(sdata).values
    sdata.write(tmp_path / "x.zarr")
    back = spatialdata.read_zarr(tmp_path / "x.zarr")
    np.testing.assert_array_equal(pk.get.tiles(back).values, before)
    barcodes = sdata["table"].obs["barcode"]
    # on disk they are categories; pandas 3 has a type for strings
    pd.testing.assert_series_equal(back["table"].obs["barcode"].astype(barcodes.dtype), barcodes)
    pk.pp.tile(back, tile_px=56, mpp=2.0, patches=True)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0, patches=True)
    np.testing.assert_array_equal(pk.get.tiles(back).values, pk.get.tiles(sdata).values)
    assert back["table"].uns["pekasc"]["hest"] == sdata["table"].uns["pekasc"]["hest"]


def test_images_are_read_where_tiles_lie(hest: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small = hest().pixels["INT1"]
    pixels = np.full((4000, 4000, 3), 255, np.uint8)
    pixels[: small.shape[0], : small.shape[1]] = small
    folder = hest(pixels=pixels)
    read: list[tuple[int, int]] = []
    original = _tiff._TiffLevel.__getitem__

    def counted(self: Any, index: Any) -> np.ndarray:
        out = original(self, index)
        read.append((self.level, out.size))
        return out

    monkeypatch.setattr(_tiff._TiffLevel, "__getitem__", counted)
    sdata = pk.io.read_hest(folder.path, "INT1")
    assert not read
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    assert {level for level, _ in read} == {2}  # a coarse picture, to look for tissue
    read.clear()
    tiles: list[tuple[int, int]] = []
    decode = _tiff._TiledTiffLevel.read_chunk

    def one_tile(self: Any, y: int, x: int) -> np.ndarray:
        tiles.append((y, x))
        return decode(self, y, x)

    monkeypatch.setattr(_tiff._TiledTiffLevel, "read_chunk", one_tile)
    pk.get.tiles(sdata).compute()
    assert not read and len(tiles) == len(set(tiles))  # each tile of the file once, and none through zarr
    edge = -(-max(small.shape[:2]) // 256)
    assert 1 < len(tiles) <= edge**2 and np.max(tiles) < edge


def test_lazy_images_travel_to_other_processes(hest: Make) -> None:
    folder = hest()
    level = _tiff.tiff_levels(folder.file("wsis", "INT1"))[0]
    again = pickle.loads(pickle.dumps(level))
    _tiff._opened_file.cache_clear()
    np.testing.assert_array_equal(
        np.moveaxis(again[:, 10:90, 5:300].compute(), 0, -1), folder.pixels["INT1"][10:90, 5:300]
    )


def test_jpeg_tiles(hest: Make) -> None:
    folder = hest(jpeg=True)
    sdata = pk.io.read_hest(folder.path, "INT1")
    level = np.moveaxis(np.asarray(spatialdata.get_pyramid_levels(sdata.images["INT1_he"], n=0)), 0, -1)
    assert np.abs(level.astype(float) - folder.pixels["INT1"]).mean() < 3  # in RGB, not in YCbCr


@pytest.mark.parametrize("kind", ["one level", "alpha", "planar", "strips"])
def test_kinds_of_tiff(hest: Make, kind: str) -> None:
    folder = hest()
    pixels, file = folder.pixels["INT1"], folder.file("wsis", "INT1")
    if kind == "one level":
        tifffile.imwrite(file, pixels, tile=(128, 128), photometric="rgb", metadata=None)
    elif kind == "alpha":
        rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
        tifffile.imwrite(file, rgba, tile=(128, 128), photometric="rgb", extrasamples=["unassalpha"], metadata=None)
    elif kind == "planar":
        tifffile.imwrite(
            file, np.moveaxis(pixels, -1, 0), tile=(128, 128), photometric="rgb", planarconfig="separate", metadata=None
        )
    else:
        tifffile.imwrite(file, pixels, rowsperstrip=64, photometric="rgb", metadata=None)
    sdata = pk.io.read_hest(folder.path, "INT1")
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    for (name, barcode), tile in by_barcode(sdata).items():
        np.testing.assert_array_equal(tile, folder.patches[name][barcode])


def test_early_patches(hest: Make) -> None:
    folder = hest(image=False)
    file = folder.file("patches", "INT1")
    with h5py.File(file) as h5:
        data = {name: h5[name][:] for name in h5}
    with h5py.File(file, "w") as h5:  # no attributes, another spelling
        h5["img"], h5["coords"], h5["barcodes"] = data["img"], data["coords"], data["barcode"]
    sdata = pk.io.read_hest(folder.path, "INT1")
    assert sdata["table"].uns["pekasc"]["patches"]["INT1_spots"]["side_px"] == SIDE_PX
    with h5py.File(file, "a") as h5:
        del h5["coords"]
    with pytest.raises(ValueError, match="say neither how large they are .* early release"):
        pk.io.read_hest(folder.path, "INT1")


def test_patients(hest: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = hest(2)
    names = ["INT1", "INT2"]

    def patients(**kwargs: Any) -> list[str]:
        table = pk.io.read_hest(folder.path, names, **kwargs)["table"]
        return list(table.obs["patient"].cat.categories)

    folder.edit_metadata("INT2", patient="Patient 1")
    assert patients() == ["Patient 1"]
    folder.edit_metadata("INT2", dataset_title="Others")
    assert patients() == ["Patient 1 (Phantoms)", "Patient 1 (Others)"]
    folder.edit_metadata("INT2", patient=float("nan"))
    assert patients() == ["Patient 1", "INT2"]
    assert "metadata of INT2 name no patient" in caplog.text
    assert patients(patient={"INT2": "B"}) == ["Patient 1", "B"]
    with pytest.raises(KeyError, match=r"`patient` names \['INT3'\]"):
        patients(patient={"INT3": "B"})
    with pytest.raises(ValueError, match=r"`patient` is empty for \['INT2'\]"):
        patients(patient={"INT2": None})


@pytest.mark.parametrize("key", ["spot_diameter", "inter_spot_dist", "fullres_px_width"])
def test_metadata_that_are_no_numbers(hest: Make, key: str) -> None:
    folder = hest()
    folder.edit_metadata("INT1", **{key: "about 100"})
    with pytest.raises(ValueError, match=f"sample 'INT1': '{key}' must be a positive number, got 'about 100'"):
        pk.io.read_hest(folder.path, "INT1")


def test_gene_names_that_repeat_are_numbered(hest: Make) -> None:
    folder = hest(genes=["gene000"] * 2 + [f"gene{i:03d}" for i in range(2, 20)])
    assert list(pk.io.read_hest(folder.path, "INT1")["table"].var_names[:3]) == ["gene000", "gene000-1", "gene002"]


def test_pixel_size_is_checked_against_the_pitch(hest: Make) -> None:
    folder = hest(patches=False)
    folder.edit_metadata("INT1", pixel_size_um_estimated=1.05)
    with pytest.raises(ValueError, match=r"disagree: 1\.05 um from the metadata .*, 1 um from the pitch .*\(100 um\)"):
        pk.io.read_hest(folder.path, "INT1")
    with pytest.warns(UserWarning, match="disagree: 1.05 um.*The metadata's pixel size is taken"):
        sdata = pk.io.read_hest(folder.path, "INT1", strict=False)
    assert sdata["table"].uns["pekasc"]["image_mpp"] == {"INT1_he": 1.05}
    # an array of another pitch, as some of HEST-1k are
    folder.edit_metadata("INT1", inter_spot_dist=105.0)
    pk.io.read_hest(folder.path, "INT1")
    # indices that are no grid
    folder.edit_metadata(
        "INT1", inter_spot_dist=100.0, pixel_size_um_estimated=1.0, st_technology="Spatial Transcriptomics"
    )
    with pytest.raises(ValueError, match="cannot be checked against the spots' pitch.*do not fit an array of type"):
        pk.io.read_hest(folder.path, "INT1")


def test_pixel_size_of_bins(hest: Make, caplog: pytest.LogCaptureFixture) -> None:
    x, y = np.meshgrid(100 + 80.0 * np.arange(8), 90 + 80.0 * np.arange(8))
    centres = np.column_stack([x.ravel(), y.ravel()])
    n = len(hest().centres["INT1"])
    keep = np.sort(np.random.default_rng(0).permutation(64)[:n])
    folder = hest(patches=False, centres=centres[keep])
    folder.edit_metadata("INT1", st_technology="Xenium", inter_spot_dist=80.0)
    pk.io.read_hest(folder.path, "INT1")
    folder.edit_metadata("INT1", inter_spot_dist=100.0)
    with pytest.raises(ValueError, match=r"disagree: 1 um from the metadata .*, 1\.25 um from the pitch"):
        pk.io.read_hest(folder.path, "INT1")
    folder.edit_metadata("INT1", inter_spot_dist=None)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.io.read_hest(folder.path, "INT1")
    assert "names no pitch; its pixel size is not checked" in caplog.text
    rng = np.random.default_rng(0)
    folder = hest(patches=False, centres=rng.uniform(100, 700, (n, 2)))
    folder.edit_metadata("INT1", st_technology="Xenium")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.io.read_hest(folder.path, "INT1")
    assert "lie on no square grid" in caplog.text


def test_other_contradictions(hest: Make) -> None:
    folder = hest()
    folder.edit_metadata("INT1", fullres_px_width=1600, fullres_px_height=1600)
    with pytest.raises(ValueError, match="image has 800 x 800 px, by the metadata 1600 x 1600"):
        pk.io.read_hest(folder.path, "INT1")
    folder = hest()
    with h5py.File(folder.file("patches", "INT1"), "a") as h5:
        h5["img"].attrs["pixel_size"] = 0.5
    with pytest.raises(ValueError, match=r"disagree: 1 um from the metadata .*, 0\.5 um from the patches"):
        pk.io.read_hest(folder.path, "INT1")


def test_pp_tile_holds_on_to_the_recorded_pixel_size(hest: Make) -> None:
    sdata = pk.io.read_hest(hest(image=False).path, "INT1")
    with pytest.raises(ValueError, match="disagree: 0.5 um from `image_mpp`"):
        pk.pp.tile(sdata, image_mpp=0.5)
    with pytest.raises(ValueError, match="`um_coordinate_system='INT1'` needs an image"):
        pk.pp.tile(sdata, um_coordinate_system="INT1")
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP, array="visium")


def test_spots_off_the_image(hest: Make) -> None:
    folder = hest(patches=False)
    edit_expression(folder.file("st", "INT1"), lambda a: a.obsm.update(spatial=a.obsm["spatial"] + 2000))
    sdata = pk.io.read_hest(folder.path, "INT1")
    with pytest.raises(
        ValueError, match="coordinates seem to be of another scale: x 2050 .* 0 of 53 centres lie on tissue"
    ):
        pk.pp.tile(sdata)


def test_samples_that_are_not_there(hest: Make, tmp_path: Path) -> None:
    folder = hest(2)
    with pytest.raises(KeyError, match=r"Samples \['TENX1'\] not found .* Samples there: \['INT1', 'INT2'\]"):
        pk.io.read_hest(folder.path, ["INT1", "TENX1"])
    with pytest.raises(ValueError, match=r"names \['INT1'\] more than once"):
        pk.io.read_hest(folder.path, ["INT1", "INT1"])
    with pytest.raises(ValueError, match="`sample_id` is empty"):
        pk.io.read_hest(folder.path, [])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        pk.io.read_hest(tmp_path / "nothing", "INT1")
    with pytest.raises(FileNotFoundError, match="not laid out like HEST-1k"):
        pk.io.read_hest(folder.path / "st", "INT1")


def test_files_that_are_missing(hest: Make) -> None:
    folder = hest()
    folder.file("wsis", "INT1").unlink()
    folder.file("patches", "INT1").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither an image, .*INT1\.tif.*, nor patches, .*INT1\.h5"):
        pk.io.read_hest(folder.path, "INT1")
    folder.file("metadata", "INT1").unlink()
    with pytest.raises(FileNotFoundError, match=r"no metadata: .*INT1\.json"):
        pk.io.read_hest(folder.path, "INT1")


@pytest.mark.parametrize("kind", ["st", "wsis", "patches", "metadata"])
@pytest.mark.parametrize("how", ["cut short", "rubbish"])
def test_damaged_files(hest: Make, kind: str, how: str) -> None:
    folder = hest()
    file = folder.file(kind, "INT1")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if how == "cut short" else b"rubbish" * 100)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        pk.io.read_hest(folder.path, "INT1")


def test_a_damaged_patch_is_named(hest: Make) -> None:
    folder = hest(image=False)
    file = folder.file("patches", "INT1")
    with h5py.File(file) as h5:
        data, attrs = {name: h5[name][:] for name in h5}, dict(h5["img"].attrs)
    with h5py.File(file, "w") as h5:
        img = h5.create_dataset("img", data=data["img"], chunks=(1, SIDE_PX, SIDE_PX, 3), fletcher32=True)
        img.attrs.update(attrs)
        h5["coords"], h5["barcode"] = data["coords"], data["barcode"]
        where = img.id.get_chunk_info_by_coord((5, 0, 0, 0)).byte_offset
    with file.open("r+b") as raw:
        raw.seek(where + 50)
        raw.write(b"\0\1\2\3" * 8)
    sdata = pk.io.read_hest(folder.path, "INT1")
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    with pytest.raises(OSError, match=r"Patches \d+ to \d+ of .*INT1\.h5' cannot be read"):
        pk.get.tiles(sdata).compute()


def test_a_damaged_tile_of_the_image_is_named(hest: Make) -> None:
    folder = hest(jpeg=True, patches=False)
    file = folder.file("wsis", "INT1")
    with tifffile.TiffFile(file) as tiff:
        where, size = tiff.pages[0].dataoffsets[5], tiff.pages[0].databytecounts[5]
    with file.open("r+b") as raw:
        raw.seek(where)
        raw.write(bytes(size))
    sdata = pk.io.read_hest(folder.path, "INT1")
    with pytest.raises(OSError, match=r"INT1\.tif' cannot be read at level 0, rows 0:800, columns 0:800"):
        pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)


def test_image_that_is_no_rgb(hest: Make) -> None:
    folder = hest()
    tifffile.imwrite(folder.file("wsis", "INT1"), np.zeros((800, 800), np.uint16))
    with pytest.raises(ValueError, match="must be RGB of uint8, but has axes YX"):
        pk.io.read_hest(folder.path, "INT1")


def test_barcodes_that_do_not_fit(hest: Make) -> None:
    folder = hest()
    file = folder.file("patches", "INT1")
    with h5py.File(file) as h5:
        barcodes, coords = h5["barcode"][:], h5["coords"][:]
    strange = barcodes.copy()
    strange[0] = b"strange"
    rewrite_patches(file, barcode=strange)
    with pytest.raises(ValueError, match="1 of .* patches have a barcode that no spot has: 'strange'"):
        pk.io.read_hest(folder.path, "INT1")
    twice = barcodes.copy()
    twice[0] = twice[1]
    rewrite_patches(file, barcode=twice)
    with pytest.raises(ValueError, match="duplicate barcodes"):
        pk.io.read_hest(folder.path, "INT1")
    rewrite_patches(file, barcode=barcodes[:-1])
    with pytest.raises(ValueError, match=r"hold \d+ images and \d+ barcodes"):
        pk.io.read_hest(folder.path, "INT1")
    rewrite_patches(file, barcode=np.roll(barcodes, 1, axis=0))
    with pytest.raises(ValueError, match="patches do not lie around their spots: that of barcode"):
        pk.io.read_hest(folder.path, "INT1")
    rewrite_patches(file, barcode=barcodes, coords=coords + SIDE_PX // 2)
    with pytest.raises(ValueError, match="has its middle 56 px from its spot"):
        pk.io.read_hest(folder.path, "INT1")
    rewrite_patches(file, img=...)
    with pytest.raises((ValueError, KeyError), match="needed are 'img' and 'barcode'"):
        pk.io.read_hest(folder.path, "INT1")


def test_tables_are_checked_as_everywhere(hest: Make) -> None:
    file = hest().file("st", "INT1")

    def changed(column: str, value: Any) -> Path:
        folder = hest()
        edit_expression(file, lambda a: a.obs.__setitem__(column, [value, *a.obs[column].iloc[1:].astype(float)]))
        return folder.path

    with pytest.raises(ValueError, match="Section 'INT1': `obs.'in_tissue'.` must be 0 or 1, or boolean, but has nan"):
        pk.io.read_hest(changed("in_tissue", np.nan), "INT1")
    with pytest.raises(
        ValueError, match="cannot be checked .* `obs.'array_row'.` .* must hold grid indices, but has nan"
    ):
        pk.io.read_hest(changed("array_row", np.nan), "INT1")
    with pytest.warns(UserWarning, match="must hold grid indices"):
        pk.io.read_hest(changed("array_row", np.nan), "INT1", strict=False)
    folder = hest()
    edit_expression(file, lambda a: a.obsm.update(spatial=a.obsm["spatial"] * [np.nan, 1]))
    with pytest.raises(ValueError, match="Sample 'INT1': 53 of 53 spot centres are NaN or infinite"):
        pk.io.read_hest(folder.path, "INT1")


def test_nothing_outside_of_the_folder_is_read(hest: Make, tmp_path: Path) -> None:
    for kind, name in (("st", "X/data"), ("st", "obs/_index"), ("patches", "barcode"), ("patches", "img")):
        folder = hest()
        file = folder.file(kind, "INT1")
        secret = tmp_path / "secret.h5"
        file.rename(secret)
        with h5py.File(secret) as there, h5py.File(file, "w") as h5:
            for part in there:
                there.copy(part, h5)
            del h5[name]
            h5[name] = h5py.ExternalLink(str(secret), name)
        with pytest.raises(ValueError, match=rf"INT1.* cannot be read: '{name}' is a link to somewhere else"):
            pk.io.read_hest(folder.path, "INT1")


def test_tables_that_do_not_fit(hest: Make) -> None:
    folder = hest()
    file = folder.file("st", "INT1")

    def repeat(adata: anndata.AnnData) -> None:
        names = adata.obs_names.to_numpy().copy()
        names[1] = names[0]
        adata.obs_names = names

    def drop(adata: anndata.AnnData) -> None:
        del adata.obsm["spatial"]

    edit_expression(file, repeat)
    with pytest.raises(ValueError, match="Sample 'INT1' has duplicate barcodes"):
        pk.io.read_hest(folder.path, "INT1")
    edit_expression(hest().file("st", "INT1"), drop)
    with pytest.raises(ValueError, match="no spot centres"):
        pk.io.read_hest(folder.path, "INT1")
    folder = hest(2)
    edit_expression(folder.file("st", "INT2"), lambda a: setattr(a, "var_names", [f"m{g}" for g in a.var_names]))
    with pytest.raises(ValueError, match=r"No gene is in all samples.*INT2 \(Homo sapiens\): 'mgene000'"):
        pk.io.read_hest(folder.path, ["INT1", "INT2"])
    folder = hest()
    folder.edit_metadata("INT1", pixel_size_um_estimated=None)
    with pytest.raises(ValueError, match="has no pixel size"):
        pk.io.read_hest(folder.path, "INT1")


def test_patches_that_went_away(hest: Make, tmp_path: Path) -> None:
    folder = hest(image=False)
    sdata = pk.io.read_hest(folder.path, "INT1")
    pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    file = folder.file("patches", "INT1")
    content = file.read_bytes()
    moved = tmp_path / "moved.h5"
    file.rename(moved)
    with pytest.raises(FileNotFoundError, match=r"is not there any more.*write the new place to"):
        pk.get.tiles(sdata)
    sdata["table"].uns["pekasc"]["patches"]["INT1_spots"]["path"] = str(moved)
    assert by_barcode(sdata)
    file.write_bytes(content)
    with h5py.File(moved, "a") as h5:
        h5["img"][0] = 0
    with pytest.raises(ValueError, match="not those that were read"):
        pk.get.tiles(sdata)


def test_patches_that_no_reader_recorded(scene: Callable[..., SpatialData]) -> None:
    with pytest.raises(KeyError, match="no stored patches are recorded for section 'A_spots'"):
        pk.pp.tile(scene(), um_coordinate_system="um", patches=True)


def test_spots_that_moved_leave_their_patches(hest: Make) -> None:
    sdata = pk.io.read_hest(hest(image=False).path, "INT1")
    shift = spatialdata.transformations.Translation([30, 0], axes=("x", "y"))
    spatialdata.transformations.set_transformation(sdata.shapes["INT1_spots"], shift, "INT1")
    with pytest.raises(ValueError, match="patches do not lie around their spots"):
        pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
    with pytest.raises(ValueError, match="are not in the coordinate system of stored patches"):
        spatialdata.transformations.remove_transformation(sdata.shapes["INT1_spots"], "INT1")
        spatialdata.transformations.set_transformation(sdata.shapes["INT1_spots"], shift, "other")
        pk.pp.tile(sdata, tile_px=SIDE_PX, mpp=MPP)
