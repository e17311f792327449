"""Slides in their files, read by `io.read_slide` or by wsidata: the tiles are those of the pixels."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
import wsidata
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

import pekasc as pk
from pekasc._sections._slides import images_of
from pekasc.io._tiff import tiff_levels
from pekasc.tiling import ImagePyramid, TileGeometry, TileReader, TileSpec
from pekasc.tiling._chunks import chunk_source

pytestmark = pytest.mark.filterwarnings("ignore:.*tiles show no tissue")
MPP = 0.5
CENTRES = np.random.default_rng(0).uniform(150, 900, (12, 2))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=MPP)
    image = sd.get_pyramid_levels(next(iter(sdata.images.values())), n=0)
    return np.ascontiguousarray(np.moveaxis(np.asarray(image), 0, -1)[:1100, :1050])


def write(file: Path, pixels: np.ndarray, n_levels: int = 3, **tags: Any) -> Path:
    with tifffile.TiffWriter(file, bigtiff=True) as tiff:
        for level in range(n_levels):
            h, w = (s // 2**level for s in pixels.shape[:2])
            small = pixels[: h * 2**level, : w * 2**level].reshape(h, 2**level, w, 2**level, -1).mean(axis=(1, 3))
            tiff.write(
                np.rint(small).astype(np.uint8), photometric="rgb", tile=(256, 256), compression="zlib",
                subfiletype=int(level > 0), metadata=None, **(tags if level == 0 else {}),
            )  # fmt: skip
    return file


def with_spots(sdata: SpatialData, system: str) -> SpatialData:
    shapes = ShapesModel.parse(CENTRES, geometry=0, radius=20, transformations={system: Identity()})
    obs = pd.DataFrame(
        {"region": pd.Categorical(["spots"] * 12), "spot_id": np.arange(12)}, index=[f"s{i}" for i in range(12)]
    )
    table = AnnData(np.ones((12, 3), np.float32), obs=obs)
    sdata.shapes["spots"] = shapes
    sdata.tables["table"] = TableModel.parse(table, region="spots", region_key="region", instance_key="spot_id")
    return sdata


def expected(pixels: np.ndarray, **how: Any) -> np.ndarray:
    image = Image2DModel.parse(np.moveaxis(pixels, -1, 0), dims=("c", "y", "x"), transformations={"s": Identity()})
    sdata = with_spots(SpatialData(images={"he": image}), "s")
    pk.pp.tile(sdata, image_mpp=MPP, **how)
    return pk.get.tiles(sdata).to_numpy()


PER_CM = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}


@pytest.mark.parametrize(
    ("tags", "mpp"),
    [
        (PER_CM, MPP),
        ({"resolution": (25400 / 0.25, 25400 / 0.25), "resolutionunit": "INCH"}, 0.25),
        ({"description": "Aperio Image Library v10\nAppMag = 20|MPP = 0.4990|Left = 1"}, 0.499),
        ({}, None),
    ],
)
def test_the_pixel_size_is_what_the_file_says(
    tmp_path: Path, pixels: np.ndarray, tags: dict[str, Any], mpp: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    sdata = pk.io.read_slide(write(tmp_path / "s.1.tif", pixels[:300, :300], 1, **tags))
    assert list(sdata.images) == ["s.1"]
    if mpp is None:
        assert "does not say its pixel size" in caplog.text and not sdata.attrs
    else:
        assert sdata.attrs["pekasc"]["image_mpp"]["s.1"] == pytest.approx(mpp, rel=1e-4)


def test_two_files_have_two_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    files = ("a.1.tif", "a.2.tif", "a 1.tif", "a(1.tif", "ü.ome.tif")
    with caplog.at_level(logging.INFO, logger="pekasc"):
        names = [next(iter(pk.io.read_slide(write(tmp_path / file, white, 1, **PER_CM)).images)) for file in files]
    assert len(set(names)) == 5 and {"a.1", "a.2", "ü"} < set(names)
    assert "slide a 1.tif: its name is 'a_1_" in caplog.text and "since SpatialData cannot store 'a 1'" in caplog.text
    sdata = pk.io.read_slide(tmp_path / "ü.ome.tif")
    sdata.write(tmp_path / "s.zarr")
    assert list(sd.read_zarr(tmp_path / "s.zarr").images) == ["ü"]


def test_the_pixel_size_of_an_ome_tiff(tmp_path: Path, pixels: np.ndarray) -> None:
    file = tmp_path / "a.ome.tif"
    meta = {"axes": "YXS", "PhysicalSizeX": 325, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 325}
    meta["PhysicalSizeYUnit"] = "nm"
    tifffile.imwrite(file, pixels[:256, :256], photometric="rgb", tile=(128, 128), metadata=meta)
    sdata = pk.io.read_slide(file)
    assert sdata.attrs["pekasc"]["image_mpp"] == {"a": pytest.approx(0.325)}


@pytest.mark.parametrize("how", [{"tile_px": 64, "mpp": 0.5}, {"tile_px": 48, "mpp": 1.1}, {"tile_px": 64, "mpp": 0.4}])
def test_tiles_of_a_slide_are_those_of_its_pixels(tmp_path: Path, pixels: np.ndarray, how: dict[str, Any]) -> None:
    sdata = with_spots(pk.io.read_slide(write(tmp_path / "s.tif", pixels, **PER_CM)), "s")
    pk.pp.tile(sdata, **how)
    assert sdata["table"].uns["pekasc"]["tiles"]["sections"]["spots"]["source"] == "slide"
    difference = np.abs(pk.get.tiles(sdata).to_numpy().astype(int) - expected(pixels, **how))
    # level 0 to the last grey level; from a coarser level, the mean of means
    assert difference.max() == 0 if how["mpp"] < 1 else difference.mean() < 2


WAYS: dict[str, dict[str, Any]] = {
    "jpeg": {"compression": "jpeg"},
    "jpeg of YCbCr": {"compression": "jpeg", "photometric": "rgb", "compressionargs": {"outcolorspace": "ycbcr"}},
    "jpeg 2000": {"compression": "jpeg2000"},
    "with alpha": {"extrasamples": ["unassalpha"]},
    "predictor": {"compression": "zlib", "predictor": True},
    "not compressed": {"compression": None},
    "planes": {"planarconfig": "separate", "tile": (64, 64)},
    "strips": {"tile": None, "rowsperstrip": 50},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_every_kind_of_tiff_gives_the_tiles_that_tifffile_gives(
    tmp_path: Path, pixels: np.ndarray, how: dict[str, Any]
) -> None:
    image = pixels[:500, :430]
    if "extrasamples" in how:
        image = np.concatenate([image, image[..., :1]], axis=-1)
    if how.get("planarconfig") == "separate":
        image = np.moveaxis(image, -1, 0)
    options = {"photometric": "rgb", "tile": (128, 112), "metadata": None} | how
    tifffile.imwrite(tmp_path / "s.tif", image, **options)
    expected = tifffile.imread(tmp_path / "s.tif")
    expected = np.moveaxis(expected, 0, -1) if expected.shape[0] == 3 else expected
    if "extrasamples" in how:
        share = expected[..., 3:].astype(np.float32) / 255
        expected = np.rint(share * expected[..., :3] + (1 - share) * 255).astype(np.uint8)
    level = tiff_levels(tmp_path / "s.tif")[0]
    assert (chunk_source(level) is None) == (options["tile"] is None)
    centres = np.array([[100.0, 120.0], [385.0, 470.0], [425.0, 495.0]])
    geometry = TileGeometry(centres, np.eye(2), TileSpec(60, 1.0))
    for array in (level, pickle.loads(pickle.dumps(level))):
        tiles = TileReader(ImagePyramid([array], [(1, 1)]), geometry).read(np.arange(3))
        assert np.array_equal(tiles[0], expected[90:150, 70:130])
        assert np.array_equal(tiles[1], expected[440:500, 355:415])
        assert np.array_equal(tiles[2, :35, :35], expected[465:500, 395:430])
        assert (tiles[2, 35:] == 255).all() and (tiles[2, :, 35:] == 255).all()


def test_the_largest_picture_is_the_slide(tmp_path: Path, pixels: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "s.ome.tif"
    with tifffile.TiffWriter(file, ome=True) as tiff:
        for image, size in ((pixels[:64, :96], 7.0), (pixels[:512, :400], 0.5)):
            meta = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
            tiff.write(image, photometric="rgb", tile=(64, 64), metadata=meta)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_slide(file)
    assert "has 2 scenes: 0 'Image0' 96 x 64 px at 7 um per pixel; 1 'Image1' 400 x 512 px at 0.5 um" in caplog.text
    assert np.array_equal(np.moveaxis(np.asarray(sdata["s"]), 0, -1), pixels[:512, :400])
    assert sdata.attrs["pekasc"]["image_mpp"] == {"s": 0.5}


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"photometric": "separated", "extrasamples": ()}, "SEPARATED"),
        ({"photometric": "cielab"}, "CIELAB"),
        ({"photometric": "ycbcr", "ycbcrsubsampling": (1, 1)}, "YCBCR"),
    ],
)
def test_other_colours_are_refused(tmp_path: Path, pixels: np.ndarray, how: dict[str, Any], what: str) -> None:
    image = pixels[:128, :128]
    image = np.concatenate([image, image[..., :1]], axis=-1) if what == "SEPARATED" else image
    how = {k: v for k, v in how.items() if k != "ycbcrsubsampling"}
    tifffile.imwrite(tmp_path / "s.tif", image, tile=(64, 64), metadata=None, **how)
    with pytest.raises(ValueError, match=f"not red, green and blue: {what}.*Convert it to RGB"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_what_was_not_scanned_is_white(tmp_path: Path, pixels: np.ndarray) -> None:
    file = write(tmp_path / "s.tif", pixels, 1, **PER_CM)
    with tifffile.TiffFile(file, mode="r+") as tiff:
        sizes = list(tiff.pages[0].databytecounts)
        sizes[0] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(sizes)
    level = tiff_levels(file)[0]
    geometry = TileGeometry([[100.0, 100.0]], np.eye(2), TileSpec(40, 1.0))
    assert (TileReader(ImagePyramid([level], [(1, 1)]), geometry).read(np.array([0])) == 255).all()


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path, pixels: np.ndarray) -> None:
    file = write(tmp_path / "s.tif", pixels, 1)
    level = tiff_levels(file)[0]
    write(file, pixels[:600], 1)
    with pytest.raises(OSError, match="has changed since it was read: read it again"):
        geometry = TileGeometry([[100.0, 100.0]], np.eye(2), TileSpec(40, 1.0))
        TileReader(ImagePyramid([level], [(1, 1)]), geometry).read(np.array([0]))


def test_few_files_are_open(tmp_path: Path, pixels: np.ndarray) -> None:
    geometry = TileGeometry([[50.0, 50.0]], np.eye(2), TileSpec(20, 1.0))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else pytest.skip("no /proc")
    for i in range(40):
        level = tiff_levels(write(tmp_path / f"{i}.tif", pixels[:200, :200], 1))[0]
        TileReader(ImagePyramid([level], [(1, 1)]), geometry).read(np.array([0]))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 17


def test_a_damaged_tile_of_a_slide_is_named(tmp_path: Path, pixels: np.ndarray) -> None:
    file = write(tmp_path / "s.tif", pixels, **PER_CM)
    with tifffile.TiffFile(file) as tiff:
        at = tiff.pages[0].dataoffsets[6]  # row 1, column 1 of five
    with file.open("r+b") as out:
        out.seek(at)
        out.write(b"not what zlib wrote")
    sdata = with_spots(pk.io.read_slide(file), "s")
    pk.pp.tile(sdata, tile_px=64, mpp=0.5, strict=False)
    with pytest.raises(
        OSError, match=r"Tile \d+ of section .* cannot be read: chunk \(1, 1\) of image level 0 .* tile 6 of .* damaged"
    ):
        pk.get.tiles(sdata).to_numpy()


def test_a_pixel_size_that_the_file_contradicts(tmp_path: Path, pixels: np.ndarray) -> None:
    sdata = with_spots(pk.io.read_slide(write(tmp_path / "s.tif", pixels, **PER_CM), name="he"), "he")
    with pytest.raises(ValueError, match="0.25 um from `image_mpp`, 0.5 um from the slide's own file"):
        pk.pp.tile(sdata, tile_px=32, image_mpp=0.25)
    given = pk.io.read_slide(tmp_path / "s.tif", image_mpp=0.25)
    assert given.attrs["pekasc"]["image_mpp"] == {"s": 0.25}


def test_the_pixel_size_survives_the_disk(tmp_path: Path, pixels: np.ndarray) -> None:
    pk.io.read_slide(write(tmp_path / "s.tif", pixels[:300, :300], 1, **PER_CM)).write(tmp_path / "s.zarr")
    sdata = with_spots(sd.read_zarr(tmp_path / "s.zarr"), "s")
    pk.pp.tile(sdata, tile_px=32, strict=False)
    assert sdata["table"].uns["pekasc"]["tiles"]["sections"]["spots"]["mpp"] == pytest.approx(MPP)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda f: None, FileNotFoundError, "slide .*s.tif' is not there"),
        (lambda f: f.write_text("no slide"), ValueError, "cannot be read as TIFF"),
        (lambda f: tifffile.imwrite(f, np.zeros((64, 64), np.uint16)), ValueError, "must be RGB of uint8"),
    ],
)
def test_what_is_no_slide(tmp_path: Path, make: Callable[[Path], Any], error: type[Exception], match: str) -> None:
    make(tmp_path / "s.tif")
    with pytest.raises(error, match=match):
        pk.io.read_slide(tmp_path / "s.tif")


def test_a_slide_behind_wsidata(tmp_path: Path, pixels: np.ndarray) -> None:
    file = write(tmp_path / "s.tif", pixels, **PER_CM)
    for attach in ({}, {"attach_thumbnail": True, "thumbnail_size": 200}, {"attach_images": True}):
        wsi = with_spots(wsidata.open_wsi(file, store=None, reader="openslide", **attach), "global")
        pk.pp.tile(wsi, tile_px=48, mpp=1.1)
        record = wsi["table"].uns["pekasc"]["tiles"]["sections"]["spots"]
        assert (record["image"], record["source"]) == ("wsi", "slide")
        difference = np.abs(pk.get.tiles(wsi).to_numpy().astype(int) - expected(pixels, tile_px=48, mpp=1.1))
        assert difference.mean() < 2
    pk.tl.embed_tiles(
        wsi, pk.models.Encoder("vit_tiny_patch16_224", weights="random"), progress=False, compute={"device": "cpu"}
    )
    assert np.isfinite(wsi["table"].obsm["X_vit_tiny_patch16_224"]).all()
    assert pickle.loads(pickle.dumps(pk.get.tiles(wsi)))[0].compute().shape == (48, 48, 3)


def test_a_slide_behind_wsidata_that_says_no_pixel_size(tmp_path: Path, pixels: np.ndarray) -> None:
    wsi = with_spots(wsidata.open_wsi(write(tmp_path / "s.tif", pixels), store=None, reader="openslide"), "global")
    with pytest.raises(ValueError, match="pixel size of image 'wsi' .* is not known"):
        pk.pp.tile(wsi, tile_px=48, mpp=1.0)
    wsi.set_mpp(0.5)
    pk.pp.tile(wsi, tile_px=48, mpp=1.0)
    with pytest.raises(ValueError, match="disagree: 1 um from `image_mpp`, 0.5 um from the slide's own file"):
        pk.pp.tile(wsi, tile_px=48, mpp=1.0, image_mpp={"wsi": 1.0})


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`path` must be the path of an image file, got an empty string"):
        pk.io.read_slide("")
    with pytest.raises(ValueError, match="is a folder"):
        pk.io.read_slide(tmp_path)
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ValueError, match=r"a\.zarr': read it with `spatialdata\.read_zarr`"):
        pk.io.read_slide(tmp_path / "a.zarr")


@pytest.mark.parametrize("attach", [False, True])
def test_what_was_not_scanned_is_white_behind_wsidata(tmp_path: Path, pixels: np.ndarray, attach: bool) -> None:
    file = write(tmp_path / "s.tif", pixels[:600, :600], 1, **PER_CM)
    with tifffile.TiffFile(file, mode="r+") as tiff:
        for code in (324, 325):
            values = list(tiff.pages[0].tags[code].value)
            values[0] = 0
            tiff.pages[0].tags[code].overwrite(values)
    wsi = wsidata.open_wsi(file, store=None, reader="openslide", attach_images=attach)
    slide = images_of(wsi)["wsi"]["scale0"]["image"].data
    assert (slide[:, :256, :256].compute() == 255).all()
    assert np.array_equal(slide.compute(), tiff_levels(file)[0].compute())
    assert np.array_equal(pickle.loads(pickle.dumps(slide))[:, :300, :300].compute(), slide[:, :300, :300].compute())
