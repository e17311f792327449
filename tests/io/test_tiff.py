"""Every way of reading a TIFF gives the same pixels: dask, single tiles, a crop, what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import tifffile

import pekasc as pk
from pekasc.io._tiff import tiff_levels
from pekasc.tiling._chunks import chunk_source

PIXELS = np.random.default_rng(0).integers(90, 220, (100, 140, 3), dtype=np.uint8)
WAYS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (32, 48)},
    "strips": {"rowsperstrip": 32},
    "planes of tiles": {"tile": (32, 48), "planarconfig": "separate"},
    "planes of strips": {"rowsperstrip": 32, "planarconfig": "separate"},
}


def write(path: Path, pixels: np.ndarray = PIXELS, **how: Any) -> Path:
    pixels = np.moveaxis(pixels, -1, 0) if how.get("planarconfig") == "separate" else pixels
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", "compression": "deflate", "metadata": None} | how)
    return path


def forget(path: Path, *numbers: int) -> None:
    """Tiles or strips that were never written."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        tags = file.pages[0].tags
        for tag in [tags[code] for code in (324, 325, 273, 279) if code in tags]:
            value = np.array(tag.value)
            value[list(numbers)] = 0
            tag.overwrite(value.tolist())


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_what_was_never_scanned_is_white_however_it_is_read(tmp_path: Path, how: dict[str, Any]) -> None:
    file = write(tmp_path / "s.tif", **how)
    n = 12 if "tile" in how else 4
    planes = 3 if "planarconfig" in how else 1
    forget(file, *(1 + plane * n for plane in range(planes)))
    expected = np.moveaxis(PIXELS, -1, 0).copy()
    if "tile" in how:
        expected[:, :32, 48:96] = 255
    else:
        expected[:, 32:64] = 255
    sdata = pk.io.read_slide(file)
    level = sdata["s"].data
    assert np.array_equal(level.compute(), expected)
    assert np.array_equal(level[:, 20:70, 40:110].compute(), expected[:, 20:70, 40:110])
    assert np.array_equal(level.rechunk((1, 30, 30)).compute(scheduler="threads"), expected)
    source = chunk_source(tiff_levels(file)[0])
    if source is not None:
        assert (source.read_chunk(0, 1) == 255).all()
        assert np.array_equal(source.read_chunk(1, 1), expected[:, 32:64, 48:96])
    crop = sd.bounding_box_query(
        sdata, axes=("x", "y"), min_coordinate=[10, 10], max_coordinate=[120, 80], target_coordinate_system="s"
    )
    assert np.array_equal(crop["s"].data.compute(), expected[:, 10:80, 10:120])
    sdata.write(tmp_path / "s.zarr")
    assert np.array_equal(sd.read_zarr(tmp_path / "s.zarr")["s"].data.compute(), expected)


def test_a_colour_that_was_never_written_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif", **WAYS["planes of tiles"])
    forget(file, 1)
    with pytest.raises(OSError, match=r"s\.tif' cannot be read at level 0.* some of its colours were never written"):
        pk.io.read_slide(file)["s"].data.compute()


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
def test_alpha_is_obeyed_however_it_is_read(tmp_path: Path, how: dict[str, Any], kind: str) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (*PIXELS.shape[:2], 1), dtype=np.uint8)
    share = alpha / 255
    colours = np.rint(PIXELS * share).astype(np.uint8) if kind == "assocalpha" else PIXELS
    file = write(tmp_path / "s.tif", np.concatenate([colours, alpha], axis=-1), extrasamples=[kind], **how)
    truth = PIXELS if kind == "unspecified" else PIXELS * share + 255 * (1 - share)
    level = tiff_levels(file)[0]
    got = np.moveaxis(level.compute(), 0, -1)
    np.testing.assert_allclose(got, truth, atol=0.51)
    source = chunk_source(level)
    if source is not None:
        assert np.array_equal(np.moveaxis(source.read_chunk(1, 1), 0, -1), got[32:64, 48:96])


def test_steps_and_single_channels(tmp_path: Path) -> None:
    level = tiff_levels(write(tmp_path / "s.tif", tile=(32, 48)))[0]
    truth = np.moveaxis(PIXELS, -1, 0)
    assert np.array_equal(level[1:2, 3:90:4, 130:20:-7].compute(), truth[1:2, 3:90:4, 130:20:-7])
    assert level[:, 5:5].compute().shape == (3, 0, 140)
