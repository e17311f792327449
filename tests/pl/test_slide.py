"""pl.slide: what is drawn lies where the tile lies, in um, on slides of any orientation."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from matplotlib.collections import PolyCollection
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity

import pekasc as pk
from pekasc._keys import write_uns
from pekasc.tiling import cell_corners

MPP = 2.0
SIZE: dict[str, Any] = {"tile_px": 14, "mpp": 4.0, "min_sharpness": None, "max_pen": None}  # 56 um
TURN = np.array([[1.6, -1.2, 300.0], [1.2, 1.6, 900.0], [0, 0, 1]])  # turned and shifted, 2 um per pixel
GENES = ["ERBB2", "GNAS", "NONE"]


def _slide(**systems: Any) -> SpatialData:
    """Return a slide of 800 x 600 um, dark on the left."""
    pixels = np.full((3, 300, 400), 240, np.uint8)
    pixels[:, :, :260] = 120
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=systems or {"he": Identity()})
    return SpatialData(images={"he": image}, attrs={"pekasc": {"image_mpp": {"he": MPP}}})


def _tiled(sdata: SpatialData | None = None, **options: Any) -> SpatialData:
    sdata = _slide() if sdata is None else sdata
    tissue = np.zeros((30, 40), dtype=bool)
    tissue[3:, :26] = True
    pk.pp.tile_grid(sdata, "he", **{**SIZE, "stride_um": 40, "tissue": tissue, **options})
    return sdata


def _predicted(sdata: SpatialData, table_name: str = "grid") -> AnnData:
    """Replace the table of tiles by one with genes, of which one tile and one gene have no prediction."""
    tiles = sdata[table_name]
    values = np.random.default_rng(0).normal(2, 1, (tiles.n_obs, 3)).astype(np.float32)
    values[4], values[:, 2] = np.nan, np.nan
    table = AnnData(obs=tiles.obs.copy(), var=pd.DataFrame(index=GENES), uns=dict(tiles.uns), obsm=dict(tiles.obsm))
    table.layers["peka"] = values
    table.obs["leiden"] = pd.Categorical(
        np.array(["b", "a", "c"])[np.arange(tiles.n_obs) % 3], categories=["c", "b", "a"]
    )
    table.obs.iloc[5, table.obs.columns.get_loc("leiden")] = np.nan
    write_uns(table, "peka", {"target": "log1p(counts per 10,000)"}, kind="prediction")
    del sdata.tables[table_name]
    sdata.tables[table_name] = table
    return table


@pytest.fixture(scope="module")
def _square() -> SpatialData:
    return _tiled()


@pytest.fixture
def square(_square: SpatialData) -> SpatialData:
    """A slide with a square grid and predictions; images and shapes are shared by the tests, tables are not."""
    sdata = SpatialData(
        images=dict(_square.images), shapes=dict(_square.shapes), tables={"grid": _square["grid"].copy()}
    )
    _predicted(sdata)
    return sdata


def _cells_of(ax: plt.Axes) -> np.ma.MaskedArray:
    """Return the array of the cells, which lie on the dimmed image."""
    dimmed, cells = ax.images
    assert dimmed.get_alpha() < 0.5 and cells.get_zorder() >= dimmed.get_zorder()
    return np.ma.asarray(cells.get_array())


def _on_grid(table: AnnData, values: np.ndarray) -> np.ndarray:
    row, col = table.obs["grid_row"].to_numpy(), table.obs["grid_col"].to_numpy()
    out = np.full((np.ptp(row) + 1, np.ptp(col) + 1), np.nan)
    out[row - row.min(), col - col.min()] = values
    return out


def test_tiles_kept_and_what_was_left_out(square: SpatialData) -> None:
    figure = pk.pl.slide(square)
    he, kept = figure.axes
    table = square["grid"]
    assert he.get_title() == "H&E" and he.get_ylabel() == "he"
    assert kept.get_title() == f"{table.n_obs} of 300 tiles"
    assert kept.get_xlabel().replace("\u00a0", " ").splitlines() == [
        "56 µm wide, 40 µm apart", f"left out: {300 - table.n_obs} with too little tissue",
    ]  # fmt: skip
    # the whole slide is shown, in um
    left, right, bottom, top = (*he.get_xlim(), *he.get_ylim())
    assert left < 0 and right > 800 and top < 0 and bottom > 600 and right - left < 1.1 * 800
    assert kept.get_xlim() == he.get_xlim() and kept.get_ylim() == he.get_ylim()
    picture, extent = he.images[0].get_array(), he.images[0].get_extent()
    x = np.linspace(extent[0], extent[1], picture.shape[1])
    assert picture[picture.shape[0] // 2, (x > 20) & (x < 500)].max() < 125
    assert picture[picture.shape[0] // 2, (x > 540) & (x < 780)].min() > 235
    (bar,) = he.patches
    assert bar.get_width() == 200 and he.texts[0].get_text() == "200 µm"
    shown = ~np.ma.getmaskarray(_cells_of(kept))
    np.testing.assert_array_equal(shown, np.isfinite(_on_grid(table, np.ones(table.n_obs))))
    low, high = square["he_grid"].total_bounds[:2] * MPP, square["he_grid"].total_bounds[2:] * MPP
    np.testing.assert_allclose(kept.images[1].get_extent(), [low[0], high[0], high[1], low[1]])


def test_a_gene_at_its_tiles(square: SpatialData) -> None:
    figure = pk.pl.slide(square, "ERBB2")
    table = square["grid"]
    values = table.layers["peka"][:, 0].astype(float)
    _, shown = figure.axes
    (bar,) = shown.child_axes
    array = _cells_of(shown)
    np.testing.assert_array_equal(array.filled(np.nan), _on_grid(table, values))
    assert np.isnan(values[4]) and np.ma.getmaskarray(array).any()
    limits = np.nanpercentile(values, (1, 99))
    np.testing.assert_allclose(shown.images[1].get_clim(), limits)
    np.testing.assert_allclose(bar.get_ylim(), limits)
    assert bar.get_ylabel() == "log1p(counts per 10k)"
    assert shown.get_title() == "ERBB2" and shown.title.get_style() == "italic"
    # the panel shows the tiles; the cell of a tile is centred on it
    x0, x1, y1, y0 = shown.images[1].get_extent()
    assert shown.get_xlim()[0] < x0 < x1 < shown.get_xlim()[1] < 700
    step = (x1 - x0) / array.shape[1]
    assert step == pytest.approx(40) and (y1 - y0) / array.shape[0] == pytest.approx(40)
    x, y = table.obsm["spatial"][7] * MPP
    assert array[int((y - y0) // 40), int((x - x0) // 40)] == values[7]


def test_several_panels_in_order_with_limits_of_their_own(square: SpatialData) -> None:
    table = square["grid"]
    figure = pk.pl.slide(square, ["GNAS", "tissue_fraction", "leiden", "ERBB2"])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["H&E", "GNAS", "tissue_fraction", "leiden", "ERBB2"]
    for ax, i in ((figure.axes[1], 1), (figure.axes[4], 0)):
        np.testing.assert_array_equal(_cells_of(ax).filled(np.nan), _on_grid(table, table.layers["peka"][:, i]))
    fraction = table.obs["tissue_fraction"].to_numpy()
    np.testing.assert_allclose(figure.axes[2].images[1].get_clim(), np.percentile(fraction, (1, 99)))
    assert figure.axes[2].title.get_style() == "normal"
    figure = pk.pl.slide(square, ["GNAS", "tissue_fraction"], vmin=0, vmax=9, cmap="magma", figsize=(7, 3))
    for ax in figure.axes[1:]:
        assert ax.images[1].get_clim() == (0, 9) and ax.images[1].get_cmap().name == "magma"
    assert tuple(figure.get_size_inches()) == (7, 3)


def test_a_turned_slide_is_drawn_along_its_grid() -> None:
    sdata = _tiled(_slide(um=Affine(TURN, ("x", "y"), ("x", "y"))), um_coordinate_system="um")
    table = _predicted(sdata)
    figure = pk.pl.slide(sdata, "ERBB2")
    he, shown = figure.axes
    array = _cells_of(shown)
    values = table.layers["peka"][:, 0]
    x0, _, _, y0 = shown.images[1].get_extent()
    at = table.obsm["spatial"] @ TURN[:2, :2].T + TURN[:2, 2]  # um
    col, row = np.floor((at - [x0, y0]) / 40).astype(int).T
    np.testing.assert_allclose((at - [x0, y0]) / 40 - np.column_stack([col, row]), 0.5, atol=1e-6)
    np.testing.assert_array_equal(array[row, col].filled(np.nan), values)
    assert array.count() == np.isfinite(values).sum()
    # the H&E beside it is turned as well: tissue under the tiles, white off the image
    picture, extent = he.images[0].get_array(), he.images[0].get_extent()
    mpp = (extent[1] - extent[0]) / picture.shape[1]
    px = np.floor((at - [extent[0], extent[3]]) / mpp).astype(int)
    assert (picture[px[:, 1], px[:, 0]] < 125).mean() > 0.95
    # the whole slide, where its tiles are shown
    corners = np.array([[0, 0], [400, 0], [0, 300], [400, 300]]) @ TURN[:2, :2].T + TURN[:2, 2]
    he, _ = pk.pl.slide(sdata).axes
    limits = np.array([he.get_xlim(), sorted(he.get_ylim())])
    np.testing.assert_allclose(limits, np.stack([corners.min(axis=0), corners.max(axis=0)], axis=1), atol=35)
    assert (limits[:, 0] < corners.min(axis=0)).all() and (limits[:, 1] > corners.max(axis=0)).all()


def test_hexagons_to_scale() -> None:
    sdata = _tiled(shape="hexagon")
    table = _predicted(sdata)
    _, shown = pk.pl.slide(sdata, "ERBB2").axes
    (cells,) = (c for c in shown.collections if isinstance(c, PolyCollection))
    known = np.isfinite(table.layers["peka"][:, 0])
    np.testing.assert_allclose(cells.get_offsets(), table.obsm["spatial"][known] * MPP)
    np.testing.assert_array_equal(cells.get_array(), table.layers["peka"][known, 0])
    np.testing.assert_allclose(cells.get_paths()[0].vertices[:-1], cell_corners(np.zeros((1, 2)), 40.0, "hexagon")[0])


@pytest.mark.parametrize("kind", ["polygons", "circles"])
def test_given_shapes_are_drawn_themselves(kind: str) -> None:
    sdata = _slide()
    at = np.array([[390.0, 10], [50, 60], [100, 120], [200, 200]])  # the first off tissue
    geometry = shapely.points(at)
    if kind == "polygons":
        geometry = shapely.box(*(at - 3).T, *(at + 3).T)
        geometry[2] = shapely.union(geometry[2], shapely.box(110, 120, 112, 122))  # of two parts
    frame = GeoDataFrame({"radius": 5.0} if kind == "circles" else None, geometry=geometry, index=[9, 3, 5, 7])
    scale = Affine(np.diag([2.0, 2.0, 1.0]), ("x", "y"), ("x", "y"))  # pixels of a coarser picture
    frame.geometry = frame.geometry.affine_transform([0.5, 0, 0, 0.5, 0, 0])
    sdata["cells"] = ShapesModel.parse(frame, transformations={"he": scale})
    _tiled(sdata, shapes="cells", stride_um=None, table_added="cell_tiles")
    table = sdata["cell_tiles"]
    table.obs["size"] = [1.0, 2.0, 3.0]
    he, kept = pk.pl.slide(sdata, table_name="cell_tiles").axes
    assert kept.get_title() == "3 of 4 tiles" and kept.get_xlabel().startswith("56 µm wide\n")
    _, shown = pk.pl.slide(sdata, "size", table_name="cell_tiles").axes
    (cells,) = (c for c in shown.collections if isinstance(c, PolyCollection))
    bounds = np.array([[*path.vertices.min(axis=0), *path.vertices.max(axis=0)] for path in cells.get_paths()])
    if kind == "polygons":
        assert cells.get_array().tolist() == [1, 2, 2, 3]
        np.testing.assert_allclose(bounds[[0, 3]], np.hstack([at[[1, 3]] * MPP - 6, at[[1, 3]] * MPP + 6]))
    else:  # a radius of 5 units of 2 pixels of 2 um
        assert cells.get_array().tolist() == [1, 2, 3]
        np.testing.assert_allclose(bounds, np.hstack([at[1:] * MPP - 20, at[1:] * MPP + 20]))


def test_rows_that_have_left_the_table(square: SpatialData) -> None:
    table = square["grid"]
    n = table.n_obs
    part = table[np.arange(n)[::-2]].copy()
    del square.tables["grid"]
    square.tables["grid"] = part
    _, kept = pk.pl.slide(square).axes
    assert kept.get_title() == f"{part.n_obs} of 300 tiles"
    assert f"{n - part.n_obs} not in the table any more" in kept.get_xlabel().replace("\u00a0", " ")
    _, shown = pk.pl.slide(square, "ERBB2").axes
    np.testing.assert_array_equal(
        _cells_of(shown).filled(np.nan), _on_grid(part, part.layers["peka"][:, 0])
    )  # fmt: skip


def test_an_image_of_several(square: SpatialData) -> None:
    attrs = {"pekasc": {"image_mpp": {"he": MPP, "other": MPP}}}
    second = _tiled(SpatialData(images={"he": square["he"]}, attrs=attrs), stride_um=80)
    tables = [square["grid"], second["grid"]]
    tables[1].obs["region"] = pd.Categorical(["other_grid"] * tables[1].n_obs)
    tables[1].obs_names = "other_" + tables[1].obs_names
    both = AnnData(obs=pd.concat([table.obs for table in tables]).astype({"region": "category"}))
    ours = tables[0].uns["pekasc"]
    sections = ours["tiles"]["sections"]
    sections = {**sections, "other_grid": {**sections["he_grid"], "image": "other"}}
    regions = {**tables[0].uns["spatialdata_attrs"], "region": ["he_grid", "other_grid"]}
    both.uns = {"pekasc": {**ours, "tiles": {**ours["tiles"], "sections": sections}}, "spatialdata_attrs": regions}
    shapes = {name.replace("he_", "other_"): frame for name, frame in second.shapes.items()}
    joined = SpatialData(
        images={"he": square["he"], "other": square["he"]}, shapes={**square.shapes, **shapes}, tables={"grid": both},
        attrs=attrs,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"tiles on several images: choose one with `image_name=`: \['he', 'other'\]"):
        pk.pl.slide(joined)
    _, kept = pk.pl.slide(joined, image_name="he").axes
    assert kept.get_title() == f"{tables[0].n_obs} of 300 tiles"
    he, kept = pk.pl.slide(joined, image_name="other").axes  # what was left out there is not recorded
    assert he.get_ylabel() == "other" and kept.get_title() == f"{tables[1].n_obs} tiles"
    with pytest.raises(KeyError, match=r"no tiles on the image 'third', but on \['he', 'other'\]"):
        pk.pl.slide(joined, image_name="third")


def test_what_is_plotted_stays_as_it_is(square: SpatialData) -> None:
    before = square["grid"].copy()
    pk.pl.slide(square, ["ERBB2", "leiden", "tissue_fraction"])
    after = square["grid"]
    pd.testing.assert_frame_equal(after.obs, before.obs)
    assert after.uns.keys() == before.uns.keys()
    np.testing.assert_array_equal(after.layers["peka"], before.layers["peka"])
    assert set(square.shapes) == {"he_grid", "he_grid_tiles"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"table_name": "gird"}, KeyError, r"Table 'gird' not found .*\['grid', 'cells'\], with tiles: \['grid'\]\. "
         r"`pk\.pp\.tile_grid\(sdata, image_name\)` makes a table of tiles"),
        ({"table_name": "cells"}, KeyError, r"The table 'cells' has no tiles\. Tables with tiles: \['grid'\]"),
        ({"color": "ERBB"}, KeyError, r"'ERBB' is neither a column of `obs` .* nor one of its 3 genes\. "
         "Did you mean ERBB2"),
        ({"color": "NONE"}, ValueError, r"Gene 'NONE' was not predicted: layers\['peka'\] holds only NaN"),
        ({"color": "ERBB2", "layer": "pekka"}, KeyError, r"Layer 'pekka' not found\. Available layers: \['peka'\]"),
        ({"color": "ERBB2", "cmap": "viridiss"}, ValueError, "viridiss"),
    ],
)  # fmt: skip
def test_bad_input(square: SpatialData, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    square.tables["cells"] = AnnData(np.ones((2, 2), np.float32))
    with pytest.raises(error, match=message):
        pk.pl.slide(square, **arguments)
    assert not plt.get_fignums()


def test_no_image_and_no_slide(square: SpatialData) -> None:
    del square.images["he"]
    with pytest.raises(KeyError, match=r"lie on the image 'he', which is not in `sdata.images` any more: \[\]"):
        pk.pl.slide(square)
    with pytest.raises(TypeError, match="expected a SpatialData, got AnnData"):
        pk.pl.slide(square["grid"])
