"""Shapes of a table that annotates labels, and shapes in um."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, set_transformation

from pekasc._sections._shapes import check_cells, in_micrometers, shapes_of

NAMES = [f"cell{i}" for i in range(6)]


def _squares(index: list, side: float = 2.0, name: str | None = None) -> GeoDataFrame:
    geometry = [shapely.box(10 * i, 0, 10 * i + side, side) for i in range(len(index))]
    return ShapesModel.parse(GeoDataFrame(geometry=geometry, index=pd.Index(index, name=name)))


def _sdata(region: str = "cell_labels", **obs: object) -> SpatialData:
    table = AnnData(np.ones((6, 2), dtype=np.float32))
    table.obs = table.obs.assign(region=pd.Categorical([region] * 6), label=np.arange(1, 7), **obs)
    labels = Labels2DModel.parse(np.zeros((8, 8), dtype=np.int32), dims=("y", "x"))
    table = TableModel.parse(table, region=region, region_key="region", instance_key="label")
    return SpatialData(labels={region: labels}, tables={"table": table})


@pytest.mark.parametrize(("region", "taken"), [("cell_labels", "cells"), ("nucleus_labels", "nuclei")])
def test_polygons_before_circles_and_nuclei_only_for_nuclei(region: str, taken: str) -> None:
    sdata = _sdata(region, cell_id=NAMES)
    circles = ShapesModel.parse(np.zeros((6, 2)), geometry=0, radius=1, index=pd.Index(NAMES))
    for name in ("circles", "nuclei", "cells"):
        sdata.shapes[name] = circles if name == "circles" else _squares(NAMES)
    assert shapes_of(sdata, sdata["table"], region) == (taken, "cell_id")


def test_others_of_the_same_kind_are_not_chosen_between() -> None:
    sdata = _sdata(cell_id=NAMES)
    for name in ("cells", "cells_tiles"):
        sdata.shapes[name] = _squares(NAMES)
    assert shapes_of(sdata, sdata["table"], "cell_labels") == ("cells", "cell_id")
    sdata.shapes["expanded"] = _squares(NAMES)
    with pytest.raises(ValueError, match="holds the ids of 'cells' and of 'expanded'. Let the table annotate one"):
        shapes_of(sdata, sdata["table"], "cell_labels")
    # shapes elsewhere are of another slide, whose cells may have the same ids
    set_transformation(sdata.shapes["expanded"], {"other": Identity()}, set_all=True)
    assert shapes_of(sdata, sdata["table"], "cell_labels") == ("cells", "cell_id")


def test_shapes_that_lack_an_id_are_not_taken() -> None:
    sdata = _sdata(cell_id=NAMES)
    sdata.shapes["cells"] = _squares(NAMES[:-1])
    with pytest.raises(ValueError, match="no column of `obs` holds the ids of any of \\['cells'\\]"):
        shapes_of(sdata, sdata["table"], "cell_labels")


@pytest.mark.parametrize(("name", "found"), [("label", True), (None, False), ("spot", False)])
def test_numbers_are_ids_only_of_an_index_of_their_name(name: str | None, found: bool) -> None:
    sdata = _sdata()
    sdata.shapes["cells"] = _squares(list(range(1, 7)), name=name)
    if found:
        assert shapes_of(sdata, sdata["table"], "cell_labels") == ("cells", "label")
    else:
        with pytest.raises(ValueError, match="annotates the labels"):
            shapes_of(sdata, sdata["table"], "cell_labels")


@pytest.mark.parametrize(("side", "um"), [(2.0, True), (1.95, True), (2.0 * 0.85, False), (2.0 / 0.2125, False)])
def test_areas_say_um(side: float, um: bool) -> None:
    sdata = _sdata(cell_area=4.0, nucleus_area=1.0, transcript_counts=9, control_probe_counts=0)
    table, rows = sdata["table"], np.arange(6)
    shapes = _squares(NAMES, side)
    assert in_micrometers(table, rows, "cell_boundaries", shapes, np.array(NAMES)) is um
    assert in_micrometers(table, rows, "nucleus_boundaries", _squares(NAMES, side / 2), np.array(NAMES)) is um
    del table.obs["transcript_counts"]  # a column of that name alone is somebody's own
    assert not in_micrometers(table, rows, "cell_boundaries", shapes, np.array(NAMES))


def test_cells_without_a_nucleus_do_not_count() -> None:
    area = [1.0, 1.0, np.nan, 0.0, 1.0, 1.0]
    sdata = _sdata(cell_area=4.0, nucleus_area=area, transcript_counts=9, control_probe_counts=0)
    args = (np.arange(6), "nuclei", _squares(NAMES, 1.0), np.array(NAMES))
    assert in_micrometers(sdata["table"], *args)
    sdata["table"].obs["nucleus_area"] = np.nan
    assert not in_micrometers(sdata["table"], *args)


def _numbered(cells: list) -> GeoDataFrame:
    """Return shapes with numbers of their own, and the cells that they belong to."""
    return _squares(list(range(1, 7))).assign(cell_id=cells)


def test_shapes_of_other_cells_are_refused() -> None:
    table = _sdata(cell_id=NAMES)["table"]
    rows, ids = np.arange(6), np.arange(1, 7)
    check_cells(table, rows, "nuclei", _numbered(NAMES), ids)
    check_cells(table, rows, "nuclei", _squares(list(ids)), ids)  # which say nothing of cells
    check_cells(table, rows[:2], "nuclei", _numbered([NAMES[1], NAMES[0], *NAMES[2:]]), np.array([2, 1]))
    with pytest.raises(
        ValueError,
        match=r"^2 of 6 rows are joined to the shape of another cell in 'nuclei': `obs\['cell_id'\]` is 'cell4', "
        r"and the shape 5 belongs to 'cell5' .*`shapes.set_index\('cell_id'\)`.*`instance_key='cell_id'`",
    ):
        check_cells(table, rows, "nuclei", _numbered([*NAMES[:4], NAMES[5], NAMES[4]]), ids)
    # one of no known cell is no contradiction
    check_cells(table, rows, "nuclei", _numbered([*NAMES[:5], None]), ids)


def test_two_ways_of_naming_cells_do_not_contradict() -> None:
    rows, ids = np.arange(6), np.arange(1, 7)
    numbers = [float(i) for i in range(1, 7)]
    check_cells(_sdata(cell_id=NAMES)["table"], rows, "cells", _numbered(numbers), ids)
    table = _sdata(cell_id=[str(i) for i in ids])["table"]
    check_cells(table, rows, "cells", _numbered(numbers), ids)  # 1.0 is "1"
    with pytest.raises(ValueError, match="^6 of 6 rows .* is '1', and the shape 1 belongs to '6'"):
        check_cells(table, rows, "cells", _numbered(numbers[::-1]), ids)
