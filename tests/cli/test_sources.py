"""What commands read: zarr folders joined, and objects without their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import spatialdata as sd
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, Identity, get_transformation

import pekasc as pk
from pekasc._sections import slide_section
from pekasc.cli import _sources


def test_joined_sections_keep_their_pixel_sizes_and_tiles(sections: Path, tmp_path: Path) -> None:
    for name in ("P1S1", "P2S1"):
        sdata = sd.read_zarr(sections / f"{name}.zarr")
        pk.pp.tile(sdata, tile_px=28, mpp=4.0)
        sdata.write(tmp_path / f"{name}.zarr")
    both = _sources.joined([tmp_path / "P1S1.zarr", tmp_path / "P2S1.zarr"], "table", same_tiles=True)
    tiles = pk.get.tiles(both)
    assert len(tiles) == both["table"].n_obs and tiles.attrs["mpp"] == 4
    one = pk.get.tiles(sd.read_zarr(tmp_path / "P2S1.zarr"))
    np.testing.assert_array_equal(tiles[-1], one[-1])
    # of which one has other tiles, and of which one is there twice
    with pytest.raises(ValueError, match="not tiled alike"):
        _sources.joined([tmp_path / "P1S1.zarr", sections / "P2S1.zarr"], "table", same_tiles=True)
    with pytest.raises(ValueError, match="elements of the same name: P1S1_he, P1S1_spots"):
        _sources.joined([tmp_path / "P1S1.zarr", sections / "P1S1.zarr"], "table", same_tiles=False)
    with pytest.raises(ValueError, match="no table 'other'"):
        _sources.joined([tmp_path / "P1S1.zarr", tmp_path / "P2S1.zarr"], "other", same_tiles=True)


@pytest.mark.parametrize("scale_factors", [None, [2], [2, 2]])
def test_thumbnail_lies_where_the_image_did(scale_factors: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "_THUMBNAIL_PX", 256)
    size = 526, 375  # width, height: of no whole number of blocks
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([x * 255 // size[0], y * 255 // size[1], np.full_like(x, 77)]).astype(np.uint8)
    turned = Affine([[0, -0.5, 10], [0.5, 0, 20], [0, 0, 1]], ("x", "y"), ("x", "y"))
    systems = {"slide": Identity(), "um": turned}
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=scale_factors, transformations=systems)
    small = _sources.thumbnail(image)
    assert 128 <= max(small.shape) <= 256 and small.dtype == np.uint8
    to_um = get_transformation(small, "um").to_affine_matrix(("x", "y"), ("x", "y"))
    x, y, _ = to_um @ [100.5, 50.5, 1]
    in_image = np.array([(y - 20) / 0.5, (x - 10) / -0.5])
    red_and_green = np.asarray(small)[:2, 50, 100]
    np.testing.assert_allclose(red_and_green, in_image * 255 / size, atol=2)
    recorded = {"image_mpp": {"he": 0.5}, "image_size": {"he": list(size)}, "image_system": {"he": "slide"}}
    section = slide_section(sd.SpatialData(images={"he": small}, attrs={"pekasc": recorded}), "he")
    assert section.mpp == pytest.approx(0.5 * size[0] / small.shape[2], rel=0.01)


def test_small_image_is_its_own_thumbnail(phantom: sd.SpatialData) -> None:
    small = _sources.thumbnail(phantom["P1S1_he"])
    np.testing.assert_array_equal(small, phantom["P1S1_he"]["scale0"]["image"])


def test_table_and_image() -> None:
    image = Image2DModel.parse(np.zeros((3, 4, 4), np.uint8), dims=("c", "y", "x"))
    sdata = sd.SpatialData(images={"a": image, "b": image})
    assert _sources.table_of(sdata, None) is None
    assert _sources.image_of(sdata, "b") == "b"
    with pytest.raises(ValueError, match=r"more than one image: \['a', 'b'\]. Give --image-name"):
        _sources.image_of(sdata, None)
    with pytest.raises(ValueError, match="no image"):
        _sources.image_of(sd.SpatialData(), None)


def test_not_a_spatialdata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no zarr folder"):
        _sources.open_source(tmp_path, name="s", image_mpp=None, scene=None)
    with pytest.raises(FileNotFoundError, match="is not there"):
        _sources.open_zarr(tmp_path / "nothing.zarr")
