"""What a TIFF says of its tiles must be possible."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import pekasc as pk
from pekasc.io._tiff import tiff_levels
from pekasc.io._tiff_check import is_copy

PIXELS = np.random.default_rng(0).integers(90, 220, (96, 128, 3), dtype=np.uint8)
TILED: dict[str, Any] = {"tile": (32, 32), "compression": "deflate"}


def write(path: Path, n_levels: int = 1, **how: Any) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for i in range(n_levels):
            small = PIXELS[:: 2**i, :: 2**i]
            tiff.write(small, photometric="rgb", metadata=None, subfiletype=int(i > 0), **(TILED if not how else how))
    return path


def change(path: Path, code: int, value: Any, page: int = 0) -> Path:
    with tifffile.TiffFile(path, mode="r+b") as file:
        tag = file.pages[page].tags[code]
        tag.overwrite(value(list(np.atleast_1d(tag.value))) if callable(value) else value)
    return path


def _set(place: int, by: int) -> Any:
    return lambda values: [int(v) + by * (i == place) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("how", "code", "value", "match"),
    [
        (TILED, 256, 1000, "1000 x 96 pixels in tiles of 32 x 32 need 96, but 12 offsets and 12 byte counts"),
        (TILED, 256, 2**31, "2147483648 x 96 pixels, .* which no compression"),
        (TILED, 323, 40, "need 12|multiples of 16"),
        (TILED, 324, _set(5, 10**6), "its tiles end at"),
        (TILED, 324, _set(5, 3), "two of its parts overlap"),
        (TILED, 325, _set(5, 10), "two of its parts overlap"),
        (TILED, 258, (8, 8, 16), "uint8|bits"),
        (TILED, 284, 2, "need 36, but 12"),
        (TILED, 259, 1, "tile or strip 0 has .* bytes, not 3072, and is not compressed"),
        ({"rowsperstrip": 32, "compression": "lzw"}, 256, 64, "tile or strip 0 has more than 6144 bytes"),
        (TILED, 324, _set(0, -60), "two of its parts overlap"),
        ({"rowsperstrip": 32}, 256, 127, "tile or strip 0 has 12288 bytes, not 12192"),
        ({"rowsperstrip": 32}, 278, 0, "damaged"),
        ({"rowsperstrip": 32}, 278, 16, "need 6, but 3"),
    ],
)
def test_tiles_that_cannot_be(tmp_path: Path, how: dict[str, Any], code: int, value: Any, match: str) -> None:
    file = change(write(tmp_path / "s.tif", **how), code, value)
    with pytest.raises(ValueError, match=rf"s\.tif' .*({match})"):
        pk.io.read_slide(file)


def test_tiles_and_pictures_are_no_larger_than_their_bytes_justify(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif", rowsperstrip=96, compression="deflate")
    size = file.stat().st_size
    tracemalloc.start()
    for code, value, match in ((256, 10**6, "one|no compression"), (257, 10**9, "need|no compression")):
        change(file, code, value)
        with pytest.raises(ValueError, match=match):
            pk.io.read_slide(file)
    assert file.stat().st_size == size and tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("finest", "shape", "copy"),
    [
        ((9600, 12800), (9600, 12800), True),
        ((9601, 12803), (2400, 3200), True),
        ((9601, 12803), (2401, 3201), True),
        ((100_000, 50_000), (24, 12), True),
        ((96, 128), (96, 64), False),
        ((96, 128), (192, 256), False),
        ((9600, 12800), (512, 512), False),
    ],
)
def test_levels_have_the_aspect_of_the_finest(finest: tuple[int, int], shape: tuple[int, int], copy: bool) -> None:
    assert is_copy(finest, shape) is copy


def test_what_is_no_copy_is_no_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = PIXELS[::2, ::2]
    with tifffile.TiffWriter(tmp_path / "s.ome.tif", ome=True) as tiff:
        tiff.write(PIXELS, photometric="rgb", metadata={"axes": "YXS"}, subifds=2, **TILED)
        for level in (PIXELS[:, ::2], small):
            tiff.write(level, photometric="rgb", metadata=None, subfiletype=1, **TILED)
    levels = tiff_levels(tmp_path / "s.ome.tif")
    assert "the level of 64 x 96 px is no smaller copy of the slide" in caplog.text
    assert [level.shape for level in levels] == [(3, 96, 128), (3, 48, 64)]
    assert np.array_equal(np.moveaxis(levels[1].compute(), 0, -1), small)


def test_tiles_of_the_same_content_may_be_one(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif")
    with tifffile.TiffFile(file) as tiff:
        places = [list(tiff.pages[0].tags[code].value) for code in (324, 325)]
    for code, values in zip((324, 325), places, strict=True):
        values[5] = values[2]
        change(file, code, values)
    got = pk.io.read_slide(file)["s"].data.compute()
    assert np.array_equal(got[:, 32:64, 32:64], got[:, :32, 64:96])


def test_planes_that_differ(tmp_path: Path) -> None:
    planes = np.moveaxis(PIXELS, -1, 0)
    meta = {"axes": "CYX"}
    tifffile.imwrite(tmp_path / "s.ome.tif", planes, photometric="minisblack", metadata=meta, ome=True, **TILED)
    assert np.array_equal(pk.io.read_slide(tmp_path / "s.ome.tif")["s"].data.compute(), planes)
    change(tmp_path / "s.ome.tif", 262, 0, page=1)
    with pytest.raises(ValueError, match="its channels differ in PhotometricInterpretation"):
        pk.io.read_slide(tmp_path / "s.ome.tif")
