"""A Visium HD slide of spatialdata-io: the table of bins by name, and the array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData

import pekasc as pk

Reader = Callable[..., SpatialData]
SIZE = {"tile_px": 56, "mpp": 2.0}


def test_several_tables_are_asked_for_by_name_and_the_only_one_is_taken(read_visium_hd: Reader) -> None:
    sdata = read_visium_hd()
    with pytest.raises(KeyError, match="square_008um.*square_016um.*`table_name=`"):
        pk.pp.tile(sdata, array="visium_hd")
    pk.pp.tile(sdata, array="visium_hd", table_name="square_008um", **SIZE)
    assert pk.get.tiles(sdata).sizes["tile"] == sdata["square_008um"].n_obs  # the only table with tiles
    sdata = read_visium_hd(bin_size=16)
    pk.pp.tile(sdata, array="visium_hd")
    section = sdata["square_016um"].uns["pekasc"]["tiles"]["sections"]["_square_016um"]
    assert section["image"] == "_full_image"
    assert section["mpp"] == pytest.approx(1.25, rel=1e-6)


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("um", [8, 16])
def test_bins_of_every_size_and_shape(read_visium_hd: Reader, um: int, squares: bool) -> None:
    sdata = read_visium_hd(dataset_id="crc", bins_as_squares=squares)
    name = f"square_{um:03}um"
    pk.pp.tile(sdata, array="visium_hd", table_name=name, **SIZE)
    section = sdata[name].uns["pekasc"]["tiles"]["sections"][f"crc_{name}"]
    assert section["mpp"] == pytest.approx(1.25, rel=1e-6)
    assert len(sdata.shapes[f"crc_{name}_tiles"]) == sdata[name].n_obs


def test_the_error_shows_the_call_that_then_works(read_visium_hd: Reader) -> None:
    sdata = read_visium_hd(bin_size=8)
    with pytest.raises(ValueError, match='add `array="visium_hd"`'):
        pk.pp.tile(sdata)
    with pytest.raises(ValueError, match='add `array="visium_hd"`') as error:
        pk.tl.fit_adapter(sdata, method=None)
    line = str(error.value).split("run `")[1].split("`")[0]
    assert line == """pekasc.pp.tile(sdata, tile_px=224, mpp=0.5, table_name='square_008um', array="visium_hd")"""
    exec(line, {"pekasc": pk, "sdata": sdata})
    assert "_square_008um_tiles" in sdata.shapes


def test_bins_as_labels_find_their_squares(read_visium_hd: Reader) -> None:
    # both sizes of bins are numbered from 0
    sdata = read_visium_hd(dataset_id="crc", annotate_table_by_labels=True)
    assert sdata["square_016um"].uns["spatialdata_attrs"]["region"] == "crc_square_016um_labels"
    pk.pp.tile(sdata, table_name="square_016um", array="visium_hd", **SIZE)
    tiles, squares = sdata.shapes["crc_square_016um_labels_tiles"], sdata.shapes["crc_square_016um"]
    np.testing.assert_allclose(tiles.centroid.x, squares.centroid.x[sdata["square_016um"].obs["location_id"]])
    assert pk.get.tiles(sdata, table_name="square_016um").sizes["tile"] == len(squares)


def test_segmented_cells_have_no_grid(segmentations_folder: Path) -> None:
    import spatialdata_io

    sdata = spatialdata_io.visium_hd(segmentations_folder, dataset_id="", load_segmentations_only=True)
    with pytest.raises(ValueError, match=r"Give `image_mpp=\{'_full_image': \.\.\.\}`") as error:
        pk.pp.tile(sdata)
    assert "array=" not in str(error.value)
    with pytest.raises(KeyError, match="array_row and array_col not found.*`image_mpp=`"):
        pk.pp.tile(sdata, array="visium_hd")
    pk.pp.tile(sdata, image_mpp={"_full_image": 1.25}, **SIZE)
    assert len(sdata.shapes["_cell_segmentations_tiles"]) == 64


def test_fit_and_get_on_bins(read_visium_hd: Reader) -> None:
    sdata = read_visium_hd(bin_size=16)
    pk.pp.tile(sdata, array="visium_hd", **SIZE)
    pk.tl.fit_adapter(sdata, method=None, readout="ridge", progress=False)
    assert pk.get.expression(sdata, layer=None).obsm["spatial"].max() < 1000


def test_joined_written_and_read_again(read_visium_hd: Reader, tmp_path: Path) -> None:
    parts = [read_visium_hd(dataset_id=name, bin_size=16) for name in ("a", "b")]
    joined = sd.concatenate(parts, concatenate_tables=True, obs_names_make_unique=True)
    joined.write(tmp_path / "joined.zarr")
    back = sd.read_zarr(tmp_path / "joined.zarr")
    pk.pp.tile(back, array="visium_hd", **SIZE)
    assert set(back["square_016um"].uns["pekasc"]["tiles"]["sections"]) == {"a_square_016um", "b_square_016um"}


def test_a_crop(read_visium_hd: Reader) -> None:
    sdata = read_visium_hd(dataset_id="crc", bin_size=16)
    crop = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=[200, 200], max_coordinate=[600, 600], target_coordinate_system="crc"
    )
    pk.pp.tile(crop, array="visium_hd", **SIZE)
    assert crop["square_016um"].uns["pekasc"]["tiles"]["sections"]["crc_square_016um"]["mpp"] == pytest.approx(1.25)
