"""An object laid out as sopa's: cells that it segmented, in pixels, beside its patches of the image.

The layout is what `sopa.make_image_patches`, `sopa.segmentation` and `sopa.aggregate` (2.2) wrote into a Xenium slide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, set_transformation

import pekasc as pk


@pytest.fixture
def sdata(read_xenium: Callable[..., SpatialData]) -> SpatialData:
    """Return the slide with sopa's elements, in pixels of the morphology image."""
    sdata = read_xenium(
        cells_boundaries=False, nucleus_boundaries=False, cells_labels=False, nucleus_labels=False, cells_table=False
    )
    at = [(x, y) for y in range(300, 900, 40) for x in range(300, 900, 40)]
    names = [f"aaaaa{chr(97 + i // 16)}{chr(97 + i % 16)}a-1" for i in range(len(at))]
    cells = [shapely.box(x - 8, y - 8, x + 8, y + 8) for x, y in at]
    patches = [shapely.box(x, y, x + 400, y + 400) for x in range(0, 1176, 350) for y in range(0, 1176, 350)]
    to_global = {"transformations": {"global": Identity()}}
    sdata.shapes["cellpose_boundaries"] = ShapesModel.parse(GeoDataFrame(geometry=cells, index=names), **to_global)
    sdata.shapes["image_patches"] = ShapesModel.parse(GeoDataFrame(geometry=patches), **to_global)
    table = AnnData(
        np.random.default_rng(0).poisson(3, (len(at), 12)).astype(np.float32),
        obs=pd.DataFrame({"slide": "morphology_focus", "cell_id": names, "area": 256.0}, index=names),
        uns={"sopa_attrs": {"transcripts": True, "intensities": True}},
    )
    table.obs["region"] = pd.Categorical(["cellpose_boundaries"] * len(at))
    table.obsm["spatial"] = np.array(at, dtype=np.float64)
    table.obsm["intensities"] = pd.DataFrame({"DAPI": np.ones(len(at))}, index=names)
    sdata.tables["table"] = TableModel.parse(
        table, region="cellpose_boundaries", region_key="region", instance_key="cell_id"
    )
    sdata.attrs.update(
        cell_segmentation_image="morphology_focus",
        tissue_segmentation_image="he_image",
        boundaries_shapes="cellpose_boundaries",
    )
    return sdata


def test_the_pixel_size_is_asked_for_once(sdata: SpatialData) -> None:
    # the cells are in pixels, whatever the reader of the slide was
    with pytest.raises(ValueError, match=r"`image_mpp=\{'he_image': \.\.\.\}`"):
        pk.pp.tile(sdata)
    pk.pp.tile(sdata, image_mpp={"he_image": 1.25})
    assert set(sdata.shapes) == {"cellpose_boundaries", "cellpose_boundaries_tiles", "image_patches"}
    assert pk.get.tiles(sdata).sizes["tile"] == sdata["table"].n_obs
    adata = pk.get.expression(sdata, layer=None)
    assert list(adata.obsm["intensities"].columns) == ["DAPI"]


def test_a_system_in_um_says_it(sdata: SpatialData) -> None:
    set_transformation(sdata.shapes["cellpose_boundaries"], Scale([0.85, 0.85], axes=("x", "y")), "um")
    pk.pp.tile(sdata, um_coordinate_system="um")
    section = sdata["table"].uns["pekasc"]["tiles"]["sections"]["cellpose_boundaries"]
    assert (section["image"], section["mpp"]) == ("he_image", pytest.approx(1.25, rel=1e-6))
