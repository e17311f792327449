"""Sections: rows, images, centres and pixel sizes, from whatever a valid SpatialData holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import (
    Affine,
    Identity,
    Scale,
    get_transformation,
    remove_transformation,
    set_transformation,
)

import pekasc as pk
from pekasc import _sections
from pekasc._sections._pixel_size import array_pixel_size, nearest_orthogonal
from pekasc._sections._resolve import resolve_sections
from pekasc._sections._table import check_table, get_table, section_labels, writable_table

Scene = Callable[..., SpatialData]

ROTATED = np.array([[0.6, -0.8, 230.0], [0.8, 0.6, -120.0], [0, 0, 1]])
FLIPPED = np.array([[-1.0, 0, 400], [0, 1, 0], [0, 0, 1]])
SHAPES = np.array([[10.0, 0, 30], [0, 10, -20], [0, 0, 1]])


def reparse(sdata: SpatialData, table: AnnData, region: Any = None) -> None:
    """Put `table` in the place of the object's table."""
    region = table.uns.pop("spatialdata_attrs")["region"] if region is None else region
    table.uns.pop("spatialdata_attrs", None)
    del sdata.tables["table"]
    sdata.tables["table"] = TableModel.parse(table, region=region, region_key="region", instance_key="spot_id")


def two_sections(scene: Scene) -> SpatialData:
    a, b = scene(name="A"), scene(name="B", px_to_cs=FLIPPED)
    return sd.concatenate([a, b], concatenate_tables=True)


# rows and regions


def test_centres_are_the_centroids_in_pixels_of_the_image(scene: Scene) -> None:
    sdata = scene(px_to_cs=ROTATED, shapes_to_cs=SHAPES, polygons=True)
    (section,) = resolve_sections(sdata, image_mpp=0.5)
    in_cs = sd.get_centroids(sdata["A_spots"], coordinate_system="A").compute()[["x", "y"]].to_numpy()
    expected = (in_cs - ROTATED[:2, 2]) @ np.linalg.inv(ROTATED[:2, :2]).T
    np.testing.assert_allclose(section.centres_px, expected, atol=1e-8)
    assert (section.name, section.image_name, section.coordinate_system) == ("A_spots", "A_he", "A")
    np.testing.assert_array_equal(section.ids, np.arange(12) + 10)


def test_rows_are_joined_by_id_not_by_position(scene: Scene) -> None:
    sdata = scene()
    (before,) = resolve_sections(sdata, image_mpp=0.5)
    by_name = dict(zip(sdata["table"].obs_names[before.rows], before.centres_px, strict=True))
    order = np.random.default_rng(3).permutation(12)
    reparse(sdata, sdata["table"][order[:7]].copy())
    sdata.shapes["A_spots"] = sdata["A_spots"].iloc[::-1]
    (after,) = resolve_sections(sdata, image_mpp=0.5)
    np.testing.assert_array_equal(after.rows, np.arange(7))
    for name, centre in zip(sdata["table"].obs_names, after.centres_px, strict=True):
        np.testing.assert_array_equal(centre, by_name[name])


@pytest.mark.parametrize("categorical", [True, False])
def test_several_regions_with_rows_mixed(scene: Scene, categorical: bool) -> None:
    sdata = two_sections(scene)
    table = sdata["table"][np.random.default_rng(0).permutation(24)].copy()
    reparse(sdata, table, region=["A_spots", "B_spots"])
    if not categorical:
        sdata["table"].obs["region"] = sdata["table"].obs["region"].astype(str)
    first, second = resolve_sections(sdata, image_mpp=0.5)
    assert (first.name, second.name) == ("A_spots", "B_spots")
    assert (second.image_name, second.coordinate_system) == ("B_he", "B")
    labels = section_labels(sdata["table"])
    for section in (first, second):
        assert set(labels[section.rows]) == {section.name}
        np.testing.assert_array_equal(sdata["table"].obs["spot_id"].iloc[section.rows], section.ids)
    np.testing.assert_array_equal(np.sort(np.concatenate([first.rows, second.rows])), np.arange(24))


def test_labels_of_a_plain_table() -> None:
    adata = AnnData(np.zeros((2, 1), dtype=np.float32))
    assert section_labels(adata).tolist() == ["section", "section"]
    adata.obs["section"] = pd.Categorical(["b", "a"])
    assert section_labels(adata).tolist() == ["b", "a"]


def test_table_that_annotates_labels(scene: Scene) -> None:
    sdata = scene()
    labels = np.arange(100, dtype=np.int32).reshape(10, 10)
    sdata.labels["cells"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations={"A": Identity()})
    table = sdata["table"].copy()
    table.obs["region"] = pd.Categorical(["cells"] * 12)
    reparse(sdata, table, region="cells")
    with pytest.raises(ValueError, match=r"annotates the labels 'cells'.*to_polygons.*get_centroids"):
        resolve_sections(sdata, image_mpp=0.5)


def test_table_that_annotates_points_or_nothing(scene: Scene) -> None:
    sdata = scene()
    sdata.points["molecules"] = PointsModel.parse(np.ones((12, 2)), transformations={"A": Identity()})
    table = sdata["table"].copy()
    table.obs["region"] = pd.Categorical(["molecules"] * 12)
    reparse(sdata, table, region="molecules")
    with pytest.raises(ValueError, match=r"annotates the points 'molecules'.*to_circles"):
        resolve_sections(sdata, image_mpp=0.5)
    sdata = scene()
    del sdata.shapes["A_spots"]
    with pytest.raises(KeyError, match=r"'A_spots', which is not in `sdata.shapes`. Available shapes: \[\]"):
        resolve_sections(sdata, image_mpp=0.5)
    sdata = scene()
    del sdata["table"].uns["spatialdata_attrs"]
    with pytest.raises(ValueError, match="TableModel.parse"):
        resolve_sections(sdata, image_mpp=0.5)


def test_rows_without_a_shape(scene: Scene) -> None:
    sdata = scene()
    sdata.shapes["A_spots"] = sdata["A_spots"].iloc[2:]
    with pytest.raises(ValueError, match=r"2 of 12 table rows have no shape in 'A_spots': 10, 11\. "):
        resolve_sections(sdata, image_mpp=0.5)
    sdata["A_spots"].index = sdata["A_spots"].index.astype(str)
    with pytest.raises(ValueError, match=r"12 of 12 .*\(ids like 10, ... in the table, '12', ... in the shapes\)"):
        resolve_sections(sdata, image_mpp=0.5)


def test_duplicates(scene: Scene) -> None:
    sdata = scene()
    sdata["table"].obs["spot_id"] = [10, 10, *range(12, 22)]
    with pytest.raises(ValueError, match=r"'A_spots' has duplicate instance ids in `obs\['spot_id'\]`: 10\."):
        resolve_sections(sdata, image_mpp=0.5)
    sdata = scene()
    sdata["table"].obs_names = ["a", "a", *map(str, range(10))]
    with pytest.raises(ValueError, match=r"duplicate obs names: 'a'\..*adata.obs_names_make_unique\(\)"):
        resolve_sections(sdata, image_mpp=0.5)
    sdata = scene()
    sdata["table"].var_names = ["g", "g", "h", "h", "i", "j"]
    with pytest.raises(ValueError, match=r"duplicate var names: 'g', 'h'\..*adata.var_names_make_unique\(\)"):
        resolve_sections(sdata, image_mpp=0.5)
    sdata = scene()
    sdata["A_spots"].index = [10, 10, *range(12, 22)]
    with pytest.raises(ValueError, match="index of the shapes 'A_spots' has duplicates: 10"):
        resolve_sections(sdata, image_mpp=0.5)


def test_the_same_id_in_two_regions_is_fine(scene: Scene) -> None:
    check_table(two_sections(scene)["table"])


def test_tables(scene: Scene) -> None:
    sdata = scene()
    assert get_table(sdata["table"]) is sdata["table"]
    with pytest.raises(KeyError, match=r"'tabel' not found in `sdata.tables`. Available tables: \['table'\]"):
        get_table(sdata, "tabel")
    with pytest.raises(TypeError, match="Expected a SpatialData or an AnnData, got dict"):
        get_table({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a SpatialData, got AnnData"):
        resolve_sections(sdata["table"], image_mpp=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rows"):
        check_table(sdata["table"][:0].copy())
    table = sdata["table"].copy()
    table.obs["region"] = table.obs["region"].where(table.obs["spot_id"] > 11)
    with pytest.raises(ValueError, match="2 rows of the table have no region"):
        check_table(table)


def test_a_view_in_the_object_gets_its_own_copy(scene: Scene) -> None:
    sdata = scene()
    whole = sdata["table"]
    del sdata.tables["table"]
    sdata.tables["table"] = whole[:5]
    assert sdata["table"].is_view
    table = writable_table(sdata)
    assert table is sdata["table"] and not table.is_view and table.n_obs == 5
    with pytest.raises(ValueError, match="adata = adata.copy"):
        writable_table(whole[:5])


def test_a_view_without_rows_of_a_region_is_not_lost() -> None:
    sdata = pk.datasets.phantom(n_patients=2, size_um=600, n_spots=8, mpp=2.0)
    of_one = (sdata["table"].obs["region"] == "P1S1_spots").to_numpy()
    sdata.tables.data["table"] = sdata["table"][of_one]  # as a filter of rows in place leaves it
    table = writable_table(sdata)
    assert table is sdata["table"] and not table.is_view and table.n_obs == of_one.sum()


# images


def scaled_copy(sdata: SpatialData, name: str, factor: int) -> None:
    """Add the image at a lower resolution, in the same place."""
    image = sd.get_pyramid_levels(sdata["A_he"], n=0)
    small = image.data.compute()[:, ::factor, ::factor]
    size = {axis: image.sizes[axis] / small.shape[i] for i, axis in ((1, "y"), (2, "x"))}
    scale = Scale([size["x"], size["y"]], axes=("x", "y"))
    sdata.images[name] = Image2DModel.parse(small, dims=("c", "y", "x"), transformations={"A": scale})


def test_finest_of_one_picture_at_several_scales(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    sdata = scene()
    scaled_copy(sdata, "lowres", 7)
    scaled_copy(sdata, "a_hires", 3)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        (section,) = resolve_sections(sdata, image_mpp=0.5)
    assert section.image_name == "A_he"
    assert "using image A_he, the finest of ['A_he', 'a_hires', 'lowres']" in caplog.text


def test_scales_in_coordinate_systems_of_their_own(scene: Scene) -> None:
    # as Space Ranger's output is read: each image is in its own system, the spots are in all
    sdata = scene()
    scaled_copy(sdata, "lowres", 4)
    set_transformation(sdata["lowres"], {"A_lowres": Identity()}, set_all=True)
    set_transformation(sdata["A_spots"], Scale([0.25, 0.25], axes=("x", "y")), to_coordinate_system="A_lowres")
    (section,) = resolve_sections(sdata, image_mpp=0.5)
    assert section.image_name == "A_he"
    (section,) = resolve_sections(sdata, images={"A_spots": "lowres"}, image_mpp=2.0)
    assert (section.image_name, section.coordinate_system) == ("lowres", "A_lowres")


@pytest.mark.parametrize("case", ["same size", "other content", "other place", "mirrored"])
def test_different_images_in_one_coordinate_system(scene: Scene, case: str) -> None:
    sdata = scene()
    pixels = sd.get_pyramid_levels(sdata["A_he"], n=0).data.compute()
    scale = Scale([2, 2], axes=("x", "y"))
    transformation: Any = scale
    if case == "same size":
        other, transformation = pixels, Identity()
    elif case == "other content":
        other = np.random.default_rng(0).integers(0, 255, (3, 180, 200)).astype(np.uint8)
    elif case == "other place":
        other = pixels[:, :90, :100]
    else:
        other = pixels[:, ::2, ::2]
        transformation = Affine(np.array([[-2.0, 0, 400], [0, 2, 0], [0, 0, 1]]), ("x", "y"), ("x", "y"))
    sdata.images["other"] = Image2DModel.parse(other, dims=("c", "y", "x"), transformations={"A": transformation})
    with pytest.raises(ValueError, match=r"Several different images.*'A_he' \(400 x 360 px\), 'other'.*images=\{'A_sp"):
        resolve_sections(sdata, image_mpp=0.5)
    (section,) = resolve_sections(sdata, images={"A_spots": "other"}, image_mpp=1.0)
    assert section.image_name == "other"


def test_no_image_shares_a_coordinate_system(scene: Scene) -> None:
    sdata = scene()
    set_transformation(sdata["A_he"], {"elsewhere": Identity()}, set_all=True)
    with pytest.raises(ValueError, match=r"No image shares.*\(in \['A', 'um'\]\).*'A_he': \['elsewhere'\]"):
        resolve_sections(sdata, image_mpp=0.5)
    with pytest.raises(ValueError, match=r"'A_he' \(in \['elsewhere'\]\) and the shapes 'A_spots' .* share no"):
        resolve_sections(sdata, images={"A_spots": "A_he"}, image_mpp=0.5)


def test_coordinate_systems_that_disagree(scene: Scene) -> None:
    sdata = scene()
    set_transformation(sdata["A_spots"], Scale([0.6, 0.6], axes=("x", "y")), to_coordinate_system="um")
    with pytest.raises(ValueError, match=r"'A_spots' lie elsewhere on the image 'A_he' by .*'um' than by 'A': up to"):
        resolve_sections(sdata, image_mpp=0.5)
    remove_transformation(sdata["A_spots"], "um")
    assert resolve_sections(sdata, image_mpp=0.5)[0].coordinate_system == "A"


def test_wrong_arguments(scene: Scene) -> None:
    sdata = scene()
    with pytest.raises(KeyError, match=r"names the region 'A', the table has \['A_spots'\]"):
        resolve_sections(sdata, images={"A": "A_he"}, image_mpp=0.5)
    with pytest.raises(KeyError, match=r"Image 'he' not found in `sdata.images`. Available images: \['A_he'\]"):
        resolve_sections(sdata, images={"A_spots": "he"}, image_mpp=0.5)
    with pytest.raises(TypeError, match=r"`images` must be a dict.*`images=\{'A_spots': 'A_he'\}`"):
        resolve_sections(sdata, images="A_he", image_mpp=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("multi_scale", [True, False])
@pytest.mark.parametrize(
    ("convert", "found"),
    [
        (lambda p: p[:1], r"1 channel \(grey\);"),
        (lambda p: np.concatenate([p, p[:1]]), r"4 channels \(RGBA\?\);"),
        (lambda p: p.astype(np.uint16) * 257, "dtype uint16;"),
        (lambda p: p.astype(np.uint16) * 16 + 8, "dtype uint16;"),  # 12 bits
        (lambda p: p.astype(np.float32), "dtype float32;"),
        (lambda p: p[:1].astype(np.uint16) * 257, r"1 channel \(grey\) and dtype uint16;"),
    ],
)
def test_images_that_are_not_rgb(scene: Scene, multi_scale: bool, convert: Callable[..., Any], found: str) -> None:
    sdata = scene()
    rgb = sd.get_pyramid_levels(sdata["A_he"], n=0).data.compute()
    sdata.images["odd"] = Image2DModel.parse(
        convert(rgb),
        dims=("c", "y", "x"),
        scale_factors=[2] if multi_scale else None,
        transformations=get_transformation(sdata["A_he"], get_all=True),
    )
    with pytest.raises(ValueError, match=f"Image 'odd' has {found} pekasc reads RGB.*convert it") as error:
        resolve_sections(sdata, images={"A_spots": "odd"}, image_mpp=0.5)
    # the advice works as it stands
    exec(str(error.value).split("`")[1], {"sdata": sdata, "spatialdata": sd, "np": np})
    (section,) = resolve_sections(sdata, images={"A_spots": "odd_rgb"}, image_mpp=0.5)
    result = np.asarray(section.pyramid.levels[0])
    if rgb.shape == convert(rgb).shape:
        assert np.abs(result.astype(int) - rgb).max() <= 1
    np.testing.assert_allclose(result[0], rgb[0], atol=1)
    assert result.mean() == pytest.approx(rgb[: len(convert(rgb)) if len(convert(rgb)) < 3 else 3].mean(), abs=1)


@pytest.mark.parametrize("names", [None, ["r", "g", "b", "a"]])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_rgba_without_transparency_is_rgb(scene: Scene, names: list[str] | None, dtype: str) -> None:
    sdata = scene()
    rgb = sd.get_pyramid_levels(sdata["A_he"], n=0).data.compute()
    rgba = np.concatenate([rgb, np.full_like(rgb[:1], 255)])
    if dtype != "uint8":
        rgba = (rgba / 255).astype(dtype)
    systems = get_transformation(sdata["A_he"], get_all=True)
    del sdata.images["A_he"]
    sdata.images["A_he"] = Image2DModel.parse(
        rgba, dims=("c", "y", "x"), c_coords=names, scale_factors=[2], transformations=systems
    )
    # an image of three channels beside it is no reason to leave it out
    sdata.images["small"] = Image2DModel.parse(
        rgb[:, ::2, ::2], dims=("c", "y", "x"), transformations={n: Scale([2, 2], axes=("x", "y")) for n in systems}
    )
    (section,) = resolve_sections(sdata, image_mpp=0.5)
    assert section.image_name == "A_he"
    np.testing.assert_array_equal(np.asarray(section.pyramid.levels[0]), rgb)


def test_an_image_of_many_channels_is_no_h_and_e(scene: Scene) -> None:
    sdata = scene()
    rgb = sd.get_pyramid_levels(sdata["A_he"], n=0).data.compute()
    sdata.images["odd"] = Image2DModel.parse(
        np.concatenate([rgb, rgb[:2]]), dims=("c", "y", "x"),
        transformations=get_transformation(sdata["A_he"], get_all=True),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Image 'odd' has 5 channels; .*is no H&E .*`images=`"):
        resolve_sections(sdata, images={"A_spots": "odd"}, image_mpp=0.5)


def test_levels_and_channel_names(scene: Scene) -> None:
    (section,) = resolve_sections(scene(), image_mpp=0.5)
    assert [level.shape for level in section.pyramid.levels] == [(3, 360, 400), (3, 180, 200), (3, 90, 100)]
    assert section.pyramid.scales == [(1, 1), (2, 2), (4, 4)]
    sdata = scene(multi_scale=False)
    rgb = sdata["A_he"].data.compute()
    sdata.images["bgr"] = Image2DModel.parse(
        rgb[::-1], dims=("c", "y", "x"), c_coords=["b", "g", "r"], transformations={"A": Identity()}
    )
    (section,) = resolve_sections(sdata, images={"A_spots": "bgr"}, image_mpp=0.5)
    np.testing.assert_array_equal(np.asarray(section.pyramid.levels[0]), rgb)


# pixel size


def test_axes_follow_the_coordinate_system(scene: Scene) -> None:
    # the image is stored rotated and twice as fine, its pixel is 0.25 um
    matrix = ROTATED @ np.diag([0.5, 0.5, 1])
    (section,) = resolve_sections(scene(px_to_cs=matrix, size=(800, 720)), image_mpp=0.25)
    np.testing.assert_allclose(section.um_to_px, np.linalg.inv(matrix[:2, :2]) / 0.5, atol=1e-9)
    assert section.mpp == pytest.approx(0.25) and section.mpp_source == "image_mpp"
    np.testing.assert_allclose(section.centres_px, section.centres_um @ section.um_to_px.T)


def test_um_coordinate_system(scene: Scene) -> None:
    matrix = np.array([[0.5, 0, 3], [0, 0.45, -7], [0, 0, 1]])  # pixels that are not square
    sdata = scene(px_to_cs=matrix, size=(800, 800))
    (section,) = resolve_sections(sdata, um_coordinate_system="um")
    assert (section.coordinate_system, section.mpp_source) == ("um", "um_coordinate_system")
    np.testing.assert_allclose(section.um_to_px, np.diag([4, 1 / 0.225]))
    assert section.mpp == pytest.approx(np.sqrt(0.25 * 0.225))
    expected = sd.get_centroids(sdata["A_spots"], coordinate_system="um").compute()
    np.testing.assert_allclose(section.centres_um, expected)
    # known through the shapes alone
    remove_transformation(sdata["A_he"], "um")
    (through_shapes,) = resolve_sections(sdata, um_coordinate_system="um")
    np.testing.assert_allclose(through_shapes.um_to_px, section.um_to_px)
    np.testing.assert_allclose(through_shapes.centres_um, section.centres_um)


def test_um_coordinate_system_that_is_not_there(scene: Scene) -> None:
    sdata = two_sections(scene)
    with pytest.raises(KeyError, match=r"'microns' not found.*Available coordinate systems: \['A', 'B', 'um'\]"):
        resolve_sections(sdata, um_coordinate_system="microns")
    with pytest.raises(ValueError, match=r"Neither the image 'A_he' nor the shapes 'A_spots' are in .* 'B'"):
        resolve_sections(sdata, um_coordinate_system="B")


def test_no_pixel_size(scene: Scene) -> None:
    with pytest.raises(ValueError, match='not known.*image_mpp=.*400 x 360 px.*um_coordinate_system=.*array="visium"'):
        resolve_sections(scene())
    sdata = two_sections(scene)
    with pytest.raises(ValueError, match="pixel size of image 'B_he'"):
        resolve_sections(sdata, image_mpp={"A_he": 0.5})


@pytest.mark.parametrize("value", [0, -0.5, np.nan, np.inf])
def test_pixel_sizes_that_are_none(scene: Scene, value: float) -> None:
    with pytest.raises(ValueError, match="`image_mpp` must be a positive number"):
        resolve_sections(scene(), image_mpp=value)
    with pytest.raises(ValueError, match=r"`image_mpp\['A_he'\]` must be a positive number"):
        resolve_sections(scene(), image_mpp={"A_he": value})


def test_pixel_sizes_of_a_wrong_kind(scene: Scene) -> None:
    with pytest.raises(TypeError, match="must be a number .*got str: '0.5'"):
        resolve_sections(scene(), image_mpp="0.5")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="`image_mpp` names the image 'A_spots'"):
        resolve_sections(scene(), image_mpp={"A_spots": 0.5})


def test_recorded_pixel_size(scene: Scene) -> None:
    sdata = scene()
    sdata["table"].uns["pekasc"] = {"image_mpp": {"A_he": 0.5, "other": 3.0}}
    (section,) = resolve_sections(sdata)
    assert (section.mpp, section.mpp_source) == (pytest.approx(0.5), "recorded")
    (section,) = resolve_sections(sdata, image_mpp=0.505)
    assert (section.mpp, section.mpp_source) == (pytest.approx(0.505), "image_mpp")


def test_pixel_sizes_that_disagree(scene: Scene) -> None:
    sdata = scene()
    sdata["table"].uns["pekasc"] = {"image_mpp": {"A_he": 0.5}}
    with pytest.raises(ValueError, match="disagree: 0.52 um from `image_mpp`, 0.5 um from `table.uns.*strict=False"):
        resolve_sections(sdata, image_mpp=0.52)
    with pytest.warns(UserWarning, match="disagree: 0.52 um"):
        (section,) = resolve_sections(sdata, image_mpp=0.52, strict=False)
    assert section.mpp == pytest.approx(0.52)
    with pytest.raises(ValueError, match="0.25 um from `image_mpp`, 0.5 um from `um_coordinate_system`"):
        resolve_sections(scene(), image_mpp=0.25, um_coordinate_system="um")


def grid(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return array_row, array_col and centres in um."""
    rows, cols = (a.ravel() for a in np.meshgrid(np.arange(6), np.arange(6), indexing="ij"))
    if kind == "visium":
        cols = 2 * cols + rows % 2
        return rows, cols, np.column_stack([cols * 50.0, rows * 86.60254])
    return rows, cols, np.column_stack([cols * 200.0, rows * 200.0])


@pytest.mark.parametrize("kind", ["visium", "st"])
def test_pixel_size_from_the_array(kind: str) -> None:
    rows, cols, um = grid(kind)
    pitch = np.sort(np.linalg.norm(um - um[8], axis=1))[1]
    assert pitch == pytest.approx({"visium": 100, "st": 200}[kind])
    # rotated, mirrored, jittered: nearest neighbours would be closer than the pitch
    turn = np.array([[0.8, 0.6], [0.6, -0.8]])
    jitter = np.random.default_rng(0).normal(0, 0.03 * pitch, um.shape)
    centres = (um + jitter) @ turn.T / 0.7 + [1000, 2000]
    assert array_pixel_size(kind, cols, rows, centres, "A") == pytest.approx(0.7, rel=0.01)
    assert array_pixel_size(kind, cols, rows, um @ turn.T / 0.7, "A") == pytest.approx(0.7, rel=1e-6)


def test_arrays_that_do_not_fit() -> None:
    rows, cols, um = grid("st")
    with pytest.raises(ValueError, match='do not fit an array of type "visium"'):
        array_pixel_size("visium", cols, rows, um, "A")
    with pytest.raises(ValueError, match='do not fit an array of type "st"'):
        array_pixel_size("st", cols, rows, um[np.random.default_rng(0).permutation(36)], "A")
    with pytest.raises(ValueError, match="at least 3 spots that do not lie on one line"):
        array_pixel_size("st", cols[:6], rows[:6], um[:6], "A")


def test_array_through_the_table(scene: Scene) -> None:
    rows, cols, um = grid("visium")
    sdata = scene(centres=um * 0.5 + 30, px_to_cs=ROTATED)  # 2 um a unit
    with pytest.raises(KeyError, match="array_row and array_col not found in `table.obs`"):
        resolve_sections(sdata, array="st")
    sdata["table"].obs["array_row"] = pd.Categorical(rows.astype(str))
    with pytest.raises(KeyError, match="array_col not found"):
        resolve_sections(sdata, array="st")
    sdata["table"].obs["array_col"] = cols
    (section,) = resolve_sections(sdata, array="visium")
    assert (section.mpp, section.mpp_source) == (pytest.approx(2.0, rel=1e-6), "array")
    with pytest.raises(ValueError, match="0.5 um from `image_mpp`, 2 um from the array"):
        resolve_sections(sdata, image_mpp=0.5, array="visium")
    with pytest.raises(ValueError, match=r"`array='xenium'` is not known, use one of \['visium', 'visium_hd', 'st'\]"):
        resolve_sections(sdata, array="xenium")


def test_visium_spot_diameter(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    sdata = scene(shapes_to_cs=SHAPES)  # radius 3, in pixels 30
    with caplog.at_level(logging.INFO, logger="pekasc"):
        (section,) = resolve_sections(sdata, array="visium")
    assert section.mpp == pytest.approx(65 / 60)
    assert "pixel size 1.083 um from the spot diameter, 60 px for 65 um" in caplog.text


def test_nearest_orthogonal() -> None:
    turn = np.array([[0.8, 0.6], [0.6, -0.8]])
    np.testing.assert_allclose(nearest_orthogonal(3.7 * turn), turn)
    near = nearest_orthogonal(turn @ np.diag([1.0, 1.05]))
    np.testing.assert_allclose(near @ near.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(near, turn, atol=0.01)


def test_what_the_room_offers() -> None:
    assert all(hasattr(_sections, name) for name in _sections.__all__)


def test_shapes_that_are_empty(scene: Scene) -> None:
    sdata = scene()
    frame = sdata["A_spots"].copy()
    frame["radius"] = 1.0
    frame.geometry = frame.geometry.translate(np.inf)
    sdata.shapes["A_spots"] = ShapesModel.parse(frame)
    with pytest.raises(ValueError, match="12 shapes in 'A_spots' are empty or not finite: 10, 11, 12, ..."):
        resolve_sections(sdata, image_mpp=0.5)


@pytest.mark.parametrize("multi_scale", [False, True])
def test_floats_between_0_and_1_are_read_as_8_bit(scene: Scene, multi_scale: bool) -> None:
    sdata = scene()
    rgb = sd.get_pyramid_levels(sdata["A_he"], n=0).data.compute()
    sdata.images["float"] = Image2DModel.parse(
        rgb.astype(np.float32) / 255,
        dims=("c", "y", "x"),
        scale_factors=[2] if multi_scale else None,
        transformations=get_transformation(sdata["A_he"], get_all=True),
    )
    (section,) = resolve_sections(sdata, images={"A_spots": "float"}, image_mpp=0.5)
    assert section.pyramid is not None
    np.testing.assert_array_equal(np.asarray(section.pyramid.levels[0]), rgb)
