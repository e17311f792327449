"""The directories of a TIFF, read with `struct` alone, before any other library sees the file."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pekasc.io._refusal import NotReadHere

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_NAMES = {
    254: "NewSubfileType", 256: "ImageWidth", 257: "ImageLength", 258: "BitsPerSample", 259: "Compression",
    262: "PhotometricInterpretation", 266: "FillOrder", 270: "ImageDescription", 273: "StripOffsets",
    274: "Orientation", 277: "SamplesPerPixel", 278: "RowsPerStrip", 279: "StripByteCounts", 282: "XResolution",
    283: "YResolution", 284: "PlanarConfiguration", 296: "ResolutionUnit", 317: "Predictor", 320: "ColorMap",
    322: "TileWidth", 323: "TileLength", 324: "TileOffsets", 325: "TileByteCounts", 330: "SubIFDs", 338: "ExtraSamples",
    339: "SampleFormat", 347: "JPEGTables",
}  # fmt: skip
_NUMBERS = set(_NAMES) - {270, 282, 283, 347}
_ONE_NUMBER = (254, 256, 257, 259, 262, 266, 274, 277, 278, 284, 296, 317, 322, 323)
_PLACES = (273, 279, 324, 325)
MCU_STARTS = 65426  # of NDPI, whose tiles are parts of one JPEG stream
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_MOST_TAGS = 4096
_MOST_DIRECTORIES = 1000


@dataclass(frozen=True)
class _Format:
    """Sizes of a TIFF's structures; NDPI is a classic TIFF with the high halves of offsets after each directory."""

    order: str
    big: bool
    ndpi: bool

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big or self.ndpi else "I")

    @property
    def inline(self) -> int:
        return 8 if self.big else 4


@dataclass(frozen=True)
class Directory:
    """One directory: where it lies, and the type, number and place of the values of its tags."""

    offset: int
    order: str
    tags: dict[int, tuple[int, int, int]]
    wide: dict[int, int]  # single values of NDPI that need more than 32 bits
    taken: list[tuple[int, int]]  # parts of the file that hold the directory and values of its tags

    def listed(self, file: BinaryIO, code: int) -> list[int]:
        """Return the values of a tag of integers as a list, empty where it is missing."""
        found = self.numbers(file, code)
        return [] if found is None else found.tolist()

    def numbers(self, file: BinaryIO, code: int) -> np.ndarray | None:
        """Return the values of a tag of integers; None where it is missing."""
        if code not in self.tags:
            return None
        if code in self.wide:
            return np.array([self.wide[code]], np.uint64)
        kind, count, place = self.tags[code]
        file.seek(place)
        data = file.read(count * _SIZES[kind])
        return np.frombuffer(data, self.order + _INTEGERS[kind]).astype(np.uint64)


def read_directories(path: Path) -> dict[int, Directory]:
    """Check the directories of a TIFF, and return them by their place in the file.

    Raises
    ------
    ValueError
        If the file is no TIFF, or a directory, or a value of a tag that is used, does not lie in it.
    """
    what = f"The image {str(path)!r}"
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        form, first = _header(file, what, ndpi=path.suffix.lower() == ".ndpi")
        found: dict[int, Directory] = {}
        at = first
        while at:
            directory, at = _directory(file, size, form, at, what, found)
            subs = directory.numbers(file, 330)
            for sub in () if subs is None else subs.tolist():
                if sub:
                    _directory(file, size, form, sub, what, found)
        places = sum(
            directory.tags[code][1] for directory in found.values() for code in _PLACES if code in directory.tags
        )
    if not found:
        raise ValueError(f"{what} is damaged: it holds no picture.")
    if places > size:
        raise ValueError(f"{what} is damaged: it lists {places} tiles or strips in {size} bytes.")
    return found


def _header(file: BinaryIO, what: str, ndpi: bool) -> tuple[_Format, int]:
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    version = struct.unpack(f"{order}H", start[2:4])[0] if order and len(start) >= 8 else 0
    if not start:
        raise ValueError(f"{what} is empty: it has 0 bytes. Download it again.")
    if version not in (42, 43):
        page = " It is a web page, which a server may send instead of a file." if _WEB_PAGE.match(start) else ""
        raise NotReadHere(
            f"{what} cannot be read as TIFF, PNG or JPEG: it begins with {start[:8]!r}.{page}",
            "If it is to be a slide, download it again or convert it, for instance with `vips tiffsave`.",
        )
    assert order is not None  # for the type checker
    form = _Format(order, version == 43, ndpi and version == 42 and order == "<")
    if form.big and (len(start) < 16 or struct.unpack(f"{order}HH", start[4:8]) != (8, 0)):
        raise ValueError(f"{what} is damaged: its offsets have {start[4:8]!r} as size.")
    width = struct.calcsize(form.offset)
    place = 8 if form.big else 4
    if len(start) < place + width:
        raise ValueError(f"{what} is cut short: it has {len(start)} bytes.")
    return form, int(struct.unpack(form.offset, start[place : place + width])[0])


def _directory(
    file: BinaryIO, size: int, form: _Format, at: int, what: str, found: dict[int, Directory]
) -> tuple[Directory, int]:
    """Read the directory at a place into `found`, and return it and the place of the next."""
    if at in found:
        raise ValueError(f"{what} is damaged: its directories lead back to the one at {at}.")
    if len(found) >= _MOST_DIRECTORIES:
        raise ValueError(
            f"{what} has more than {_MOST_DIRECTORIES} pictures; a slide has some levels, labels and such."
        )
    counter, entry = ("Q", 20) if form.big else ("H", 12)
    step = struct.calcsize(counter)
    file.seek(min(at, size))
    head = file.read(step)
    n = struct.unpack(form.order + counter, head)[0] if len(head) == step else 0
    width = struct.calcsize(form.offset)
    length = n * entry + width + (4 * n if form.ndpi else 0)
    if at < 8 or not 0 < n <= _MOST_TAGS or at + step + length > size:
        raise ValueError(
            f"{what} is damaged or cut short: it has {size} bytes, and the directory at {at} with {n} tags does not "
            "lie in it. Download it again."
        )
    data = file.read(length)
    following = struct.unpack(form.offset, data[n * entry : n * entry + width])[0]
    tags: dict[int, tuple[int, int, int]] = {}
    wide: dict[int, int] = {}
    taken = [(at, at + step + length)]
    for i in range(n):
        code, kind, count = struct.unpack(
            form.order + ("HHQ" if form.big else "HHI"), data[i * entry :][: entry - form.inline]
        )
        place = at + step + (i + 1) * entry - form.inline
        value = data[(i + 1) * entry - form.inline : (i + 1) * entry]
        high = data[n * entry + width + 4 * i :][:4] if form.ndpi else b""
        if (length_ := count * _SIZES.get(kind, 0)) > form.inline:
            begin = struct.unpack(form.offset, value + high)[0]
            taken.append((begin, begin + length_))
        if code in tags or (code not in _NAMES and code != MCU_STARTS):
            continue
        if kind not in _SIZES or (code in _NUMBERS and kind not in _INTEGERS) or not count:
            raise ValueError(
                f"{what} is damaged: {tag_name(code)} in the directory at {at} has {count} values of type {kind}."
            )
        if code in _ONE_NUMBER and count != 1:
            raise ValueError(
                f"{what} is damaged: {tag_name(code)} in the directory at {at} has {count} values, not one."
            )
        if count * _SIZES[kind] > form.inline:
            place = struct.unpack(form.offset, value + high)[0]
            if place < 8 or place + count * _SIZES[kind] > size:
                raise ValueError(
                    f"{what} is damaged or cut short: it has {size} bytes, and {tag_name(code)} of the directory at "
                    f"{at} ends at {place + count * _SIZES[kind]}. Download it again."
                )
        elif high.strip(b"\0") and count == 1 and kind in (4, 13):
            wide[code] = struct.unpack("<Q", value + high)[0]
        tags[code] = (kind, count, place)
    for code in (256, 257):
        if code not in tags:
            raise ValueError(f"{what} is damaged: the directory at {at} has no {tag_name(code)}.")
    found[at] = Directory(at, form.order, tags, wide, [part for part in taken if part[1] <= size])
    return found[at], int(following)


def tag_name(code: int) -> str:
    """Return the name of a tag."""
    return _NAMES.get(code, f"tag {code}")
