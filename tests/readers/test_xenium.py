"""A Xenium slide of spatialdata-io with an aligned H&E image works without arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
import xarray as xr
from spatialdata import SpatialData
from spatialdata.transformations import Identity, Scale, set_transformation

import pekasc as pk

Reader = Callable[..., SpatialData]
SIZE = {"tile_px": 56, "mpp": 2.0}


def _annotate(sdata: SpatialData, region: str, instance_key: str) -> None:
    sdata["table"].obs["region"] = pd.Categorical([region] * sdata["table"].n_obs)
    sdata.set_table_annotates_spatialelement("table", region=region, region_key="region", instance_key=instance_key)


def _section(sdata: SpatialData) -> dict:
    (section,) = sdata["table"].uns["pekasc"]["tiles"]["sections"].values()
    return section


def _tiled(read_xenium: Reader) -> xr.DataArray:
    sdata = read_xenium()
    pk.pp.tile(sdata)
    return pk.get.tiles(sdata)


def test_labels_find_their_boundaries_and_the_areas_say_um(
    read_xenium: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    sdata = read_xenium()
    attrs = dict(sdata["table"].uns["spatialdata_attrs"])
    assert attrs["region"] == "cell_labels"
    with caplog.at_level(logging.DEBUG, logger="pekasc"):
        pk.pp.tile(sdata)
    assert "using the shapes cell_boundaries, whose ids are in obs['cell_id']" in caplog.text
    assert sdata["table"].uns["spatialdata_attrs"] == attrs
    assert _section(sdata)["image"] == "he_image"
    assert _section(sdata)["mpp"] == pytest.approx(1.25, rel=1e-6)
    tiles = sdata.shapes["cell_labels_tiles"]
    assert list(tiles.index) == list(sdata["table"].obs["cell_labels"])
    cells = sdata.shapes["cell_boundaries"].loc[sdata["table"].obs["cell_id"]]
    assert np.abs(tiles.centroid.x.to_numpy() - cells.centroid.x.to_numpy()).max() < 1e-3
    assert tiles.area.to_numpy() == pytest.approx(112.0**2, rel=1e-6)
    # again, over the tiles that are there
    pk.pp.tile(sdata)
    del sdata["table"].uns["pekasc"]
    pk.pp.tile(sdata)


@pytest.mark.parametrize(
    ("region", "key"),
    [("cell_boundaries", "cell_id"), ("nucleus_boundaries", "cell_labels"), ("cell_circles", "cell_id")],
)
def test_every_kind_of_shapes(read_xenium: Reader, region: str, key: str) -> None:
    sdata = read_xenium(cells_as_circles=True)
    _annotate(sdata, region, key)
    pk.pp.tile(sdata)
    assert _section(sdata)["mpp"] == pytest.approx(1.25, rel=1e-6)
    assert f"{region}_tiles" in sdata.shapes


def test_nuclei_joined_by_a_number_of_their_own_are_refused(uneven_nuclei_folder: Path) -> None:
    import spatialdata_io

    sdata = spatialdata_io.xenium(uneven_nuclei_folder)
    sdata["table"] = sdata["table"][:98].copy()  # nuclei are numbered 1 to 99
    _annotate(sdata, "nucleus_boundaries", "cell_labels")
    obs, nuclei = sdata["table"].obs, sdata["nucleus_boundaries"]
    n = int((obs["cell_id"].to_numpy() != nuclei.loc[obs["cell_labels"], "cell_id"].to_numpy()).sum())
    assert n > 50
    with pytest.raises(
        ValueError,
        match=rf"^{n} of 98 rows are joined to the shape of another cell in 'nucleus_boundaries': `obs\['cell_id'\]` "
        r"is '\w+-1', and the shape 8 belongs to '\w+-1' .* `shapes.set_index\('cell_id'\)`.*instance_key='cell_id'",
    ):
        pk.pp.tile(sdata)
    assert "pekasc" not in sdata["table"].uns


def test_fit_predict_get_and_draw_on_labels(read_xenium: Reader) -> None:
    sdata = read_xenium()
    pk.pp.tile(sdata, **SIZE)
    adapter = pk.tl.fit_adapter(sdata, method=None, readout="ridge", progress=False)
    pk.tl.predict_expression(sdata, adapter, progress=False)
    adata = pk.get.expression(sdata)
    known = np.array([[c.x, c.y] for c in sdata.shapes["cell_boundaries"].loc[adata.obs["cell_id"]].centroid])
    steps = np.diff(adata.obsm["spatial"], axis=0), np.diff(known, axis=0)
    assert steps[0] == pytest.approx(steps[1], abs=1e-3)
    pk.pl.expression(sdata, adata.var_names[0])


def test_global_is_in_pixels_and_taking_it_for_um_is_refused(read_xenium: Reader) -> None:
    with pytest.raises(ValueError, match="1.471 um from `um_coordinate_system`, 1.25 um from the areas"):
        pk.pp.tile(read_xenium(), um_coordinate_system="global")


def test_shapes_in_pixels_are_not_taken_for_um(read_xenium: Reader) -> None:
    sdata = read_xenium()
    cells = sdata.shapes["cell_boundaries"]
    cells.geometry = cells.scale(1 / 0.85, 1 / 0.85, origin=(0, 0))
    set_transformation(cells, Identity(), "global")
    with pytest.raises(ValueError, match="does not guess"):
        pk.pp.tile(sdata)
    set_transformation(cells, Scale([0.85, 0.85], axes=("x", "y")), "um")
    pk.pp.tile(sdata, um_coordinate_system="um")
    assert _section(sdata)["mpp"] == pytest.approx(1.25, rel=1e-6)


def test_without_an_he_image_the_error_says_so(read_xenium: Reader) -> None:
    with pytest.raises(ValueError, match=r"With the channels 'DAPI', it is no H&E.*xenium_aligned_image"):
        pk.pp.tile(read_xenium(aligned_images=False))


def test_an_he_image_with_an_alpha_channel(read_xenium: Reader, xenium_folder: Path, tmp_path: Path) -> None:
    import spatialdata_io

    sdata = read_xenium(aligned_images=False)
    he = tifffile.imread(xenium_folder / "slide_he_image.ome.tif")
    rgba = np.dstack([he, np.full(he.shape[:2], 255, np.uint8)]).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a_he_image.ome.tif", rgba, photometric="minisblack", metadata={"axes": "CYX"})
    sdata.images["he_image"] = spatialdata_io.xenium_aligned_image(
        tmp_path / "a_he_image.ome.tif", xenium_folder / "slide_he_imagealignment.csv"
    )
    assert list(sdata.images["he_image"].coords["c"].values) == ["r", "g", "b", "a"]
    pk.pp.tile(sdata)
    assert _section(sdata)["image"] == "he_image"
    np.testing.assert_array_equal(pk.get.tiles(sdata)[7], _tiled(read_xenium)[7])


def test_labels_without_shapes_of_their_ids_are_refused(read_xenium: Reader) -> None:
    sdata = read_xenium(cells_boundaries=False)
    with pytest.raises(ValueError, match="annotates the labels 'cell_labels'.*no column of `obs` holds the ids"):
        pk.pp.tile(sdata)


def test_numbers_are_no_ids_of_shapes_that_do_not_say_so(read_xenium: Reader) -> None:
    sdata = read_xenium()
    del sdata.shapes["cell_boundaries"]
    # some boxes that happen to be numbered as the cells are
    boxes = read_xenium().shapes["cell_boundaries"]
    boxes.index = pd.RangeIndex(1, len(boxes) + 1)
    sdata.shapes["boxes"] = boxes
    with pytest.raises(ValueError, match="annotates the labels"):
        pk.pp.tile(sdata)


def test_cropped_written_and_read_again(read_xenium: Reader, tmp_path: Path) -> None:
    sdata = read_xenium()
    crop = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=[300, 300], max_coordinate=[900, 900], target_coordinate_system="global"
    )
    assert 0 < crop["table"].n_obs < sdata["table"].n_obs
    pk.pp.tile(crop)
    assert _section(crop)["mpp"] == pytest.approx(1.25, rel=1e-6)
    sdata.write(tmp_path / "xenium.zarr")
    back = sd.read_zarr(tmp_path / "xenium.zarr")
    pk.pp.tile(back)
    back.write(tmp_path / "tiled.zarr")
    assert pk.get.tiles(sd.read_zarr(tmp_path / "tiled.zarr")).sizes["tile"] == sdata["table"].n_obs


def test_two_slides_whose_cells_have_the_same_ids(xenium_folder: Path) -> None:
    import spatialdata_io

    # joining renames the coordinate systems of what it is given, so nothing is shared here
    read = {"nucleus_boundaries": False, "nucleus_labels": False}
    parts = {name: spatialdata_io.xenium(xenium_folder, **read) for name in ("a", "b")}
    # the cells of the second are elsewhere
    parts["b"].shapes["cell_boundaries"].geometry = parts["b"].shapes["cell_boundaries"].translate(30, 0)
    joined = sd.concatenate(parts, concatenate_tables=True, obs_names_make_unique=True)
    pk.pp.tile(joined, **SIZE)
    sections = joined["table"].uns["pekasc"]["tiles"]["sections"]
    assert {name: section["image"] for name, section in sections.items()} == {
        "cell_labels-a": "he_image-a",
        "cell_labels-b": "he_image-b",
    }
    moved = joined.shapes["cell_labels-b_tiles"].centroid.x - joined.shapes["cell_labels-a_tiles"].centroid.x
    assert moved.to_numpy() == pytest.approx(30, abs=1e-3)
