"""A Visium slide of spatialdata-io works without arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
import spatialdata as sd
from spatialdata import SpatialData

import pekasc as pk

Reader = Callable[..., SpatialData]


@pytest.mark.parametrize(("full", "taken", "mpp"), [("full.tif", "full", 1.25), (None, "hires", 2.5)])
def test_no_argument_takes_the_finest_image_and_the_lattices_pixel_size(
    read_visium: Reader, full: str | None, taken: str, mpp: float
) -> None:
    sdata = read_visium(fullres_image_file=full)
    pk.pp.tile(sdata)
    section = sdata["table"].uns["pekasc"]["tiles"]["sections"]["sample"]
    assert section["image"] == f"sample_{taken}_image"
    assert section["mpp"] == pytest.approx(mpp, rel=2e-3)
    assert section["source"] == "lattice"
    tiles = pk.get.tiles(sdata)
    assert tiles.sizes["tile"] == int(sdata["table"].obs["in_tissue"].sum())


def test_two_joined_by_concatenate_are_tiled_again_over_the_old_tiles(read_visium: Reader) -> None:
    parts = [read_visium("a"), read_visium("b")]
    for part in parts:
        pk.pp.tile(part, tile_px=56, mpp=2.0)
    joined = sd.concatenate(parts, concatenate_tables=True, obs_names_make_unique=True)
    assert "pekasc" not in joined["table"].uns
    pk.pp.tile(joined)
    assert set(joined.shapes) == {"a", "b", "a_tiles", "b_tiles"}
    assert set(joined["table"].uns["pekasc"]["tiles"]["sections"]) == {"a", "b"}


def test_shapes_of_that_name_that_are_no_tiles_stay(read_visium: Reader) -> None:
    sdata = read_visium()
    sdata.shapes["sample_tiles"] = sd.models.ShapesModel.parse(
        np.array([[10.0, 10.0], [50.0, 50.0]]), geometry=0, radius=5
    )
    with pytest.raises(ValueError, match="was not made by this call"):
        pk.pp.tile(sdata)
    assert len(sdata.shapes["sample_tiles"]) == 2


def test_columns_that_are_no_visium_lattice_give_no_pixel_size(read_visium: Reader) -> None:
    sdata = read_visium()
    sdata["table"].obs["array_col"] += 1
    with pytest.raises(ValueError, match="does not guess"):
        pk.pp.tile(sdata)


def test_a_diameter_that_does_not_fit_the_lattice_is_said(read_visium: Reader) -> None:
    sdata = read_visium()
    sdata.shapes["sample"]["radius"] *= 2
    with pytest.warns(UserWarning, match="stored diameter is 130 um"):
        pk.pp.tile(sdata)


def test_the_only_table_is_taken_and_several_are_asked_for(read_visium: Reader) -> None:
    sdata = read_visium()
    sdata.tables["square"] = sdata.tables.pop("table")
    pk.pp.tile(sdata)
    sdata.tables["other"] = sdata["square"].copy()
    with pytest.raises(KeyError, match="table_name"):
        pk.pp.tile(sdata)


def test_self_crossing_cells_are_repaired_and_counted(read_visium: Reader, caplog: pytest.LogCaptureFixture) -> None:
    sdata = read_visium()
    old = sdata.shapes.pop("sample")
    cells = old.geometry.buffer(old["radius"]).to_numpy()
    x, y = cells[0].centroid.coords[0]
    # a bow tie whose shoelace centroid lies far outside of it: its two halves cancel each other
    cells[0] = shapely.Polygon([(x - 9, y - 9), (x + 9, y + 9), (x + 9, y - 9), (x - 9, y + 8.99)])
    assert not cells[0].is_valid
    sdata.shapes["sample"] = sd.models.ShapesModel.parse(
        geopandas.GeoDataFrame(geometry=cells, index=old.index),
        transformations=dict(sd.transformations.get_transformation(old, get_all=True)),
    )
    with caplog.at_level(logging.DEBUG, logger="pekasc"):
        pk.pp.tile(sdata)
    assert "1 of 64 shapes are not valid" in caplog.text


def test_cropped_written_and_read_again_under_a_name_in_another_script(read_visium: Reader, tmp_path: Path) -> None:
    sdata = read_visium("Gewebe_\u00fc_\u80ba")
    crop = sdata.query.bounding_box(
        axes=("x", "y"),
        min_coordinate=[150, 150],
        max_coordinate=[650, 650],
        target_coordinate_system="Gewebe_\u00fc_\u80ba",
    )
    pk.pp.tile(crop)
    (section,) = crop["table"].uns["pekasc"]["tiles"]["sections"].values()
    assert section["mpp"] == pytest.approx(1.25, rel=2e-3)
    crop.write(tmp_path / "visium.zarr")
    back = sd.read_zarr(tmp_path / "visium.zarr")
    np.testing.assert_array_equal(pk.get.tiles(back)[0].compute(), pk.get.tiles(crop)[0].compute())
