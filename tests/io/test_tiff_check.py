"""What a TIFF says of its tiles must be possible."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import pekasc as pk

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


def test_levels_are_copies_of_the_first(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif", 2)
    assert "scale1" in pk.io.read_slide(file)["s"]
    file = tmp_path / "t.ome.tif"
    with tifffile.TiffWriter(file, ome=True) as tiff:
        tiff.write(PIXELS, photometric="rgb", metadata={"axes": "YXS"}, subifds=1, **TILED)
        tiff.write(PIXELS[:, ::2], photometric="rgb", metadata=None, subfiletype=1, **TILED)
    with pytest.raises(ValueError, match="no smaller copy of the finest level: 64 x 96 pixels beside 128 x 96"):
        pk.io.read_slide(file)


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
