"""The directories of a TIFF: each lies in the file, and none leads back."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pekasc.io._tiff_directories import read_directories

PIXELS = np.zeros((64, 96, 3), np.uint8)


def write(path: Path, n: int = 1, **how: Any) -> Path:
    with tifffile.TiffWriter(path, **{k: how.pop(k) for k in ("bigtiff", "byteorder") if k in how}) as tiff:
        for _ in range(n):
            tiff.write(PIXELS, photometric="rgb", metadata=None, **how)
    return path


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_the_numbers_are_those_that_tifffile_reads(tmp_path: Path, bigtiff: bool, byteorder: str) -> None:
    file = write(tmp_path / "s.tif", 3, bigtiff=bigtiff, byteorder=byteorder, tile=(32, 32))
    found = read_directories(file)
    with tifffile.TiffFile(file) as tiff, file.open("rb") as raw:
        assert list(found) == [page.offset for page in tiff.pages]
        for page in tiff.pages:
            for tag in page.tags:
                if tag.code in (256, 257, 258, 277, 324, 325):
                    assert found[page.offset].listed(raw, tag.code) == np.ravel(tag.value).tolist()
            assert found[page.offset].numbers(raw, 330) is None


def test_sub_directories_are_found(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        tiff.write(PIXELS, photometric="rgb", metadata=None, subifds=2)
        for _ in range(2):
            tiff.write(PIXELS, photometric="rgb", metadata=None, subfiletype=1)
    assert len(read_directories(tmp_path / "s.tif")) == 3


def _ndpi(path: Path, offset: int) -> None:
    """A file as Hamamatsu writes it: offsets of 64 bits, the high halves of values after the directory."""
    tags = [(256, 4, 1, 96), (257, 4, 1, 64), (273, 4, 1, offset & 0xFFFFFFFF), (279, 4, 1, 7)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    high = struct.pack("<IIII", 0, 0, offset >> 32, 0)
    path.write_bytes(b"II*\0" + struct.pack("<Q", 12) + struct.pack("<H", 4) + entries + bytes(8) + high)


def test_offsets_of_ndpi_have_64_bits(tmp_path: Path) -> None:
    _ndpi(tmp_path / "s.ndpi", 5 * 2**32 + 7)
    found = read_directories(tmp_path / "s.ndpi")[12]
    with (tmp_path / "s.ndpi").open("rb") as raw:
        assert [found.listed(raw, code) for code in (256, 257, 273, 279)] == [[96], [64], [5 * 2**32 + 7], [7]]


def _entry(content: bytearray, code: int) -> int:
    """Return the place of a tag in the first directory of a small classic file."""
    at = struct.unpack_from("<I", content, 4)[0]
    n = struct.unpack_from("<H", content, at)[0]
    return next(p for p in range(at + 2, at + 2 + 12 * n, 12) if struct.unpack_from("<H", content, p)[0] == code)


def _loop(content: bytearray) -> None:
    at = struct.unpack_from("<I", content, 4)[0]
    struct.pack_into("<I", content, at + 2 + 12 * struct.unpack_from("<H", content, at)[0], at)


def _tag(code: int, kind: int, count: int, value: int) -> Any:
    return lambda content: struct.pack_into("<HII", content, _entry(content, code) + 2, kind, count, value)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda c: struct.pack_into("<I", c, 4, 0), "holds no picture"),
        (lambda c: struct.pack_into("<I", c, 4, 10**9), "damaged or cut short: it has .* the directory at 1000000000"),
        (_loop, "directories lead back to the one at 8"),
        (lambda c: c.__setitem__(slice(None), c[:6]), "begins with"),
        (lambda c: c.__setitem__(slice(None), c[:9]), "damaged or cut short: it has 9 bytes"),
        (lambda c: c.__setitem__(slice(0, 2), b"XX"), "cannot be read as TIFF, PNG or JPEG: it begins with b'XX"),
        (_tag(324, 4, 10**9, 500), "TileOffsets of the directory at 8 ends at 4000000500"),
        (_tag(256, 2, 1, 96), "ImageWidth in the directory at 8 has 1 values of type 2"),
        (_tag(256, 3, 2, 96), "ImageWidth in the directory at 8 has 2 values"),
        (lambda c: struct.pack_into("<H", c, _entry(c, 256), 60000), "has no ImageWidth"),
    ],
)
def test_damaged_directories(tmp_path: Path, damage: Any, match: str) -> None:
    file = write(tmp_path / "s.tif", tile=(32, 32))
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"s\.tif' .*{match}"):
        read_directories(file)


def test_a_file_of_pages_alone_ends(tmp_path: Path) -> None:
    one = struct.pack("<H", 2) + struct.pack("<HHII", 256, 4, 1, 1) + struct.pack("<HHII", 257, 4, 1, 1)
    step = len(one) + 4
    pages = b"".join(one + struct.pack("<I", 8 + (i + 1) * step) for i in range(5000))
    (tmp_path / "s.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + pages)
    with pytest.raises(ValueError, match="more than 1000 pictures"):
        read_directories(tmp_path / "s.tif")


def test_an_offset_beyond_what_a_system_can_seek(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif", bigtiff=True)
    content = bytearray(file.read_bytes())
    struct.pack_into("<Q", content, 8, 2**64 - 8)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"directory at {2**64 - 8} with 0 tags does not lie in it"):
        read_directories(file)
