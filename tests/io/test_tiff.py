"""Every way of reading a TIFF gives the same pixels: dask, single tiles, a crop, what was written."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import tifffile
from PIL import Image

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


def ndpi(path: Path) -> np.ndarray:
    """Write a picture as Hamamatsu does: one JPEG stream of parts that can be decoded alone, and 64-bit offsets."""
    pixels = np.random.default_rng(0).integers(90, 220, (8, 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", subsampling=0, quality=95, restart_marker_blocks=16)
    jpeg = stream.getvalue()
    # the first part begins after the header, the others after a marker
    scan = jpeg.index(b"\xff\xda")
    starts = [scan + 2 + struct.unpack_from(">H", jpeg, scan + 2)[0]]
    starts += [i + 2 for i in range(starts[0], len(jpeg) - 1) if jpeg[i] == 0xFF and 0xD0 <= jpeg[i + 1] < 0xD8]
    tags = [
        (256, 4, 1, 256), (257, 4, 1, 128), (258, 3, 3, 0), (259, 3, 1, 7), (262, 3, 1, 6), (271, 2, 10, 0),
        (273, 4, 1, 0), (277, 3, 1, 3), (278, 4, 1, 128), (279, 4, 1, len(jpeg)), (282, 5, 1, 0), (283, 5, 1, 0),
        (284, 3, 1, 1), (296, 3, 1, 3), (65420, 4, 1, 1),
        (65421, 11, 1, int.from_bytes(struct.pack("<f", 20.0), "little")), (65426, 4, len(starts), 0),
    ]  # fmt: skip
    values = {
        258: struct.pack("<HHH", 8, 8, 8), 271: b"Hamamatsu\0", 282: struct.pack("<II", 20000, 1),
        283: struct.pack("<II", 20000, 1), 273: jpeg, 65426: np.array(starts, "<u4").tobytes(),
    }  # fmt: skip
    at, places, body = 12, {}, b""
    for code, value in values.items():
        places[code] = at + len(body)
        body += value + bytes(len(value) % 2)
    entries = b"".join(struct.pack("<HHII", c, kind, n, places.get(c, value)) for c, kind, n, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(8) + bytes(4 * len(tags))
    path.write_bytes(b"II*\0" + struct.pack("<Q", at + len(body)) + body + directory)
    return np.moveaxis(np.asarray(Image.open(stream)), -1, 0)


def test_parts_of_a_jpeg_stream_are_the_tiles_of_ndpi(tmp_path: Path) -> None:
    expected = ndpi(tmp_path / "s.ndpi")
    sdata = pk.io.read_slide(tmp_path / "s.ndpi")
    assert np.array_equal(sdata["s"].data.compute(), expected)
    source = chunk_source(sdata["s"].data)
    assert source is not None and source.chunk_px[1] < 256  # not the whole stream at once
    y, x = source.chunk_px
    assert np.array_equal(source.read_chunk(1, 1), expected[:, y : 2 * y, x : 2 * x])
    assert sdata.attrs["pekasc"]["image_mpp"] == {"s": 0.5} and sdata.attrs["pekasc"]["objective_power"] == {"s": 20}


def test_a_slide_without_any_tile_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif", tile=(32, 48))
    forget(file, *range(12))
    with pytest.raises(ValueError, match="holds no pixels: none of its 12 tiles was written"):
        pk.io.read_slide(file)


def test_a_file_that_was_replaced_is_named(tmp_path: Path) -> None:
    level = tiff_levels(write(tmp_path / "s.tif", tile=(32, 48)))[0]
    write(tmp_path / "s.tif", PIXELS[:90], tile=(32, 48))
    with pytest.raises(OSError, match=r"rows 0:100, columns 0:140: the file .*s\.tif' has changed .* read it again"):
        level.compute()
