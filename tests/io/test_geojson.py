"""io.write_geojson: outlines in pixels of the image, classes with colours, measurements; what QuPath reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Identity

import pekasc as pk

GENES = ["A", "B", "C"]
TURNED = Affine(np.array([[0.0, -2.0, 50.0], [2.0, 0.0, 7.0], [0, 0, 1]]), ("x", "y"), ("x", "y"))
# the schema of RFC 7946 for what is written, with the properties that QuPath writes (PathObjectTypeAdapters)
POSITION = {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}}
RINGS = {"type": "array", "items": {"type": "array", "minItems": 4, "items": POSITION}}
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["type", "features"], "additionalProperties": False,
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array", "minItems": 1,
            "items": {
                "type": "object", "required": ["type", "id", "geometry", "properties"], "additionalProperties": False,
                "properties": {
                    "type": {"const": "Feature"}, "id": {"type": "string"},
                    "geometry": {
                        "oneOf": [
                            {"properties": {"type": {"const": "Polygon"}, "coordinates": RINGS}},
                            {"properties": {"type": {"const": "MultiPolygon"},
                                            "coordinates": {"type": "array", "items": RINGS}}},
                        ],
                        "required": ["type", "coordinates"], "additionalProperties": True,
                    },
                    "properties": {
                        "type": "object", "required": ["objectType"], "additionalProperties": False,
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection", "tile"]},
                            "classification": {
                                "type": "object", "required": ["name", "color"], "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string", "minLength": 1},
                                    "color": {"type": "array", "minItems": 3, "maxItems": 3,
                                              "items": {"type": "integer", "minimum": 0, "maximum": 255}},
                                },
                            },
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def slide(shape: str = "square", name: str = "he") -> SpatialData:
    """Return a slide of 600 x 440 um at 2 um per pixel with a predicted grid of 40 um, and classes of its tiles."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, 220, 300), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations={"he": Identity(), "world": TURNED})
    sdata = SpatialData(images={name: image}, attrs={"pekasc": {"image_mpp": {name: 2.0}}})
    pk.pp.tile_grid(
        sdata, name, tile_px=28, mpp=2.0, stride_um=40, shape=shape, tissue=False, min_sharpness=None, max_pen=None
    )
    old = sdata["grid"]
    values = np.random.default_rng(1).normal(size=(old.n_obs, 3)).astype(np.float32)
    values[0] = np.nan
    values[5, 1] = np.nan
    values[:, 2] = np.nan
    table = AnnData(
        obs=old.obs, var=pd.DataFrame(index=GENES), obsm=dict(old.obsm), uns=dict(old.uns), layers={"peka": values}
    )
    left = (old.obsm["spatial"][:, 0] < 150).tolist()
    table.obs["leiden"] = pd.Categorical(np.where(left, "0", "1"), categories=["0", "1", "2"])
    table.obs.loc[table.obs_names[:3], "leiden"] = np.nan
    table.uns["leiden_colors"] = ["#ff0000", "#00ff80", "#0000ff"]
    del sdata.tables["grid"]
    sdata.tables["grid"] = table
    return sdata


def written(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    collection = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(collection, SCHEMA)
    found: list[dict[str, Any]] = collection["features"]
    ids = [str(UUID(feature["id"])) for feature in found]
    assert len(set(ids)) == len(ids)
    return found


def polygon(feature: dict[str, Any]) -> Any:
    return shapely.geometry.shape(feature["geometry"])


@pytest.mark.parametrize("name", ["a.geojson", "a.json", "a.geojson.gz"])
def test_classes_and_genes_of_tiles(tmp_path: Path, name: str) -> None:
    sdata = slide()
    pk.io.write_geojson(sdata, tmp_path / name, classes="leiden", genes=["B", "A"])
    found = written(tmp_path / name)
    table = sdata["grid"]
    assert len(found) == table.n_obs - 1  # the first has neither class nor value
    for feature, (row, obs) in zip(found, list(enumerate(table.obs.itertuples()))[1:], strict=True):
        # 40 um are 20 px; in pixels of the image, whatever its coordinate systems, y down
        np.testing.assert_allclose(polygon(feature).bounds[:2], table.obsm["spatial"][row] - 10)
        assert polygon(feature).area == pytest.approx(400)
        assert polygon(feature).exterior.is_ccw
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        color = {"0": [255, 0, 0], "1": [0, 255, 128]}
        expected = None if pd.isna(obs.leiden) else {"name": obs.leiden, "color": color[obs.leiden]}
        assert properties.get("classification") == expected
        values = {gene: v for gene, v in zip("BA", table.layers["peka"][row, [1, 0]], strict=True) if np.isfinite(v)}
        assert properties["measurements"] == pytest.approx(values)
    assert "B" not in found[4]["properties"]["measurements"]


def test_the_same_file_in_every_run_and_other_geometry_readers(tmp_path: Path) -> None:
    import geopandas

    for name in ("a.geojson.gz", "b.geojson.gz"):
        pk.io.write_geojson(slide(), tmp_path / name, genes="A")
    a, b = ((tmp_path / name).read_bytes() for name in ("a.geojson.gz", "b.geojson.gz"))
    assert a == b
    (tmp_path / "a.geojson").write_bytes(gzip.decompress(a))
    frame = geopandas.read_file(tmp_path / "a.geojson")
    assert len(frame) == slide()["grid"].n_obs - 1 and frame.geometry.is_valid.all()


def test_tiles_of_a_class_are_merged(tmp_path: Path) -> None:
    sdata = slide()
    pk.io.write_geojson(sdata, tmp_path / "a.geojson", classes="leiden", genes=["A", "B"], merge=True)
    found = written(tmp_path / "a.geojson")
    assert [feature["properties"]["classification"]["name"] for feature in found] == ["0", "1"]
    table = sdata["grid"]
    for feature in found:
        name = feature["properties"]["classification"]["name"]
        rows = (table.obs["leiden"] == name).to_numpy()
        assert feature["properties"]["objectType"] == "annotation"
        assert polygon(feature).area == pytest.approx(400 * rows.sum())
        assert polygon(feature).geom_type == "Polygon" and not polygon(feature).interiors  # no slivers
        means = np.nanmean(table.layers["peka"][rows][:, :2], axis=0)
        assert feature["properties"]["measurements"] == pytest.approx({"A": means[0], "B": means[1]}, rel=1e-5)


def test_outlines_may_be_the_tiles_or_hexagons(tmp_path: Path) -> None:
    pk.io.write_geojson(slide(), tmp_path / "a.geojson", genes="A", outline="tiles", object_type="tile")
    found = written(tmp_path / "a.geojson")
    assert {round(polygon(feature).area) for feature in found} == {28 * 28}
    assert {feature["properties"]["objectType"] for feature in found} == {"tile"}
    sdata = slide(shape="hexagon")
    pk.io.write_geojson(sdata, tmp_path / "b.geojson", classes="leiden", colors={"0": "yellow"})
    found = written(tmp_path / "b.geojson")
    assert {len(polygon(feature).exterior.coords) for feature in found} == {7}
    assert found[0]["properties"]["classification"]["name"] in "01"
    colors = {f["properties"]["classification"]["name"]: f["properties"]["classification"]["color"] for f in found}
    assert colors == {"0": [255, 255, 0], "1": [0, 255, 128]}


def test_spots_are_circles_in_pixels_of_a_turned_image(tmp_path: Path, scene: Any) -> None:
    turn = np.array([[0.9, -0.3, 15.0], [0.3, 0.9, -20.0], [0, 0, 1]])
    sdata = scene(px_to_cs=turn)
    pk.pp.tile(sdata, tile_px=10, mpp=1.0, um_coordinate_system="um")
    table = sdata["table"]
    table.layers["half"] = np.full(table.shape, 0.5)
    pk.io.write_geojson(sdata, tmp_path / "a.geojson", genes=table.var_names[0], layer="half", table_name="table")
    found = written(tmp_path / "a.geojson")
    (region,) = table.obs[table.uns["spatialdata_attrs"]["region_key"]].unique()
    frame = sdata.shapes[region]
    points = np.column_stack([frame.geometry.x, frame.geometry.y, np.ones(len(frame))])
    from spatialdata.transformations import get_transformation

    to_cs = get_transformation(frame, "A").to_affine_matrix(("x", "y"), ("x", "y"))
    expected = (points @ to_cs.T @ np.linalg.inv(turn).T)[:, :2]
    centres = np.array([polygon(feature).centroid.coords[0] for feature in found])
    np.testing.assert_allclose(centres, expected, atol=1e-2)


def test_annotations_are_shapes(tmp_path: Path) -> None:
    sdata = slide()
    frame = GeoDataFrame(
        {"class": ["tumour", "stroma"]}, geometry=[shapely.box(0, 0, 40, 20), shapely.Point(90, 60).buffer(10)]
    )
    # in the world: x = 50 - 2 y, y = 7 + 2 x of the image
    world = frame.set_geometry(
        shapely.transform(frame.geometry.to_numpy(), lambda p: np.c_[50 - 2 * p[:, 1], 7 + 2 * p[:, 0]])
    )
    sdata.shapes["drawn"] = ShapesModel.parse(world, transformations={"world": Identity()})
    pk.io.write_geojson(sdata, tmp_path / "a.geojson", shapes="drawn", classes="class")
    found = written(tmp_path / "a.geojson")
    assert polygon(found[0]).equals(shapely.box(0, 0, 40, 20))
    assert [feature["properties"]["classification"]["name"] for feature in found] == ["tumour", "stroma"]
    assert {feature["properties"]["objectType"] for feature in found} == {"annotation"}
    pk.io.write_geojson(sdata, tmp_path / "b.geojson", shapes="drawn")
    assert all(set(feature["properties"]) == {"objectType"} for feature in written(tmp_path / "b.geojson"))


def test_a_lazy_layer_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdata = slide()
    pk.io.write_geojson(sdata, tmp_path / "a.geojson", genes=["A", "B"])
    sdata["grid"].layers["peka"] = da.from_array(sdata["grid"].layers["peka"], chunks=(7, 2))
    monkeypatch.setattr("pekasc.io._geojson._ROWS", 10)
    pk.io.write_geojson(sdata, tmp_path / "b.geojson", genes=["A", "B"])
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()


def test_an_existing_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdata, file = slide(), tmp_path / "a.geojson"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="exists: take another name, or replace it with `overwrite=True`"):
        pk.io.write_geojson(sdata, file, genes="A")

    def full(out: Any, found: Any) -> int:
        out.write(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pekasc.io._geojson.write_collection", full)
    with pytest.raises(OSError, match="The GeoJSON cannot be written to .*a.geojson.*No room"):
        pk.io.write_geojson(sdata, file, genes="A", overwrite=True)
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    pk.io.write_geojson(sdata, file, genes="A", overwrite=True)
    assert written(file)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"table_name": "elsewhere"}, KeyError, "Table 'elsewhere' not found"),
        (
            {"genes": "A", "layer": "peak"},
            KeyError,
            r"Layer 'peak' not found. Available layers: \['peka'\]. Predict first: .*table_name='grid'",
        ),
        ({"genes": ["A", "E"]}, KeyError, r"\['E'\] not found in `var_names`"),
        ({"genes": ["A", "C"]}, ValueError, r"has no values of \['C'\] in 'he_grid': they were not predicted"),
        ({"classes": "louvain"}, KeyError, "`classes='louvain'` not found in `obs` of table 'grid'. Available columns"),
        ({"classes": "tissue_fraction"}, TypeError, "`classes='tissue_fraction'` is a column of floats, and .* bin"),
        ({"merge": True}, ValueError, "joins the tiles of a class: name the column"),
        ({"colors": {"0": "red"}}, ValueError, "`colors=` are of classes"),
        ({"classes": "leiden", "colors": {"9": "red"}}, ValueError, r"\['9'\] not found among the classes '0', '1'"),
        ({"classes": "leiden", "colors": {"0": "reddish"}}, ValueError, "'0': 'reddish' is no colour"),
        ({"outline": "cells"}, ValueError, r"`outline='cells'` must be one of \['shapes', 'tiles'\]"),
        ({"object_type": "cell"}, ValueError, r"`object_type='cell'` must be one of \['annotation', "),
        ({"region": "other"}, KeyError, r"`region='other'` not found. Available regions with tiles: \['he_grid'\]"),
        ({"image_name": "he"}, ValueError, "`image_name=` goes with `shapes=`"),
        ({"shapes": "drawn"}, KeyError, "`shapes='drawn'` not found. Available shapes"),
        ({"shapes": "he_grid", "outline": "tiles"}, ValueError, "`outline=` applies to a table"),
        ({"shapes": "he_grid", "table_name": "zzz"}, ValueError, "`table_name=` applies to a table"),
        ({"genes": []}, ValueError, "`genes=` is empty"),
        (
            {"shapes": "he_grid", "genes": "A"},
            ValueError,
            "`genes=` applies to a table and does nothing with `shapes='he_grid'`: leave one of them out",
        ),
        ({"shapes": "he_grid", "image_name": "other"}, KeyError, "`image_name='other'` not found"),
        ({"path": "a.txt"}, ValueError, "must end in one of"),
        ({"path": "folder.json"}, ValueError, "is a folder: give a file"),
        ({"path": 3}, TypeError, "`path=3` must be the path of a file"),
    ],
)
def test_bad_input(tmp_path: Path, change: dict[str, Any], error: type[Exception], match: str) -> None:
    (tmp_path / "folder.json").mkdir()
    path = change.pop("path", "a.geojson")
    path = tmp_path / path if isinstance(path, str) else path
    with pytest.raises(error, match=match):
        pk.io.write_geojson(slide(), path, **change)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.json"]


def test_several_sections_and_images(tmp_path: Path, scene: Any) -> None:
    sdata = slide()
    sdata.images["other"] = sdata.images["he"]
    with pytest.raises(ValueError, match=r"share a coordinate system with \['he', 'other'\]: name the image"):
        pk.io.write_geojson(sdata, tmp_path / "a.geojson", shapes="he_grid")
    pk.io.write_geojson(sdata, tmp_path / "a.geojson", shapes="he_grid", image_name="other")
    two = pk.datasets.phantom(n_patients=2, size_um=600, mpp=2.0, n_genes=10)
    pk.pp.tile(two, tile_px=28, mpp=4.0)
    with pytest.raises(ValueError, match=r"several sections, .* with `region=`, of \['P1S1_spots', 'P2S1_spots'\]"):
        pk.io.write_geojson(two, tmp_path / "b.geojson", classes="patient", table_name="table")
    pk.io.write_geojson(two, tmp_path / "b.geojson", classes="patient", table_name="table", region="P2S1_spots")
    found = written(tmp_path / "b.geojson")
    assert {feature["properties"]["classification"]["name"] for feature in found} == {"P2"}


def test_nothing_to_write(tmp_path: Path) -> None:
    sdata = slide()
    sdata["grid"].obs["leiden"] = pd.Categorical([np.nan] * sdata["grid"].n_obs, categories=["0"])
    message = r"There is nothing to write: no object of 'he_grid' has a class \(`classes=`\)"
    with pytest.raises(ValueError, match=message + r" or a value \(`genes=`\)\."):
        pk.io.write_geojson(sdata, tmp_path / "a.geojson", classes="leiden")
    with pytest.raises(ValueError, match=message + r"\."):  # they have values, which are not written
        pk.io.write_geojson(sdata, tmp_path / "a.geojson", classes="leiden", genes="A", merge=True)
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sdata = slide()
    n = sdata["grid"].n_obs
    for merge, left_out in (
        (False, "Left out: 1 of {n} objects, with neither a class nor a value."),
        (True, "Left out: 3 of {n} objects, without a class."),
    ):
        caplog.clear()
        with caplog.at_level("INFO", logger="pekasc"):
            pk.io.write_geojson(sdata, tmp_path / "a.geojson", classes="leiden", genes="A", merge=merge, overwrite=True)
        assert left_out.format(n=n) in caplog.text


def test_colours_of_uns_that_are_none(tmp_path: Path) -> None:
    sdata = slide()
    sdata["grid"].uns["leiden_colors"] = ["red", "greenish", "blue"]
    with pytest.raises(ValueError, match=r"`uns\['leiden_colors'\]`: 'greenish' is no colour that matplotlib knows"):
        pk.io.write_geojson(sdata, tmp_path / "a.geojson", classes="leiden")
    pk.io.write_geojson(sdata, tmp_path / "a.geojson", classes="leiden", colors={"1": "green"})
    assert written(tmp_path / "a.geojson")


def test_a_column_of_more_classes_than_a_file_can_tell_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pekasc.io import _geojson

    monkeypatch.setattr(_geojson, "_MOST_CLASSES", 2)
    with pytest.raises(ValueError, match="`classes='leiden'` has 3 classes, more than 2: name a column of categories"):
        pk.io.write_geojson(slide(), tmp_path / "a.geojson", classes="leiden")
