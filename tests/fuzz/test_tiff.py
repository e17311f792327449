"""Damaged TIFF files: `read_slide` gives pixels of the shape it says, or an error that names the file."""

from __future__ import annotations

import io
import struct
import tempfile
import time
import tracemalloc
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pekasc as pk

PIXELS = np.random.default_rng(0).integers(90, 220, (96, 128, 3), dtype=np.uint8)
PLANES = np.moveaxis(PIXELS, -1, 0)
ALPHA = np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1)
TILED: dict[str, Any] = {"photometric": "rgb", "tile": (32, 32), "metadata": None}
APERIO = "Aperio Image Library v12\r\n128x96 (32x32) JPEG/RGB Q=70|AppMag = 40|MPP = 0.25"
PER_CM: dict[str, Any] = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
OME = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}

SEEDS: dict[str, tuple[dict[str, Any], list[tuple[np.ndarray, dict[str, Any]]]]] = {
    "tiles": ({}, [(PIXELS, TILED | {"compression": "deflate", "predictor": True} | PER_CM)]),
    "tiles of jpeg": ({}, [(PIXELS, TILED | {"compression": "jpeg", "description": APERIO})]),
    "tiles of jpeg 2000": ({}, [(PIXELS, TILED | {"compression": "jpeg2000"})]),
    "strips": ({}, [(PIXELS, {"photometric": "rgb", "rowsperstrip": 32, "metadata": None} | PER_CM)]),
    "strips of lzw, big endian": (
        {"byteorder": ">"},
        [(PIXELS, {"photometric": "rgb", "rowsperstrip": 32, "metadata": None, "compression": "lzw"})],
    ),
    "pyramid": (
        {"bigtiff": True},
        [(PIXELS[:: 2**i, :: 2**i], TILED | {"compression": "deflate", "subfiletype": int(i > 0)}) for i in range(3)],
    ),
    "pyramid of ome": (
        {"ome": True},
        [
            (PIXELS, TILED | {"compression": "zstd", "subifds": 1, "metadata": OME | {"axes": "YXS"}}),
            (PIXELS[::2, ::2], TILED | {"compression": "zstd", "subfiletype": 1}),
        ],
    ),
    "channels of ome": (
        {"ome": True},
        [(PLANES, TILED | {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "compression": "deflate"})],
    ),
    "planes": ({}, [(PLANES, TILED | {"planarconfig": "separate", "compression": "packbits"})]),
    "alpha": ({}, [(ALPHA, TILED | {"extrasamples": ["unassalpha"]})]),
    "imagej": ({"imagej": True}, [(PIXELS, {"resolution": (2, 2), "metadata": {"unit": "um"}})]),
}
NUMBERS = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    15,
    16,
    31,
    33,
    64,
    127,
    129,
    255,
    256,
    4096,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**32 - 1,
]
MEMORY = 400 * 2**20
SECONDS = 60


@lru_cache
def seed(name: str) -> bytes:
    how, pages = SEEDS[name]
    out = io.BytesIO()
    with tifffile.TiffWriter(out, **how) as tiff:
        for pixels, options in pages:
            tiff.write(pixels, **options)
    return out.getvalue()


@lru_cache
def entries(name: str) -> list[tuple[int, int, str, bool]]:
    """Return the places of tags: their offsets, sizes, byte order, and whether the file is a BigTIFF."""
    with tifffile.TiffFile(io.BytesIO(seed(name))) as tiff:
        pages = [*tiff.pages, *(page for level in tiff.series[0].levels for page in level.pages)]
        return [
            (tag.offset, tiff.tiff.tagsize, tiff.byteorder, tiff.is_bigtiff)
            for page in {page.offset: page for page in pages if isinstance(page, tifffile.TiffPage)}.values()
            for tag in page.tags
        ]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A small TIFF with bytes, tags or digits changed, or parts cut out, doubled, or zeroed."""
    name = draw(st.sampled_from(sorted(SEEDS)))
    content = bytearray(seed(name))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["tag", "tag", "tag", "byte", "head", "digit", "cut", "zero", "double"]))
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "tag":
            offset, size, order, big = draw(st.sampled_from(entries(name)))
            field = draw(st.sampled_from(["code", "type", "count", "value", "value"]))
            number = draw(st.sampled_from(NUMBERS) | st.integers(0, 400))
            at = offset + {"code": 0, "type": 2, "count": 4, "value": 12 if big else 8}[field]
            form = order + ("H" if field in ("code", "type") or number < 2**16 and draw(st.booleans()) else "I")
            if at + struct.calcsize(form) <= len(content):
                struct.pack_into(form, content, at, number & (2 ** (8 * struct.calcsize(form)) - 1))
        elif kind in ("byte", "head"):
            at = place if kind == "byte" else place % 32
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(content[:4000]) if 48 <= byte < 58]
            if digits:
                at = draw(st.sampled_from(digits))
                content[at : at + 1] = draw(st.sampled_from([b"0", b"7", b"9" * 9, b"-", b"<", b"e", b""]))
        elif kind == "cut":
            del content[place:]
        else:
            part = content[place : place + draw(st.integers(1, 300))]
            content[place : place + (len(part) if kind == "zero" else 0)] = (
                part if kind == "double" else bytes(len(part))
            )
    return bytes(content)


def outcome(content: bytes) -> str:
    """Read every pixel of a file, and return what came of it: "read", or the kind of the error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "slide.tif")
        file.write_bytes(content)
        tracemalloc.start()
        began = time.monotonic()
        try:
            sdata = pk.io.read_slide(file)
            levels = [level.data for level in _levels(sdata["slide"])]
            pixels = [level.compute(scheduler="sync") for level in levels]
            result = "read"
        except (ValueError, OSError) as error:
            assert "slide" in str(error), f"the file is not named: {error!r}"
            result, pixels, levels = type(error).__name__, [], []
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY, f"{peak / 2**20:.0f} MB for a file of {len(content)} bytes"
        assert time.monotonic() - began < SECONDS
        assert [path.name for path in Path(folder).iterdir()] == ["slide.tif"] and file.read_bytes() == content
        for level, array in zip(levels, pixels, strict=True):
            assert array.shape == level.shape and array.shape[0] == 3 and array.dtype == np.uint8
        return result


def _levels(image: Any) -> list[Any]:
    return list(sd.get_pyramid_levels(image)) if hasattr(image, "children") else [image]


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_not_damaged_is_read(name: str) -> None:
    assert outcome(seed(name)) == "read"


QUIET = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=50, **QUIET)
@given(content=damaged())
@example(content=b"")
@example(content=b"II*\0")
def test_damaged_files(content: bytes) -> None:
    assert outcome(content) in ("read", "ValueError", "OSError")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000, **QUIET)
@given(content=damaged())
def test_many_damaged_files(content: bytes) -> None:
    assert outcome(content) in ("read", "ValueError", "OSError")
