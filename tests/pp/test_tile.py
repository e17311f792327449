"""pp.tile and get.tiles: what the tiles show, what is written, and what is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, Sequence, Translation, get_transformation, set_transformation

import pekasc as pk
from pekasc._keys import read_uns
from pekasc._sections._tiled import section_readers, tiled_sections

Scene = Callable[..., SpatialData]
Truth = Callable[[np.ndarray, int, float], np.ndarray]

SHAPES = np.array([[0.0, 10, 30], [-20, 0, 700], [0, 0, 1]])
# the same scene of 400 x 360 units (0.5 um), stored in many ways: px -> cs, size in px, um per px
STORED: dict[str, tuple[np.ndarray, tuple[int, int], float]] = {
    "plain": (np.eye(3), (400, 360), 0.5),
    "moved": (np.array([[1, 0, 20.25], [0, 1, 10.5], [0, 0, 1.0]]), (380, 340), 0.5),
    "finer": (np.diag([0.5, 0.5, 1]), (800, 720), 0.25),
    "coarser": (np.diag([1.6, 1.6, 1]), (250, 225), 0.8),
    "flipped": (np.array([[-1, 0, 400], [0, 1, 0], [0, 0, 1.0]]), (400, 360), 0.5),
    "transposed": (np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]]), (360, 400), 0.5),
    "turned": (np.array([[0, 1, 0], [-1, 0, 360], [0, 0, 1.0]]), (360, 400), 0.5),
    "rotated": (np.array([[0.6, -0.8, 230], [0.8, 0.6, -120], [0, 0, 1]]), (500, 500), 0.5),
    "rotated and finer": (np.array([[0.3, -0.4, 230], [0.4, 0.3, -120], [0, 0, 1]]), (1000, 1000), 0.25),
}


def state(sdata: SpatialData) -> dict[str, Any]:
    """Return all that must not change when a call fails."""
    return {
        "elements": sorted((kind, name, id(element)) for kind, name, element in sdata.gen_elements()),
        "obs": sdata["table"].obs.copy(),
        "uns": deepcopy(dict(sdata["table"].uns)),
        "systems": {name: get_transformation(e, get_all=True).keys() for name, e in sdata.shapes.items()},
    }


def assert_unchanged(before: dict[str, Any], sdata: SpatialData) -> None:
    after = state(sdata)
    pd.testing.assert_frame_equal(before.pop("obs"), after.pop("obs"))
    assert repr(before) == repr(after)


def centres_in_cs(sdata: SpatialData) -> np.ndarray:
    frame = sd.get_centroids(sdata["A_spots"], coordinate_system="A").compute()
    return frame.loc[sdata["table"].obs["spot_id"], ["x", "y"]].to_numpy()


def assert_shows(sdata: SpatialData, tiles: np.ndarray, expected: np.ndarray) -> None:
    """Compare tiles with the closed form: half a pixel of the plain image off would shift the means by 0.45."""
    sections, spec = tiled_sections(sdata)
    (reader,) = section_readers(sections, spec)
    # spatialdata cuts the fractions of the means of 4 pixels off: 0, 1/4, 1/2 or 3/4 at each level
    difference = (tiles.astype(float) + 0.375 * reader.level - expected)[..., [0, 2]]
    assert np.abs(difference).max() < 2.5
    assert np.abs(difference.mean(axis=(1, 2))).max() < (0.43 if reader.level else 0.2)
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 0.2


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("multi_scale", [True, False])
def test_tiles_do_not_depend_on_how_the_image_is_stored(
    scene: Scene, scene_truth: Truth, stored: str, multi_scale: bool
) -> None:
    matrix, size, mpp = STORED[stored]
    sdata = scene(px_to_cs=matrix, size=size, shapes_to_cs=SHAPES, multi_scale=multi_scale)
    pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=mpp)
    tiles = pk.get.tiles(sdata)
    assert_shows(sdata, tiles.to_numpy(), scene_truth(centres_in_cs(sdata), 32, 1.0))
    assert (sdata["table"].obs["tile_inside"] == 1).all()


def test_levels_of_odd_sizes_are_less_than_a_pixel_off(scene: Scene, scene_truth: Truth) -> None:
    sdata = scene(px_to_cs=np.diag([0.5, 0.5, 1]), size=(803, 725))
    pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=0.25)
    difference = pk.get.tiles(sdata).to_numpy() - scene_truth(centres_in_cs(sdata), 32, 1.0)
    assert np.abs(difference.mean(axis=(1, 2))).max() < 0.9 * 2  # a pixel of level 2 is 2 units wide


def test_tiles_at_the_pixels_of_the_image_are_crops(scene: Scene) -> None:
    centres = np.array([[120.0, 100], [200, 150], [150, 220], [281, 133]])
    sdata = scene(centres=centres)
    pk.pp.tile(sdata, tile_px=40, mpp=0.5, image_mpp=0.5)
    pixels = sd.get_pyramid_levels(sdata["A_he"], n=0).data.compute()
    for tile, (x, y) in zip(pk.get.tiles(sdata).to_numpy(), centres.astype(int), strict=True):
        np.testing.assert_array_equal(np.moveaxis(tile, -1, 0), pixels[:, y - 20 : y + 20, x - 20 : x + 20])


def test_um_system_with_pixels_that_are_not_square(scene: Scene, scene_truth: Truth) -> None:
    sdata = scene(px_to_cs=np.diag([0.5, 0.9, 1]), size=(800, 400))
    pk.pp.tile(sdata, tile_px=32, mpp=1.0, um_coordinate_system="um")
    assert_shows(sdata, pk.get.tiles(sdata).to_numpy(), scene_truth(centres_in_cs(sdata), 32, 1.0))


def test_what_is_written(scene: Scene) -> None:
    sdata = scene(shapes_to_cs=SHAPES, px_to_cs=STORED["rotated"][0], size=(500, 500))
    before = set(sdata["table"].obs)
    assert pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=0.5) is None  # type: ignore[func-returns-value]
    assert set(sdata["table"].obs) - before == {"tile_inside"}
    assert sdata["table"].obs["tile_inside"].dtype == np.float32
    squares = sdata["A_spots_tiles"]
    np.testing.assert_array_equal(squares.index, sdata["table"].obs["spot_id"])
    assert get_transformation(squares, get_all=True).keys() == {"A", "um"}
    # in um: squares of 32 um along the axes, around the spots
    in_um = sd.transform(squares, to_coordinate_system="um").geometry
    np.testing.assert_allclose(in_um.area, 32.0**2)
    bounds = in_um.bounds.to_numpy()
    np.testing.assert_allclose(bounds[:, 2:] - bounds[:, :2], 32)
    np.testing.assert_allclose((bounds[:, 2:] + bounds[:, :2]) / 2, centres_in_cs(sdata) * 0.5)
    record = read_uns(sdata["table"], "tiles")
    assert record is not None
    assert (record["tile_px"], record["mpp"]) == (32, 1.0)
    section = record["sections"]["A_spots"]
    assert (section["image"], section["coordinate_system"], section["source"]) == ("A_he", "A", "image_mpp")
    np.testing.assert_allclose(section["um_to_px"], np.linalg.inv(STORED["rotated"][0][:2, :2]) / 0.5)
    assert section["mpp"] == pytest.approx(0.5)


def test_edge_tiles_are_white_and_counted(scene: Scene) -> None:
    centres = np.array([[200.0, 100], [150, 160], [200, 200], [398, 200], [200, 200.5], [0.5, 350.5]])
    sdata = scene(centres=centres)
    pk.pp.tile(sdata, tile_px=20, mpp=1.0, image_mpp=0.5)
    np.testing.assert_allclose(sdata["table"].obs["tile_inside"], [1, 1, 1, 0.55, 1, 20.5 * 29.5 / 1600], rtol=1e-5)
    tile = pk.get.tiles(sdata)[3].to_numpy()
    assert (tile[:, 11:] == 255).all() and (tile[:, :10, 1] < 255).all()


def test_spots_that_are_not_in_tissue_have_no_tile(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    for values in ([0, 1] * 6, [False, True] * 6, pd.Categorical(["0", "1"] * 6)):
        sdata = scene()
        sdata["table"].obs["in_tissue"] = values
        with caplog.at_level(logging.INFO, logger="pekasc"):
            pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=0.5)
        assert "6 of 12 spots left out" in caplog.text
        inside = sdata["table"].obs["tile_inside"]
        assert inside[::2].isna().all() and (inside[1::2] == 1).all()
        np.testing.assert_array_equal(sdata["A_spots_tiles"].index, sdata["table"].obs["spot_id"][1::2])
        assert pk.get.tiles(sdata)["tile"].to_numpy().tolist() == sdata["table"].obs_names[1::2].tolist()
    sdata["table"].obs["in_tissue"] = 0
    with pytest.raises(ValueError, match="'in_tissue'.* is 0 for all 12 spots"):
        pk.pp.tile(sdata, image_mpp=0.5)


def test_calling_again_overwrites_our_own(scene: Scene) -> None:
    sdata = scene()
    pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=0.5)
    pk.pp.tile(sdata, tile_px=16, mpp=0.5, image_mpp=0.5)
    pk.pp.tile(sdata, tile_px=8, mpp=0.5, image_mpp=0.5, key_added="small")
    assert list(sdata.shapes) == ["A_spots", "A_spots_tiles", "A_spots_small"]
    assert pk.get.tiles(sdata).shape == (12, 16, 16, 3)
    assert pk.get.tiles(sdata, key="small").shape == (12, 8, 8, 3)


def test_names_that_are_taken(scene: Scene) -> None:
    for name, kind in (("A_spots_tiles", "shapes"), ("A_spots_TILES", "shapes"), ("A_spots_tiles", "images")):
        sdata = scene()
        if kind == "shapes":
            sdata.shapes[name] = sdata["A_spots"]
        else:
            sdata.images[name] = Image2DModel.parse(np.zeros((3, 9, 9), np.uint8), transformations={"x": Identity()})
        before = state(sdata)
        with pytest.raises(ValueError, match=rf"named 'A_spots_tiles', but `sdata.{kind}\['{name}'\]`.*key_added"):
            pk.pp.tile(sdata, image_mpp=0.5)
        assert_unchanged(before, sdata)
    sdata = scene()
    with pytest.raises(ValueError, match="`key_added='my tiles'` cannot be stored"):
        pk.pp.tile(sdata, image_mpp=0.5, key_added="my tiles")
    sdata["table"].uns["pekasc"] = {"image_mpp": {"A_he": 0.5}}
    with pytest.raises(ValueError, match="key_added='image_mpp'.*holds something else"):
        pk.pp.tile(sdata, key_added="image_mpp")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"image_mpp": None}, ValueError, "not known"),
        ({"tile_px": 0}, ValueError, "tile_px"),
        ({"mpp": -1.0}, ValueError, "mpp"),
        ({"table_name": "cells"}, KeyError, "Available tables"),
        ({"image_mpp": 0.5, "um_coordinate_system": "A"}, ValueError, "disagree"),
        ({"array": "st"}, KeyError, "array_row and array_col not found"),
    ],
)
def test_errors_leave_the_object_as_it_was(scene: Scene, arguments: dict[str, Any], error: Any, match: str) -> None:
    sdata = scene()
    before = state(sdata)
    with pytest.raises(error, match=match):
        pk.pp.tile(sdata, **{"image_mpp": 0.5, **arguments})
    assert_unchanged(before, sdata)


def test_the_arguments_are_not_changed(scene: Scene) -> None:
    sdata = scene()
    spots, image = sdata["A_spots"].copy(), sdata["A_he"]
    table = sdata["table"]
    x = table.X.copy()
    pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=0.5)
    pd.testing.assert_frame_equal(pd.DataFrame(spots), pd.DataFrame(sdata["A_spots"]))
    assert sdata["A_he"] is image and sdata["table"] is table
    np.testing.assert_array_equal(table.X, x)


def test_view_in_the_object(scene: Scene) -> None:
    sdata = scene()
    whole = sdata["table"]
    del sdata.tables["table"]
    sdata.tables["table"] = whole[3:8]
    pk.pp.tile(sdata, tile_px=32, mpp=1.0, image_mpp=0.5)
    assert sdata["table"].n_obs == 5 and "tile_inside" not in whole.obs


def test_coarse_image_is_logged(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.pp.tile(scene(), tile_px=64, mpp=0.25, image_mpp=0.5)
    assert "2 times coarser than the tiles (0.5 um against 0.25 um): interpolated" in caplog.text
    assert "12 tiles of 64 px (16 um) on image A_he, 0.5 um per pixel (from image_mpp)" in caplog.text


# after tiling


def test_subset_and_reordered_tables(scene: Scene) -> None:
    sdata = sd.concatenate([scene(name="A"), scene(name="B", px_to_cs=STORED["rotated"][0])], concatenate_tables=True)
    pk.pp.tile(sdata, tile_px=16, mpp=1.0, image_mpp=0.5)
    whole = pk.get.tiles(sdata).compute()
    kept = np.random.default_rng(0).permutation(24)[:15]
    table = sdata["table"][kept].copy()
    del sdata.tables["table"]
    sdata.tables["table"] = table
    for name in ("A_spots", "B_spots_tiles"):
        frame = sdata[name].iloc[::-1]
        del sdata.shapes[name]
        sdata.shapes[name] = frame
    part = pk.get.tiles(sdata)
    assert part["tile"].to_numpy().tolist() == table.obs_names.tolist()
    np.testing.assert_array_equal(part.to_numpy(), whole.sel(tile=table.obs_names.to_numpy()).to_numpy())
    only_b = table[(table.obs["region"] == "B_spots").to_numpy()].copy()
    only_b.uns["spatialdata_attrs"]["region"] = "B_spots"
    del sdata.tables["table"]
    sdata.tables["table"] = only_b
    sections, spec = tiled_sections(sdata)
    assert [s.name for s in sections] == ["B_spots"] and spec.tile_px == 16
    np.testing.assert_array_equal(
        pk.get.tiles(sdata).to_numpy(), whole.sel(tile=only_b.obs_names.to_numpy()).to_numpy()
    )


def test_blocks_across_sections(scene: Scene) -> None:
    centres = np.random.default_rng(5).uniform((60, 60), (340, 300), (90, 2))
    sdata = sd.concatenate([scene(name=n, centres=centres) for n in "AB"], concatenate_tables=True)
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    tiles = pk.get.tiles(sdata)
    assert tiles.dims == ("tile", "y", "x", "c") and tiles.dtype == np.uint8
    assert tiles.chunks is not None and tiles.chunks[0] == (64, 64, 52)
    assert tiles["c"].to_numpy().tolist() == ["r", "g", "b"]
    assert tiles.attrs == {"mpp": 1.0, "tile_px": 8}
    sections, spec = tiled_sections(sdata)
    for section, reader in zip(sections, section_readers(sections, spec), strict=True):
        np.testing.assert_array_equal(tiles[section.rows].to_numpy(), reader.read(np.arange(90)))


def test_tiles_of_a_crop_of_the_object(scene: Scene) -> None:
    sdata = scene()
    pk.pp.tile(sdata, tile_px=16, mpp=1.0, image_mpp=0.5)
    whole = pk.get.tiles(sdata).compute()
    crop = sd.bounding_box_query(
        sdata, axes=("x", "y"), min_coordinate=[60, 50], max_coordinate=[300, 250], target_coordinate_system="A"
    )
    part = pk.get.tiles(crop)
    assert 3 < part.sizes["tile"] < 12
    np.testing.assert_array_equal(part.to_numpy(), whole.sel(tile=part["tile"]).to_numpy())


def test_not_tiled(scene: Scene) -> None:
    sdata = scene()
    with pytest.raises(KeyError, match=r"No tiles 'tiles' in the table 'table'. Run `pk.pp.tile\(sdata\)` first"):
        tiled_sections(sdata)
    pk.pp.tile(sdata, image_mpp=0.5, tile_px=16, mpp=1.0)
    with pytest.raises(KeyError, match=r"No tiles 'big'.*pk.pp.tile\(sdata, key_added='big'\)"):
        pk.get.tiles(sdata, key="big")
    with pytest.raises(TypeError, match="expected a SpatialData, got AnnData"):
        pk.get.tiles(sdata["table"])  # type: ignore[arg-type]
    tiles = sdata["A_spots_tiles"]
    del sdata.shapes["A_spots_tiles"]
    with pytest.raises(KeyError, match="'A_spots_tiles' are not in `sdata.shapes` any more"):
        pk.get.tiles(sdata)
    sdata.shapes["A_spots_tiles"] = tiles
    del sdata.images["A_he"]
    with pytest.raises(KeyError, match="tiled on the image 'A_he', which is not in `sdata.images` any more"):
        pk.get.tiles(sdata)


def test_what_changed_since(scene: Scene) -> None:
    changed = r"has changed since it was tiled.*Run `pk.pp.tile\(sdata\)` again"
    sdata = scene()
    pk.pp.tile(sdata, image_mpp=0.5, tile_px=16, mpp=1.0)
    set_transformation(sdata["A_he"], Scale([1.001, 1.001], axes=("x", "y")), to_coordinate_system="A")
    set_transformation(sdata["A_spots"], {"A": Identity()}, set_all=True)
    with pytest.raises(ValueError, match=changed) as caught:
        pk.get.tiles(sdata)
    assert "(shapes_to_px was [[1.0, " in str(caught.value) and "is [[0.999" in str(caught.value)
    # an image of another resolution in the same place
    sdata = scene()
    pk.pp.tile(sdata, image_mpp=0.5, tile_px=16, mpp=1.0)
    half = sd.get_pyramid_levels(sdata["A_he"], n=1)
    del sdata.images["A_he"]
    sdata.images["A_he"] = Image2DModel.parse(half.data, transformations={"A": Scale([2, 2], axes=("x", "y"))})
    with pytest.raises(ValueError, match=changed):
        pk.get.tiles(sdata)
    sdata = scene()
    sdata["table"].uns["pekasc"] = {"image_mpp": {"A_he": 0.5}}
    pk.pp.tile(sdata, tile_px=16, mpp=1.0)
    pk.get.tiles(sdata)
    sdata["table"].uns["pekasc"]["image_mpp"] = {"A_he": 0.501}
    with pytest.raises(ValueError, match=changed):
        pk.get.tiles(sdata)


def test_subset_keeps_the_pixel_size_of_the_whole_array(scene: Scene) -> None:
    rows, cols = (a.ravel() for a in np.meshgrid(np.arange(5), np.arange(5)))
    centres = np.column_stack([cols, rows]) * 50.0 + 80 + np.random.default_rng(0).normal(0, 2, (25, 2))
    sdata = scene(centres=centres)
    sdata["table"].obs["array_row"], sdata["table"].obs["array_col"] = rows, cols
    pk.pp.tile(sdata, tile_px=16, mpp=1.0, array="st")
    whole = pk.get.tiles(sdata).compute()
    table = sdata["table"][:2].copy()  # two spots say nothing about a grid
    del sdata.tables["table"]
    sdata.tables["table"] = table
    np.testing.assert_array_equal(pk.get.tiles(sdata).to_numpy(), whole[:2].to_numpy())


@pytest.mark.parametrize("how", ["image_mpp", "um", "recorded", "array"])
def test_round_trip(scene: Scene, tmp_path: Path, how: str) -> None:
    sdata = scene(px_to_cs=STORED["rotated"][0], size=(500, 500), shapes_to_cs=SHAPES)
    arguments: dict[str, Any] = {"image_mpp": {"A_he": 0.5}}
    if how == "um":
        arguments = {"um_coordinate_system": "um"}
    elif how == "recorded":
        arguments = {}
        sdata["table"].uns["pekasc"] = {"image_mpp": {"A_he": 0.5}}
    elif how == "array":
        arguments = {"array": "visium"}
    pk.pp.tile(sdata, tile_px=16, mpp=1.0, **arguments)
    before = pk.get.tiles(sdata).compute()
    record = read_uns(sdata["table"], "tiles")
    sdata.write(tmp_path / "x.zarr")
    back = sd.read_zarr(tmp_path / "x.zarr")
    np.testing.assert_equal(read_uns(back["table"], "tiles"), record)
    pd.testing.assert_series_equal(back["table"].obs["tile_inside"], sdata["table"].obs["tile_inside"])
    np.testing.assert_allclose(
        shapely.get_coordinates(back["A_spots_tiles"].geometry.array),
        shapely.get_coordinates(sdata["A_spots_tiles"].geometry.array),
    )
    np.testing.assert_array_equal(pk.get.tiles(back).to_numpy(), before.to_numpy())
    # tiling an object that is backed by a file writes nothing to it
    files = sorted(str(p) for p in tmp_path.rglob("*"))
    pk.pp.tile(back, tile_px=8, mpp=1.0, key_added="small", **arguments)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == files


# placement


def slide(rng: np.random.Generator, n: int = 60) -> tuple[SpatialData, np.ndarray]:
    """Return a slide of 600 x 500 px with tissue in its upper left, and centres on it."""
    pixels = np.full((3, 500, 600), 242, np.uint8)
    pixels[:, 60:220, 40:330] = np.array([200, 120, 180])[:, None, None]
    centres = rng.uniform((50, 70), (320, 210), (n, 2))
    frame = GeoDataFrame({"radius": np.full(n, 4.0)}, geometry=shapely.points(centres))
    table = AnnData(
        np.zeros((n, 2), np.float32),
        obs=pd.DataFrame({"region": pd.Categorical(["spots"] * n), "spot_id": np.arange(n)}, index=map(str, range(n))),
    )
    sdata = SpatialData(
        images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2])},
        shapes={"spots": ShapesModel.parse(frame)},
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="spot_id")},
    )
    return sdata, centres


def move(sdata: SpatialData, centres: np.ndarray) -> None:
    frame = sdata["spots"].copy()
    frame.geometry = shapely.points(centres)
    del sdata.shapes["spots"]
    sdata.shapes["spots"] = ShapesModel.parse(frame)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c[:, ::-1], r"transposed \(x and y swapped\)"),
        (lambda c: [600, 0] + c * [-1, 1], "flipped in x"),
        (lambda c: [0, 500] + c * [1, -1], "flipped in y"),
        (lambda c: [600, 500] - c, "rotated by 180 degrees"),
        (lambda c: c * 4.7, "of another scale: .*multiplied by about 0.2"),
        (lambda c: c * 0.1, "of another scale: .*on an image of 600 x 500 px.*multiplied by about"),
        (lambda c: c - [2000, 0], r"only 0 of 60 centres lie inside the image: x -19\d\d.* image 600 x 500 px"),
    ],
)
def test_spots_that_are_not_where_the_tissue_is(change: Callable[..., Any], match: str) -> None:
    sdata, centres = slide(np.random.default_rng(0))
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    sdata, centres = slide(np.random.default_rng(0))
    move(sdata, change(centres))
    before = state(sdata)
    with pytest.raises(ValueError, match=f"Section 'spots' on image 'he': .*{match}.*strict=False"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    assert_unchanged(before, sdata)
    with pytest.warns(UserWarning, match=match):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5, strict=False)
    assert pk.get.tiles(sdata).shape == (60, 8, 8, 3)


def test_tiles_off_tissue_are_counted() -> None:
    sdata, centres = slide(np.random.default_rng(0))
    centres[:5] = [[500, 400], [550, 450], [400, 300], [-3, 400], [602, 10]]
    move(sdata, centres)
    with pytest.warns(UserWarning, match=r"5 of 60 tiles show no tissue \(ids 0, 1, 2, ...; 2 have their centre off"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)


def test_a_scale_that_fits_goes_before_a_turn_that_is_better_than_nothing() -> None:
    sdata, centres = slide(np.random.default_rng(0))
    small = centres * 0.1
    small[:15] = [600, 500] - centres[:15]  # a turn would bring these back
    move(sdata, np.where(small < 0, 0, small))
    with pytest.warns(UserWarning, match="seem to be"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)


def test_pale_tissue_beside_dense_tissue_is_not_flipped() -> None:
    # spots on fat, of which the mask finds two thirds, and dense tissue of another section where a flip would put them
    sdata, centres = slide(np.random.default_rng(0))
    pixels = np.array(sdata["he"]["scale0"]["image"].data)
    pixels[:, 60:220, 340:560] = np.array([200, 120, 180])[:, None, None]
    pixels[:, 60:220, 40:150] = 240
    del sdata.images["he"]
    sdata.images["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2])
    with pytest.warns(UserWarning, match=r"seem to be .*\. Correct them.* if that is so\. They are tiled as they are"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    assert len(sdata["spots_tiles"]) == 60


def test_few_spots_say_little() -> None:
    sdata, _ = slide(np.random.default_rng(0), n=3)
    move(sdata, np.array([[500.0, 400], [550, 450], [100, 100]]))  # flipped, two of three would be on tissue
    with pytest.warns(UserWarning, match="2 of 3 tiles show no tissue"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)


# real data


def test_visium_crop(shared: Path) -> None:
    ad = pytest.importorskip("anndata")
    from PIL import Image

    folder = shared / "data" / "squidpy_visium_crop"
    adata = ad.read_h5ad(folder / "test_data.h5ad")
    pixels = np.moveaxis(np.asarray(Image.open(folder / "test_img.jpg")), -1, 0)
    adata.obs["region"], adata.obs["spot_id"] = pd.Categorical(["spots"] * 49), np.arange(49)
    (library,) = adata.uns["spatial"].values()
    diameter = library["scalefactors"]["spot_diameter_fullres"]
    centres = adata.obsm["spatial"].astype(float)
    frame = GeoDataFrame({"radius": np.full(49, diameter / 2)}, geometry=shapely.points(centres))
    sdata = SpatialData(
        images={"he": Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(frame)},
        tables={"table": TableModel.parse(adata, region="spots", region_key="region", instance_key="spot_id")},
    )
    pk.pp.tile(sdata, tile_px=64, mpp=1.0, array="visium")  # from the spot diameter
    record = read_uns(sdata["table"], "tiles")
    assert record is not None
    assert record["sections"]["spots"]["mpp"] == pytest.approx(0.73, rel=0.01)
    assert (sdata["table"].obs["tile_inside"] == 1).all()
    # an independent crop, averaged over blocks: 88 px of 0.727 um are 64 um
    pk.pp.tile(sdata, tile_px=44, mpp=2 * 0.73, image_mpp=0.73, key_added="twofold")
    tiles = pk.get.tiles(sdata, key="twofold").to_numpy()
    for tile, (x, y) in zip(tiles, centres, strict=True):
        if x % 1 or y % 1:
            continue
        crop = pixels[:, int(y) - 44 : int(y) + 44, int(x) - 44 : int(x) + 44].astype(float)
        expected = np.moveaxis(crop.reshape(3, 44, 2, 44, 2).mean(axis=(2, 4)), 0, -1)
        assert np.abs(tile - expected).max() <= 0.5 + 1e-6


def test_in_tissue_must_be_zero_or_one(scene: Callable[..., SpatialData]) -> None:
    for values, there in ((["yes"] * 6 + ["no"] * 6, "'yes', 'no'"), ([1.0] * 11 + [np.nan], "nan")):
        sdata = scene()
        sdata["table"].obs["in_tissue"] = values
        with pytest.raises(ValueError, match=rf"`obs\['in_tissue'\]` must be 0 or 1, or boolean, but has .*{there}"):
            pk.pp.tile(sdata, tile_px=20, mpp=0.5, image_mpp=0.5)


def test_an_image_that_changed_since_is_noticed(scene: Callable[..., SpatialData]) -> None:
    def change_size(sdata: SpatialData) -> None:
        pixels = np.pad(sdata["A_he"].to_numpy(), ((0, 0), (0, 9), (0, 0)))
        sdata["A_he"] = Image2DModel.parse(
            pixels, dims=("c", "y", "x"), transformations=get_transformation(sdata["A_he"], get_all=True)
        )

    def shift(sdata: SpatialData) -> None:
        for name, map_ in get_transformation(sdata["A_he"], get_all=True).items():
            moved = Sequence([Translation([7, 0], axes=("x", "y")), map_])
            set_transformation(sdata["A_he"], moved, to_coordinate_system=name)

    for change, what in ((change_size, "size_px"), (shift, "shapes_to_px")):
        sdata = scene(multi_scale=False)
        pk.pp.tile(sdata, tile_px=20, mpp=0.5, um_coordinate_system="um")
        change(sdata)
        with pytest.raises(ValueError, match=rf"has changed since it was tiled \({what} was"):
            pk.get.tiles(sdata)


@pytest.mark.parametrize("values", [["yes", "no"] * 6, np.linspace(0, 1, 12, dtype=np.float32)])
def test_a_users_own_tile_inside_is_not_replaced(scene: Scene, values: Any) -> None:
    sdata = scene()
    table = sdata["table"]
    table.obs["tile_inside"] = values
    before = table.obs.copy()
    with pytest.raises(ValueError, match=r"`obs\['tile_inside'\]` is there and was not made by this call") as error:
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    pd.testing.assert_frame_equal(table.obs, before)
    assert set(sdata.shapes) == {"A_spots"}
    exec(str(error.value).split("rename it: `")[1].split("`")[0], {"adata": table})
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    assert list(table.obs["my_tile_inside"]) == list(before["tile_inside"])
    # ours is replaced, also if the record of the tiles was lost, as by joining objects
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    del table.uns["pekasc"]
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    del table.uns["pekasc"]
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5, key_added="others")
    # values in rows that have no tile are none of ours, whatever is recorded
    del table.uns["pekasc"], sdata.shapes["A_spots_tiles"], sdata.shapes["A_spots_others"]
    with pytest.raises(ValueError, match="was not made by this call"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)


def test_text_in_place_of_our_tile_inside_is_not_replaced(scene: Scene) -> None:
    sdata = scene()
    pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)
    sdata["table"].obs["tile_inside"] = "yes"
    with pytest.raises(ValueError, match="was not made by this call"):
        pk.pp.tile(sdata, tile_px=8, mpp=1.0, image_mpp=0.5)


def test_a_slide_without_a_table_or_images() -> None:
    whole = pk.datasets.phantom(n_patients=2, size_um=600, mpp=2.0, n_genes=8)
    slide = SpatialData(images={"one": whole["P1S1_he"], "two": whole["P2S1_he"]})
    with pytest.raises(
        KeyError,
        match=r"There is no table: for a slide without spots run `pekasc.pp.tile_grid\(sdata, 'one', tile_px=56, "
        r"mpp=2\)` \(images: 'one', 'two'\) first, then this call with `table_name='grid'`",
    ):
        pk.pp.tile(slide, tile_px=56, mpp=2.0)
    with pytest.raises(KeyError, match=r"run `pekasc.pp.tile_grid\(sdata, 'one'\)`"):
        pk.io.write_geojson(slide, "never.geojson", genes="A")
    with pytest.raises(KeyError, match="no table, and there are no images: read one with `pekasc.io.read_slide`"):
        pk.pp.tile(SpatialData())
    for name in list(whole.images):
        del whole.images[name]
    with pytest.raises(ValueError, match="There are no images, .*: read one with `pekasc.io.read_slide`"):
        pk.pp.tile(whole)


def test_the_path_of_an_object() -> None:
    for call in (pk.pp.tile, pk.get.tiles, pk.get.expression):
        with pytest.raises(TypeError, match=r"got str. Read it first: `sdata = spatialdata.read_zarr\('my.zarr'\)`"):
            call("my.zarr")


def test_a_pixel_size_of_an_image_that_is_not_used() -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=2.0, n_genes=8)
    sdata["focus"] = sdata["P1S1_he"].copy()
    set_transformation(sdata["focus"], {"elsewhere": Identity()}, set_all=True)
    with pytest.warns(
        UserWarning, match="`image_mpp` gives a pixel size of 'focus', and no section .* not used. .* are on 'P1S1_he'"
    ):
        pk.pp.tile(sdata, image_mpp={"focus": 0.2125})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pk.pp.tile(sdata, image_mpp={"P1S1_he": 2.0})


@pytest.mark.parametrize("grid", [False, True])
def test_pixels_taken_for_micrometers(grid: bool) -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=2.0, n_genes=8)
    image, spots = sdata["P1S1_he"], sdata["P1S1_spots"]
    for element in (image, spots):
        set_transformation(element, {"global": Identity()}, set_all=True)

    def call(**kwargs: Any) -> None:
        if grid:
            pk.pp.tile_grid(sdata, "P1S1_he", tissue=False, min_sharpness=None, um_coordinate_system="global", **kwargs)
        else:
            pk.pp.tile(sdata, um_coordinate_system="global", **kwargs)

    with pytest.raises(ValueError, match="1 um from `um_coordinate_system`, 2 um from"):
        call()
    # without what was recorded, and what the lattice says
    del sdata["table"].uns["pekasc"], sdata["table"].obs["array_row"]
    pixels = np.asarray(image["scale0"]["image"])
    sdata["P1S1_he"] = image = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={"global": Identity()}
    )
    with pytest.warns(UserWarning, match="'global' .* makes a pixel .* exactly 1 um: is it in um, or in pixels?"):
        call()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(image_mpp=1.0)  # said twice
        for element in (image, spots):
            set_transformation(element, {"global": Scale([2.0, 2.0], axes=("x", "y"))}, set_all=True)
        call()
