"""pp.tile_grid: a slide without spots becomes a table of tiles on tissue, at any orientation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import shapely
import spatialdata as sd
from geopandas import GeoDataFrame
from scipy.ndimage import gaussian_filter
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel
from spatialdata.transformations import Affine, Identity, Scale

import pekasc as pk
from pekasc._keys import read_uns
from pekasc._sections import slide_section, tissue_of_slide
from pekasc.tiling import TileSpec

SIZE: dict[str, Any] = {"tile_px": 14, "mpp": 4.0}  # 56 um
ALL: dict[str, Any] = {"min_sharpness": None, "max_pen": None}


def slide_of(pixels: np.ndarray, **systems: Any) -> SpatialData:
    image = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations=systems or {"he": Identity()}, scale_factors=[2]
    )
    return SpatialData(images={"he": image}, attrs={"pekasc": {"image_mpp": {"he": 2.0}}})


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Return a slide of 2400 x 1600 um at 2 um per pixel: tissue in two places, a blurred part, and a stroke of ink."""
    rng = np.random.default_rng(0)
    out = np.full((3, 800, 1200), 244, np.uint8)
    texture = np.clip(rng.normal(0, 40, (1, 800, 1200)) + np.array([190, 110, 170])[:, None, None], 0, 255)
    out[:, 100:700, 100:500] = texture[:, 100:700, 100:500]
    out[:, 200:600, 700:1100] = texture[:, 200:600, 700:1100]
    blurred = gaussian_filter(out.astype(np.float32), (0, 2, 2))
    out[:, 210:320, 700:1100] = blurred[:, 210:320, 700:1100]
    out[:, 480:560, 720:1080] = np.array([20, 110, 60])[:, None, None]
    return out


@pytest.fixture
def slide(pixels: np.ndarray) -> SpatialData:
    return slide_of(pixels)


def on_tissue(table: Any) -> np.ndarray:
    x, y = table.obsm["spatial"].T
    return ((x > 100) & (x < 500) & (y > 100) & (y < 700)) | ((x > 700) & (x < 1100) & (y > 200) & (y < 600))


def test_tiles_on_tissue_in_focus_without_ink(slide: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.pp.tile_grid(slide, "he", **SIZE, stride_um=56)
    table = slide["grid"]
    assert table.n_vars == 0 and table.n_obs > 150 and on_tissue(table).all()
    assert (table.obs["tissue_fraction"] >= 0.5).all() and (table.obs["pen_fraction"] <= 0.1).all()
    record = read_uns(table, "grid")
    left_out = record["left_out"]
    assert record["n_candidates"] == table.n_obs + sum(left_out.values()) == 43 * 29
    # rows of blurred tiles, 14 or 15 in each, and of ink
    assert 35 <= left_out["out of focus"] <= 75 and 15 <= left_out["with pen marks"] <= 60
    y, x = table.obsm["spatial"][:, 1], table.obsm["spatial"][:, 0]
    assert not ((x > 700) & (y > 225) & (y < 305)).any() and not ((x > 720) & (y > 490) & (y < 550)).any()
    assert f"{left_out['out of focus']} out of focus" in caplog.text and "with too little tissue" in caplog.text
    assert list(slide.shapes) == ["he_grid", "he_grid_tiles"]
    tiles = pk.get.tiles(slide, table_name="grid")
    assert tiles.shape == (table.n_obs, 14, 14, 3) and tiles.attrs == {"mpp": 4.0, "tile_px": 14}
    # a tile shows the place that its row names
    k = int(np.argmin(np.hypot(x - 300, y - 400)))
    x0, y0 = np.round(table.obsm["spatial"][k]).astype(int) - 14
    direct = np.asarray(sd.get_pyramid_levels(slide["he"], n=0))[:, y0 : y0 + 28, x0 : x0 + 28].mean((1, 2))
    np.testing.assert_allclose(tiles[k].to_numpy().mean((0, 1)), direct, atol=3)


def test_none_keeps_all(slide: SpatialData) -> None:
    pk.pp.tile_grid(slide, "he", **SIZE, tissue=False, **ALL)
    table = slide["grid"]
    assert table.n_obs == 43 * 29 and table.obs[["tissue_fraction", "sharpness", "pen_fraction"]].isna().all(axis=None)
    assert (table.obs["tile_inside"] > 0.4).all()
    steps = np.diff(table.obs.loc[table.obs["grid_row"] == 0, "grid_col"])
    assert (steps == 1).all()
    np.testing.assert_allclose(np.diff(table.obsm["spatial"][:43, 0]), 28)


def test_the_same_call_twice_and_a_finer_grid_beside_it(slide: SpatialData, tmp_path: Path) -> None:
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL)
    first = slide["grid"].copy()
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL)
    np.testing.assert_array_equal(slide["grid"].obsm["spatial"], first.obsm["spatial"])
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, stride_um=40, shape="hexagon", table_added="fine")
    assert set(slide.shapes) == {"he_grid", "he_grid_tiles", "he_fine", "he_fine_tiles"}
    assert slide["fine"].n_obs > 2 * slide["grid"].n_obs
    assert len(shapely.get_coordinates(slide["he_fine"].geometry.iloc[0])) == 7
    slide.write(tmp_path / "slide.zarr")
    again = sd.read_zarr(tmp_path / "slide.zarr")
    np.testing.assert_array_equal(pk.get.tiles(again, table_name="fine"), pk.get.tiles(slide, table_name="fine"))


def test_a_turned_slide_has_tiles_along_its_coordinate_system(pixels: np.ndarray) -> None:
    c, s = np.cos(np.radians(30)), np.sin(np.radians(30))
    turn = Affine(np.array([[2 * c, -2 * s, 100], [2 * s, 2 * c, 50], [0, 0, 1]]), ("x", "y"), ("x", "y"))
    slide = slide_of(pixels, um=turn)
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, um_coordinate_system="um")
    assert on_tissue(slide["grid"]).mean() > 0.97  # but for those half on it
    cells = sd.transform(slide["he_grid"], to_coordinate_system="um")
    x0, y0, x1, y1 = cells.bounds.to_numpy().T
    np.testing.assert_allclose(x1 - x0, 56, rtol=1e-6)
    np.testing.assert_allclose(y1 - y0, 56, rtol=1e-6)


@pytest.mark.parametrize("kind", ["shapes", "circles", "labels", "mask"])
def test_tissue_is_given(slide: SpatialData, kind: str) -> None:
    tissue: Any = "region"
    if kind == "shapes":  # in another unit than the image
        frame = GeoDataFrame(geometry=[shapely.box(20, 20, 80, 100)])
        slide["region"] = ShapesModel.parse(frame, transformations={"he": Scale([5, 5], axes=("x", "y"))})
    elif kind == "circles":
        frame = GeoDataFrame({"radius": [120.0]}, geometry=[shapely.Point(300, 300)])
        slide["region"] = ShapesModel.parse(frame, transformations={"he": Identity()})
    else:
        mask = np.zeros((160, 240), np.int32)
        mask[20:100, 20:80] = 3
        tissue = mask if kind == "mask" else "region"
        if kind == "labels":
            scale = Scale([5, 5], axes=("x", "y"))
            slide["region"] = Labels2DModel.parse(mask, dims=("y", "x"), transformations={"he": scale})
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, tissue=tissue)
    x, y = slide["grid"].obsm["spatial"].T
    if kind == "circles":
        inside = np.hypot(x - 300, y - 300) < 120 + 14
        area = np.pi * 120**2
    else:
        inside = (x >= 100 - 1) & (x <= 400 + 1) & (y >= 100 - 1) & (y <= 500 + 1)
        area = 300 * 400
    assert inside.all()
    assert slide["grid"].n_obs * 28**2 == pytest.approx(area, rel=0.1)


def test_one_tile_for_each_shape(slide: SpatialData) -> None:
    at = np.array([[150.0, 150], [300, 300], [600, 300], [900, 400]])  # the third on glass
    frame = GeoDataFrame(geometry=shapely.buffer(shapely.points(at), 5), index=["a", "b", "c", "d"])
    slide["cells"] = ShapesModel.parse(frame, transformations={"he": Identity()})
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, shapes="cells", table_added="cell_tiles")
    table = slide["cell_tiles"]
    assert list(table.obs["tile_id"]) == ["a", "b", "d"] and "grid_row" not in table.obs
    np.testing.assert_allclose(table.obsm["spatial"], at[[0, 1, 3]])
    assert list(slide["cells_tiles"].index) == ["a", "b", "d"]
    with pytest.raises(ValueError, match="`shape='hexagon'` is of a grid"):
        pk.pp.tile_grid(slide, "he", shapes="cells", shape="hexagon")
    with pytest.raises(ValueError, match="`stride_um` is of a grid"):
        pk.pp.tile_grid(slide, "he", shapes="cells", stride_um=50)


def test_shapes_off_the_image_get_no_tile(slide: SpatialData) -> None:
    at = np.array([[-200.0, 100], [300, 300], [-10, 300], [1300, 900]])  # the third partly on it
    frame = GeoDataFrame(geometry=shapely.buffer(shapely.points(at), 5))
    slide["cells"] = ShapesModel.parse(frame, transformations={"he": Identity()})
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, shapes="cells", tissue=False)
    assert list(slide["grid"].obs["tile_id"]) == [1, 2]
    assert read_uns(slide["grid"], "grid")["left_out"]["off the image"] == 2
    off = slide_of(np.full((3, 40, 40), 90, np.uint8))
    off["cells"] = slide["cells"].iloc[[0]]
    with pytest.raises(ValueError, match="No tile is left on image 'he' of 1: 1 off the image"):
        pk.pp.tile_grid(off, "he", **SIZE, **ALL, shapes="cells", tissue=False)


def test_shapes_that_are_something_else(slide: SpatialData) -> None:
    slide["cells"] = Labels2DModel.parse(np.ones((8, 12), np.int32), dims=("y", "x"))
    slide["spots"] = PointsModel.parse(np.ones((3, 2)))
    with pytest.raises(KeyError, match=r"These are labels: .*to_polygons\(sdata.labels\['cells'\]\)"):
        pk.pp.tile_grid(slide, "he", **SIZE, shapes="cells")
    with pytest.raises(KeyError, match=r"These are points: .*to_circles\(sdata.points\['spots'\], 5\)"):
        pk.pp.tile_grid(slide, "he", **SIZE, shapes="spots")


def test_another_run_replaces_what_the_earlier_wrote_and_nothing_else(slide: SpatialData) -> None:
    frame = GeoDataFrame(geometry=[shapely.box(200, 200, 300, 300)])
    slide["cells"] = ShapesModel.parse(frame, transformations={"he": Identity()})
    slide["other"] = slide["cells"]
    slide["other_tiles"] = slide["cells"]  # of another call
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL)
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, shapes="cells")
    assert set(slide.shapes) == {"cells", "other", "other_tiles", "cells_tiles"}
    with pytest.raises(ValueError, match="The name 'other_tiles' is taken"):
        pk.pp.tile_grid(slide, "he", **SIZE, **ALL, shapes="other")
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL)
    assert set(slide.shapes) == {"cells", "other", "other_tiles", "he_grid", "he_grid_tiles"}


def test_a_wrong_pixel_size_is_corrected_by_another_run(slide: SpatialData) -> None:
    del slide.attrs["pekasc"]
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, image_mpp=1.0)
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, image_mpp=2.0)
    assert read_uns(slide["grid"], "image_mpp") == {"he": 2.0}
    # tables that contradict each other
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, table_added="fine")  # as the other table says
    slide["fine"].uns["pekasc"]["image_mpp"] = {"he": 0.5}
    with pytest.raises(
        ValueError, match="Tables record different pixel sizes of image 'he': 2 um in 'grid', 0.5 um in"
    ):
        pk.pp.tile_grid(slide, "he", **SIZE, **ALL, table_added="more")
    with pytest.raises(ValueError, match="Pixel sizes of image 'he' disagree: 1 um from `image_mpp`, 0.5 um") as raised:
        pk.pp.tile_grid(slide, "he", **SIZE, **ALL, image_mpp=1.0)  # of the other table alone
    assert "strict" not in str(raised.value)


def test_large_labels_are_read_coarsely(slide: SpatialData) -> None:
    read = []

    def block(block_id: tuple[int, int]) -> np.ndarray:
        read.append(block_id)
        return np.full((2000, 3000), int(block_id[1] < 2), np.int32)

    # 12,000 x 8000 labels of a tenth of a pixel each: the left half is tissue
    labels = da.map_blocks(block, chunks=((2000,) * 4, (3000,) * 4), dtype=np.int32, meta=np.empty((0, 0), np.int32))
    scale = Scale([0.1, 0.1], axes=("x", "y"))
    slide["labels"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"he": scale})
    section = slide_section(slide, "he")
    read.clear()
    mask = tissue_of_slide(slide, section, "labels")
    assert mask is not None and mask.mask.shape == (200, 300)  # 8 um
    assert len(read) == 16
    np.testing.assert_array_equal(mask.fraction(np.array([[300.0, 400], [900, 400]]), np.eye(2)), [1, 0])
    fine = Labels2DModel.parse(
        np.repeat([[0, 1]], 400, axis=0).repeat(600, axis=1), dims=("y", "x"), scale_factors=[2, 2],
        transformations={"he": Identity()},
    )  # fmt: skip
    slide["levels"] = fine
    of_levels = tissue_of_slide(slide, section, "levels")
    assert of_levels is not None and of_levels.mask.shape == (100, 300)
    np.testing.assert_array_equal(of_levels.fraction(np.array([[300.0, 200], [900, 200]]), np.eye(2)), [0, 1])


def test_labels_without_their_scale(slide: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    slide["small"] = Labels2DModel.parse(
        np.ones((80, 120), np.int32), dims=("y", "x"), transformations={"he": Identity()}
    )
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL, tissue="small")
    assert "The labels 'small' lie over 1 % of the image he, and nothing else is taken for tissue" in caplog.text


def test_tissue_in_the_corners(pixels: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    # cut so that all corners are tissue: what is bright is not tissue for that
    corners = pixels[:, 120:680, 120:].copy()
    corners[:, :, 860:] = corners[:, :, :220]
    slide = slide_of(corners)
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL)
    kept = pk.get.tiles(slide, table_name="grid").to_numpy().mean()
    assert kept < 190


def test_no_tissue(slide: SpatialData) -> None:
    blank = slide_of(np.full((3, 400, 400), 244, np.uint8))
    with pytest.raises(ValueError, match=r"No tissue was found on image 'he'\. Give `tissue=`"):
        pk.pp.tile_grid(blank, "he", **SIZE)
    # grain of a camera is no tissue
    grain = 240 + np.random.default_rng(0).integers(0, 8, (3, 800, 800)).astype(np.uint8)
    with pytest.raises(ValueError, match=r"No tissue was found on image 'he'"):
        pk.pp.tile_grid(slide_of(grain), "he", **SIZE)
    faint = grain.copy()
    faint[1, 200:600, 200:600] -= 15  # a pink that is hardly seen
    found = slide_of(faint)
    pk.pp.tile_grid(found, "he", **SIZE, **ALL)
    assert found["grid"].n_obs == pytest.approx((400 / 28) ** 2, rel=0.1)
    with pytest.raises(ValueError, match=r"No tissue is in `tissue=\.\.\.` on image 'he'"):
        pk.pp.tile_grid(slide, "he", **SIZE, tissue=np.zeros((80, 120), bool))
    assert not slide.tables and not slide.shapes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": "triangle"}, ValueError, r"`shape='triangle'` is not known: choose one of \['square', 'hexagon'\]"),
        ({"stride_um": -5}, ValueError, "`stride_um` must be a positive number"),
        ({"min_tissue": 50}, ValueError, "`min_tissue=50` must be a fraction between 0 and 1"),
        ({"max_pen": "none"}, TypeError, "`max_pen` must be a number or None"),
        ({"tissue": "annotations"}, KeyError, "annotations.* is neither shapes nor labels"),
        ({"tissue": 3.5}, TypeError, '`tissue` must be "detect", False, the name of shapes or labels, or a mask'),
        ({"tissue": np.ones((100, 100), bool)}, ValueError, "100 x 100 px has another aspect than the image"),
        ({"tissue": np.ones((80, 120, 3), bool)}, ValueError, r"must be a 2-D array .* got shape \(80, 120, 3\)"),
        ({"shapes": "cells"}, KeyError, "`shapes='cells'` not found"),
        ({"table_added": "a b"}, ValueError, "`table_added='a b'`"),
        ({"image_mpp": 5.0}, ValueError, "Pixel sizes of image 'he' disagree: 5 um from `image_mpp`, 2 um"),
        ({"min_tissue": 1.0, "tile_px": 300}, ValueError, r"No tile is left on image 'he' of \d+: \d+ with too little"),
        ({"um_coordinate_system": "um"}, KeyError, "is not in the coordinate system 'um'"),
        ({"min_sharpness": -1}, ValueError, '`min_sharpness=-1` must be 0 or more, "auto", or None'),
        ({"stride_um": 1e-3}, ValueError, r"`stride_um=0.001` makes 3.8e\+12 tiles .* more than 50,000,000"),
        ({"tissue": np.full((80, 120), 0.5)}, ValueError, "float64. Of a probability, it is `mask > 0.5`"),
        ({"tissue": np.ones((0, 0), bool)}, ValueError, r"must be a 2-D array .* got shape \(0, 0\)"),
    ],
)  # fmt: skip
def test_refused_and_nothing_changes(
    slide: SpatialData, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pk.pp.tile_grid(slide, "he", **{**SIZE, **ALL, **options})
    assert not slide.tables and not slide.shapes


def test_names_that_are_taken(slide: SpatialData) -> None:
    with pytest.raises(KeyError, match=r"Image 'HE' not found\. Available images: \['he'\]"):
        pk.pp.tile_grid(slide, "HE")
    slide["other"] = slide["he"]
    pk.pp.tile_grid(slide, "he", **SIZE, **ALL)
    slide.attrs["pekasc"]["image_mpp"]["other"] = 2.0
    with pytest.raises(ValueError, match=r"name 'grid' is taken by `sdata.tables\['grid'\]`, .*`table_added=`"):
        pk.pp.tile_grid(slide, "other", **SIZE, **ALL)
    del slide.attrs["pekasc"]
    with pytest.raises(ValueError, match=r"pixel size of image 'other' is not known, .*Give `image_mpp="):
        pk.pp.tile_grid(slide, "other", **SIZE, **ALL, table_added="more")


def test_the_size_of_an_adapters_tiles(slide: SpatialData) -> None:
    spec = TileSpec(28, 4.0)
    pk.pp.tile_grid(slide, "he", tile_px=spec.tile_px, mpp=spec.mpp, **ALL)
    assert pk.get.tiles(slide, table_name="grid").attrs == {"mpp": 4.0, "tile_px": 28}
