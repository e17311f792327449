"""tl.rasterize_expression: a tile's centre is its pixel's centre, under any affine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, TableModel
from spatialdata.transformations import Affine, Identity, get_transformation

import pekasc as pk
from pekasc._keys import read_uns

TURNED = np.array([[0.8, -0.6, 130.0], [0.9, 1.2, -40.0], [0.0, 0.0, 1.0]])
GENES = ["A", "B", "C", "D"]


def slide(*names: str, stride_um: float = 40.0, shape: str = "square", table: bool = True) -> SpatialData:
    """Return slides of 600 x 440 um at 2 um per pixel, turned in the world, with a predicted grid each."""
    rng = np.random.default_rng(0)
    out = SpatialData(attrs={"pekasc": {"image_mpp": dict.fromkeys(names, 2.0)}})
    for name in names:
        pixels = rng.integers(0, 255, (3, 220, 300), dtype=np.uint8)
        systems = {name: Identity(), "world": Affine(TURNED, ("x", "y"), ("x", "y"))}
        out.images[name] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=systems, scale_factors=[2])
        pk.pp.tile_grid(
            out, name, tile_px=14, mpp=4.0, stride_um=stride_um, shape=shape, tissue=False, min_sharpness=None,
            max_pen=None, table_added=f"grid_{name}" if len(names) > 1 else "grid",
        )  # fmt: skip
    if table:
        for name in list(out.tables):
            predicted(out, name)
    return out


def predicted(sdata: SpatialData, table_name: str = "grid", seed: int = 0) -> None:
    """Give a grid predictions: "C" in half of the rows, "D" in none."""
    old = sdata[table_name]
    values = np.random.default_rng(seed).normal(size=(old.n_obs, len(GENES))).astype(np.float32)
    values[: old.n_obs // 2, 2] = np.nan
    values[:, 3] = np.nan
    table = AnnData(obs=old.obs, var=pd.DataFrame(index=GENES), obsm=dict(old.obsm), uns=dict(old.uns))
    table.layers["peka"] = values
    del sdata.tables[table_name]
    sdata.tables[table_name] = table


def finest(sdata: SpatialData, name: str) -> Any:
    return sdata.images[name]["scale0"]["image"]


def at(sdata: SpatialData, name: str, points: np.ndarray, system: str, level: str = "scale0") -> np.ndarray:
    """Return the values of the pixels whose centres are at points of a coordinate system."""
    image = sdata.images[name]
    to_system = get_transformation(image, system).to_affine_matrix(("x", "y"), ("x", "y"))
    if level != "scale0":  # levels have transformations of their own
        to_system = get_transformation(image[level]["image"], system).to_affine_matrix(("x", "y"), ("x", "y"))
    pixels = (np.linalg.inv(to_system) @ np.column_stack([points, np.ones(len(points))]).T).T[:, :2]
    np.testing.assert_allclose(pixels % 1, 0.5, atol=1e-6)
    x, y = np.floor(pixels).astype(int).T
    return np.asarray(image[level]["image"].values[:, y, x]).T


def centres(sdata: SpatialData, shapes: str, system: str) -> np.ndarray:
    frame = sdata.shapes[shapes]
    matrix = get_transformation(frame, system).to_affine_matrix(("x", "y"), ("x", "y"))
    points = np.column_stack([frame.geometry.centroid.x, frame.geometry.centroid.y, np.ones(len(frame))])
    return np.asarray((points @ matrix.T)[:, :2])


@pytest.mark.parametrize("system", ["he", "world"])
def test_the_centre_of_a_tile_is_the_centre_of_its_pixel(system: str) -> None:
    sdata = slide("he")
    pk.tl.rasterize_expression(sdata, ["B", "A", "C"])
    raster = finest(sdata, "he_grid_peka")
    assert list(raster.coords["c"].values) == ["B", "A", "C"]
    assert raster.dtype == np.float32
    found = at(sdata, "he_grid_peka", centres(sdata, "he_grid", system), system)
    np.testing.assert_array_equal(found, sdata["grid"].layers["peka"][:, [1, 0, 2]])
    record = read_uns(sdata["grid"], "peka_raster")
    assert record["genes"] == ["B", "A", "C"] and record["stride_um"] == {"he_grid": 40.0}


def test_pixels_without_a_tile_are_nan_and_coarser_levels_are_means() -> None:
    sdata = slide("he")
    table = sdata["grid"][::3].copy()  # also in another order
    sdata.tables["grid"] = table[np.random.default_rng(1).permutation(table.n_obs)].copy()
    pk.tl.rasterize_expression(sdata, ["A"])
    raster = finest(sdata, "he_grid_peka").values
    assert np.isfinite(raster).sum() == sdata["grid"].n_obs < raster.size
    found = at(sdata, "he_grid_peka", centres(sdata, "he_grid", "world")[sdata["grid"].obs["tile_id"]], "world")
    np.testing.assert_array_equal(found, sdata["grid"].layers["peka"][:, :1])
    coarse = sdata.images["he_grid_peka"]["scale1"]["image"].values
    height, width = raster.shape[1:]
    blocks = raster.reshape(1, height // 2, 2, width // 2, 2)
    counted = np.isfinite(blocks).sum(axis=(2, 4))
    expected = np.where(counted, np.nansum(blocks, axis=(2, 4)) / np.maximum(counted, 1), np.nan)
    np.testing.assert_allclose(coarse, expected, rtol=1e-6)


def test_pixels_without_a_tile_may_have_a_number() -> None:
    sdata = slide("he")
    sdata.tables["grid"] = sdata["grid"][::3].copy()
    pk.tl.rasterize_expression(sdata, ["A", "C"], key_added="nan")
    pk.tl.rasterize_expression(sdata, ["A", "C"], key_added="filled", fill=-9)
    for level in ("scale0", "scale1"):
        expected = sdata.images["he_grid_nan"][level]["image"].values
        found = sdata.images["he_grid_filled"][level]["image"]
        assert np.isnan(expected).any() and found.dtype == np.float32
        np.testing.assert_array_equal(found.values, np.where(np.isnan(expected), -9, expected))
    fails(sdata, TypeError, "`fill` must be a number, got 'black'", fill="black")


def test_coarser_levels_lie_where_the_finest_lies() -> None:
    sdata = slide("he", stride_um=44.0)  # 14 x 10 tiles: an odd number after one level
    pk.tl.rasterize_expression(sdata, "A")
    levels = [sdata.images["he_grid_peka"][f"scale{i}"]["image"] for i in (0, 1)]
    ends = []
    for level in levels:
        matrix = get_transformation(level, "world").to_affine_matrix(("x", "y"), ("x", "y"))
        ends.append(matrix @ [level.sizes["x"], level.sizes["y"], 1])
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


def test_a_stored_layer_is_read_a_block_of_genes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = slide("he")
    plain = slide("he")
    pk.tl.rasterize_expression(plain, ["A", "C"])
    values = sdata["grid"].layers["peka"]
    read: list[int] = []

    def block(column: int) -> np.ndarray:
        read.append(column)
        return values[:, [column]]

    from dask import delayed

    columns = [da.from_delayed(delayed(block)(i), (len(values), 1), np.float32) for i in range(len(GENES))]
    sdata["grid"].layers["peka"] = da.concatenate(columns, axis=1)
    monkeypatch.setattr("pekasc.tl._rasterize_expression._BLOCK_BYTES", 1)  # a gene at a time
    pk.tl.rasterize_expression(sdata, ["A", "C"])
    assert set(read) == {0, 2}
    read.clear()
    raster = finest(sdata, "he_grid_peka")
    assert raster.data.chunks[0] == (1, 1)
    raster[0].compute()
    assert set(read) == {0}
    np.testing.assert_array_equal(raster.values, finest(plain, "he_grid_peka").values)


def test_predictions_in_a_store(tiled: SpatialData, frozen: pk.Adapter, tmp_path: Path) -> None:
    pk.pp.tile_grid(tiled, "P2S1_he", tile_px=56, mpp=2.0, stride_um=60)
    pk.tl.predict_expression(tiled, frozen, table_name="grid", store=tmp_path / "store", progress=False)
    assert isinstance(tiled["grid"].layers["peka"], da.Array)
    genes = list(frozen.genes[:2])
    pk.tl.rasterize_expression(tiled, genes)
    found = at(tiled, "P2S1_he_grid_peka", centres(tiled, "P2S1_he_grid", "P2S1"), "P2S1")
    expected = pk.get.expression(tiled, genes=genes, table_name="grid").X
    np.testing.assert_array_equal(found, expected)
    # three channels of floats are no H&E: the section keeps its image
    pk.tl.rasterize_expression(tiled, list(frozen.genes[:3]), key_added="three")
    pk.pp.tile(tiled, tile_px=56, mpp=2.0)
    assert tiled["table"].uns["pekasc"]["tiles"]["sections"]["P2S1_spots"]["image"] == "P2S1_he"


def test_several_slides_have_an_image_each() -> None:
    sdata = slide("a", "b")
    for name in ("a", "b"):
        sdata[f"grid_{name}"].obs_names = [f"{name}{i}" for i in range(sdata[f"grid_{name}"].n_obs)]
    predicted(sdata, "grid_b", seed=1)
    tables = [sdata["grid_a"], sdata["grid_b"]]
    both = sd.concatenate(
        [SpatialData(tables={"grid": t}) for t in tables], concatenate_tables=True, merge="same", uns_merge="first"
    )["grid"]
    records = [read_uns(t, "tiles") for t in tables]
    both.uns["pekasc"]["tiles"] = {
        **records[0], "sections": {**records[0]["sections"], **records[1]["sections"]}, "kind": "tiles"
    }  # fmt: skip
    sdata.tables["grid"] = both
    pk.tl.rasterize_expression(sdata, ["A", "B"])
    for name, table in zip("ab", tables, strict=True):
        region = f"{name}_grid_{name}"
        found = at(sdata, f"{region}_peka", centres(sdata, region, "world"), "world")
        np.testing.assert_array_equal(found, table.layers["peka"][:, :2])


def test_it_is_written_and_read_and_replaced(tmp_path: Path) -> None:
    sdata = slide("he")
    pk.tl.rasterize_expression(sdata, ["A", "B"])
    pk.tl.rasterize_expression(sdata, ["C"])
    pk.tl.rasterize_expression(sdata, ["A"], key_added="one")
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    assert {"he_grid_peka", "he_grid_one"} <= set(back.images)
    found = at(back, "he_grid_peka", centres(back, "he_grid", "world"), "world")
    np.testing.assert_array_equal(found, sdata["grid"].layers["peka"][:, [2]])
    pk.tl.rasterize_expression(back, ["B"])  # and goes on where it was
    assert list(finest(back, "he_grid_peka").coords["c"].values) == ["B"]


def test_bins_of_a_table_that_pp_tile_tiled(scene: Any) -> None:
    x, y = np.meshgrid(np.arange(5) * 30.0 + 120, np.arange(4) * 30.0 + 100)
    sdata = scene(centres=np.column_stack([x.ravel(), y.ravel()]), px_to_cs=[[0.9, -0.2, 0], [0.2, 0.9, 0], [0, 0, 1]])
    pk.pp.tile(sdata, tile_px=10, mpp=1.0, um_coordinate_system="um")
    table = sdata["table"]
    table.layers["half"] = np.arange(table.n_obs * table.n_vars, dtype=float).reshape(table.shape) / 2
    pk.tl.rasterize_expression(sdata, table.var_names[0], layer="half", table_name="table")
    (name,) = set(sdata.images) - {name for name in sdata.images if not name.endswith("_half")}
    assert finest(sdata, name).shape == (1, 4, 6)  # five columns, made even
    region = name.removesuffix("_half")
    found = at(sdata, name, centres(sdata, region, "um"), "um")
    np.testing.assert_array_equal(found[:, 0], table.layers["half"][:, 0])


def fails(sdata: SpatialData, error: type[Exception], match: str, genes: Any = ("A",), **kwargs: Any) -> None:
    images, records = set(sdata.images), {name: set(table.uns["pekasc"]) for name, table in sdata.tables.items()}
    with pytest.raises(error, match=match):
        pk.tl.rasterize_expression(sdata, genes, **kwargs)
    assert set(sdata.images) == images
    assert {name: set(table.uns["pekasc"]) for name, table in sdata.tables.items()} == records


def test_what_is_not_there() -> None:
    sdata = slide("he")
    fails(sdata, KeyError, "Table 'griid' not found .* Available tables: \\['grid'\\]", table_name="griid")
    fails(sdata, KeyError, "Layer 'peak' not found. Available layers: \\['peka'\\]. Predict first", layer="peak")
    fails(sdata, KeyError, "\\['E'\\] not found in `var_names`", ["A", "E"])
    fails(sdata, ValueError, "`genes=` is empty: name at least one gene", [])
    fails(sdata, ValueError, "has no values of \\['D'\\] in these sections: they were not predicted", ["A", "D"])
    fails(sdata, ValueError, "cannot be stored", key_added="a b")
    fails(slide("he", table=False), KeyError, "Layer 'peka' not found.*tl.predict_expression\\(")


def test_a_gene_of_few_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = slide("he")
    sdata["grid"].layers["peka"][1, 3] = 2.0  # not among the sample
    monkeypatch.setattr("pekasc.tl._rasterize_expression._SAMPLE", 2)
    pk.tl.rasterize_expression(sdata, ["A", "D"])
    assert np.nansum(finest(sdata, "he_grid_peka").values[1]) == 2.0


def test_tiles_that_pixels_do_not_fit() -> None:
    fails(slide("he", shape="hexagon"), ValueError, "is hexagonal, and pixels are square")
    sdata = slide("he")
    record = dict(read_uns(sdata["grid"], "grid"), stride_um=39.0)
    sdata["grid"].uns["pekasc"] = {**sdata["grid"].uns["pekasc"], "grid": record}
    fails(sdata, ValueError, "'he_grid' cannot become an image.*39 um apart do not lie on a square lattice")


def test_a_name_that_is_taken() -> None:
    sdata = slide("he")
    sdata.images["he_grid_peka"] = sdata.images["he"]
    fails(sdata, ValueError, "'he_grid_peka' is taken by `sdata.images\\['he_grid_peka'\\]`")
    fails(sdata, ValueError, "'he_grid_tiles' is taken by `sdata.shapes", key_added="tiles")


def test_annotation_by_tables_stays_valid() -> None:
    sdata = slide("he")
    pk.tl.rasterize_expression(sdata, ["A"])
    TableModel().validate(sdata["grid"])
