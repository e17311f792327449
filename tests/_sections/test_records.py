"""Recorded pixel sizes: taken for the image they were recorded for, its other resolutions and its crops, never else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import BaseTransformation, Identity, Scale, Sequence, Translation, set_transformation

import pekasc as pk
from pekasc._keys import read_uns
from pekasc._sections import resolve_sections
from pekasc._sections._records import recorded_pixel_sizes


@pytest.fixture
def sdata() -> SpatialData:
    """Return a section of 600 x 600 px, 1 um per pixel, which is recorded."""
    return pk.datasets.phantom(n_patients=1, size_um=600, mpp=1.0, n_genes=4)


def put(sdata: SpatialData, pixels: np.ndarray, **systems: BaseTransformation) -> None:
    del sdata.images["P1S1_he"]
    sdata.images["P1S1_he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=systems)


def pixels_of(sdata: SpatialData) -> np.ndarray:
    return np.asarray(sd.get_pyramid_levels(sdata.images["P1S1_he"], n=0))


def mpp_of(sdata: SpatialData, **options: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return resolve_sections(sdata, **options)[0].mpp


def test_it_is_recorded_with_the_size_of_the_image(sdata: SpatialData, tmp_path: Path) -> None:
    assert {name: list(size) for name, size in read_uns(sdata["table"], "image_size").items()} == {
        "P1S1_he": [600, 600]
    }
    sdata.write(tmp_path / "x.zarr")
    again = sd.read_zarr(tmp_path / "x.zarr")
    assert mpp_of(again) == mpp_of(sdata) == 1.0


def test_a_smaller_version_has_larger_pixels(sdata: SpatialData) -> None:
    small = pixels_of(sdata)[:, ::2, ::2]
    # the second system makes its pixels look like those of the first image
    put(sdata, small, P1S1=Scale([2, 2], axes=("x", "y")), other=Identity())
    assert mpp_of(sdata) == 2.0
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    x0, _, x1, _ = sdata["P1S1_spots_tiles"].geometry.iloc[0].bounds
    assert x1 - x0 == pytest.approx(112)  # spots are in pixels of 1 um
    assert pk.get.tiles(sdata).shape[1:] == (28, 28, 3)


def test_a_size_that_is_rounded(sdata: SpatialData) -> None:
    odd = pixels_of(sdata)[:, ::7, ::7]
    assert odd.shape[1:] == (86, 86)
    put(sdata, odd, P1S1=Scale([600 / 86, 600 / 86], axes=("x", "y")))
    assert mpp_of(sdata) == pytest.approx(600 / 86)


def test_a_crop_has_the_same_pixels(sdata: SpatialData) -> None:
    crop = sd.bounding_box_query(
        sdata, axes=("x", "y"), min_coordinate=[0, 0], max_coordinate=[500, 400], target_coordinate_system="P1S1"
    )
    assert mpp_of(crop) == 1.0
    crop = sd.bounding_box_query(
        sdata, axes=("x", "y"), min_coordinate=[150, 150], max_coordinate=[450, 450], target_coordinate_system="P1S1"
    )
    assert mpp_of(crop) == 1.0


@pytest.mark.parametrize(
    ("shape", "transformation"),
    [
        ((300, 300), Identity()),  # a crop, or the whole picture at half the resolution: nothing tells
        ((900, 900), Identity()),  # larger than the image was
        ((300, 600), Scale([2, 2], axes=("x", "y"))),  # of another shape
        ((300, 300), Sequence([Scale([4, 4], axes=("x", "y")), Translation([5, 5], axes=("x", "y"))])),
    ],
    ids=["half", "larger", "other aspect", "other scale"],
)
def test_another_image_under_its_name(
    sdata: SpatialData, shape: tuple[int, int], transformation: BaseTransformation
) -> None:
    put(sdata, np.full((3, *shape), 200, np.uint8), P1S1=transformation)
    del sdata["table"].obs["array_row"]  # the lattice would say it too
    message = (
        r"pixel size of image 'P1S1_he', 1 um in `table.uns.*, was recorded for 600 x 600 px, and the image has "
        rf"{shape[1]} x {shape[0]} px now: it is not used\. Give `image_mpp=`"
    )
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(ValueError, match="pixel size of image 'P1S1_he' .* is not known"),
    ):
        resolve_sections(sdata)
    assert mpp_of(sdata, image_mpp=1.5) == 1.5  # given: no word about what is not needed


def test_a_crop_in_a_system_in_um_has_the_same_pixels() -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=900, mpp=2.0, n_genes=4)
    for element in (sdata["P1S1_he"], sdata["P1S1_spots"]):
        set_transformation(element, Scale([2.0, 2.0], axes=("x", "y")), "um")
    for start, end in (([450, 0], [900, 450]), ([100, 200], [800, 700])):
        crop = sd.bounding_box_query(
            sdata, axes=("x", "y"), min_coordinate=start, max_coordinate=end, target_coordinate_system="um"
        )
        assert mpp_of(crop) == 2.0
    # resampled into a system of another scale: the pixels are others
    half = Sequence([Scale([0.5, 0.5], axes=("x", "y")), Translation([30, 30], axes=("x", "y"))])
    for element in (sdata["P1S1_he"], sdata["P1S1_spots"]):
        set_transformation(element, half, "half")
    resampled = sdata.transform_to_coordinate_system("half")
    with pytest.warns(UserWarning, match="it is not used"):
        assert resolve_sections(resampled)[0].mpp == pytest.approx(4.0)  # by the lattice


def test_the_lattice_contradicts(sdata: SpatialData) -> None:
    with pytest.raises(ValueError, match="disagree: 0.5 um from `image_mpp`, 1 um from .*(recorded|uns)"):
        resolve_sections(sdata, image_mpp=0.5)
    sdata["table"].uns["pekasc"]["image_mpp"] = {"P1S1_he": 0.5}
    with pytest.raises(ValueError, match="disagree: 0.5 um from `table.uns.*, 1 um from the Visium lattice"):
        resolve_sections(sdata)


def test_tiles_of_a_replaced_image_have_to_be_made_again(sdata: SpatialData) -> None:
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    put(sdata, pixels_of(sdata)[:, ::2, ::2], P1S1=Scale([2, 2], axes=("x", "y")))
    with pytest.raises(ValueError, match=r"Section 'P1S1_spots': .* has changed since it was tiled"):
        pk.get.tiles(sdata)
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    assert pk.get.tiles(sdata).sizes["tile"] == sdata["table"].n_obs


def test_a_slides_pixel_size_belongs_to_its_image(sdata: SpatialData, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(
        tmp_path / "he.tif", np.moveaxis(pixels_of(sdata), 0, -1), tile=(256, 256), resolution=(1e4, 1e4),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    slide = pk.io.read_slide(tmp_path / "he.tif", name="P1S1")
    assert slide.attrs["pekasc"] == {
        "image_mpp": {"P1S1": 1.0}, "image_size": {"P1S1": [600, 600]}, "image_system": {"P1S1": "P1S1"},
        "image_mpp_source": {"P1S1": "resolution tags"},
    }  # fmt: skip
    del sdata.tables["table"].uns["pekasc"]["image_mpp"]
    slide.shapes["P1S1_spots"], slide.tables["table"] = sdata["P1S1_spots"], sdata["table"]
    assert mpp_of(slide) == 1.0
    half = np.asarray(slide["P1S1"].data)[:, ::2, ::2]
    del slide.images["P1S1"]
    slide.images["P1S1"] = Image2DModel.parse(
        half, dims=("c", "y", "x"), transformations={"P1S1": Scale([2, 2], axes=("x", "y"))}
    )
    assert mpp_of(slide) == 2.0


@pytest.mark.parametrize("named", [False, True])
def test_joining_objects_keeps_it(tmp_path: Path, named: bool) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 340, 3), dtype=np.uint8)
    slides = {}
    for name, per_cm in (("a", 2e4), ("b", 5e3)):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", pixels, tile=(256, 256), resolution=(per_cm, per_cm), resolutionunit="CENTIMETER"
        )
        slides[name] = pk.io.read_slide(tmp_path / f"{name}.tif")
    joined = sd.concatenate(slides if named else list(slides.values()))
    assert not joined.attrs
    a, b = ("a-a", "b-b") if named else ("a", "b")
    assert recorded_pixel_sizes(joined, None, a, warn=True) == {"image": 0.5}
    assert recorded_pixel_sizes(joined, None, b, warn=True) == {"image": 2.0}
    crop = sd.bounding_box_query(
        joined, axes=("x", "y"), min_coordinate=[40, 30], max_coordinate=[200, 90], target_coordinate_system=a
    )
    # the coordinate systems of objects joined under names have others
    expected = {} if named else {"image": 0.5}
    with pytest.warns(UserWarning, match="it is not used") if named else warnings.catch_warnings():
        assert recorded_pixel_sizes(crop, None, a, warn=True) == expected
    # what is recorded elsewhere comes first, and a user may correct it
    joined.attrs["pekasc"] = {"image_mpp": {a: 0.25}}
    assert recorded_pixel_sizes(joined, None, a, warn=True) == {"slide": 0.25}


def test_joining_sections_keeps_it() -> None:
    both = pk.datasets.phantom(n_patients=2, size_um=600, mpp=1.0, n_genes=4)
    for column in ("array_row", "array_col"):  # the lattice would say it too
        del both["table"].obs[column]
    parts = [both.filter_by_coordinate_system(name) for name in ("P1S1", "P2S1")]
    joined = sd.concatenate(parts, concatenate_tables=True)
    assert "pekasc" not in joined["table"].uns
    assert [section.mpp for section in resolve_sections(joined)] == [1.0, 1.0]
    pk.pp.tile(joined, tile_px=28, mpp=4.0)


def test_merging_what_is_recorded_keeps_all_of_it(tmp_path: Path) -> None:
    both = pk.datasets.phantom(n_patients=2, size_um=600, mpp=1.0, n_genes=4)
    both["table"].var["feature_types"] = ["Gene Expression"] * 3 + ["Antibody Capture"]
    parts = [both.filter_by_coordinate_system(name) for name in ("P1S1", "P2S1")]
    for part in parts:
        part.write(tmp_path / f"{part.coordinate_systems[0]}.zarr")
    parts = [sd.read_zarr(tmp_path / f"{name}.zarr") for name in ("P1S1", "P2S1")]  # images bear nothing any more
    joined = sd.concatenate(parts, concatenate_tables=True, merge="same", uns_merge="unique", attrs_merge="unique")
    assert read_uns(joined["table"], "image_mpp") == {"P1S1_he": 1.0, "P2S1_he": 1.0}
    assert list(joined["table"].var["feature_types"]) == list(both["table"].var["feature_types"])
    del joined["table"].obs["array_row"]
    assert [section.mpp for section in resolve_sections(joined)] == [1.0, 1.0]


def test_what_is_recorded_has_to_be_a_number(sdata: SpatialData) -> None:
    sdata["table"].uns["pekasc"]["image_mpp"] = {"P1S1_he": "half"}
    with pytest.raises(TypeError, match=r'`table.uns\["pekasc"\]\["image_mpp"\]\[\'P1S1_he\'\]` must be a number'):
        resolve_sections(sdata)
