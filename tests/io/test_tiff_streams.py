"""Tiles that bring a size of their own."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
import pytest

from pekasc.io._tiff_streams import check_stream

PIXELS = np.random.default_rng(0).integers(90, 220, (48, 64, 3), dtype=np.uint8)
STREAMS: dict[str, tuple[int, Any]] = {
    "jpeg": (7, imagecodecs.jpeg8_encode(PIXELS)),
    "jpeg 2000": (33005, imagecodecs.jpeg2k_encode(PIXELS, codecformat="j2k")),
    "jp2": (34712, imagecodecs.jpeg2k_encode(PIXELS, codecformat="jp2")),
    "png": (34933, imagecodecs.png_encode(PIXELS)),
    "webp": (50001, imagecodecs.webp_encode(PIXELS, level=80)),
    "webp, lossless": (50001, imagecodecs.webp_encode(PIXELS, lossless=True)),
}


@pytest.mark.parametrize(("compression", "data"), STREAMS.values(), ids=STREAMS)
def test_the_size_of_a_stream(compression: int, data: bytes) -> None:
    check_stream(data, compression, (48, 64), (48, 64))
    check_stream(data, compression, (64, 64), (48, 64))  # cut where the image ends
    check_stream(data, compression, (48, 64), (5, 7))
    for tile in ((64, 48), (48, 128), (32, 64)):
        with pytest.raises(ValueError, match=f"64 x 48 pixels, not {tile[1]} x {tile[0]}"):
            check_stream(data, compression, tile, tile)


@pytest.mark.parametrize(("compression", "data"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("n", [1, 20, 45])
def test_a_stream_that_is_cut_short(compression: int, data: bytes, n: int) -> None:
    with pytest.raises(ValueError, match="cut short|no WebP|no JPEG 2000|pixels, not 64 x 50"):
        check_stream(data[:n], compression, (50, 64), (50, 64))


def test_a_jpeg_without_its_end_is_cut_short() -> None:
    data = STREAMS["jpeg"][1]
    with pytest.raises(ValueError, match="cut short"):
        check_stream(data[: len(data) // 2], 7, (48, 64), (48, 64))
    check_stream(data + bytes(7), 7, (48, 64), (48, 64))  # padded


def test_streams_without_a_size_are_not_looked_at() -> None:
    check_stream(b"", 8, (16, 16), (16, 16))


def test_tiles_of_jpeg_2000() -> None:
    data: Any = bytearray(STREAMS["jpeg 2000"][1])
    data[24:32] = b"\0\0\0\1\0\0\0\1"
    with pytest.raises(ValueError, match="tiles of 1 x 1 pixels"):
        check_stream(bytes(data), 33005, (48, 64), (48, 64))


def test_channels_of_jpeg_2000() -> None:
    data: Any = bytearray(STREAMS["jpeg 2000"][1])
    data[40:42] = b"\x40\0"
    with pytest.raises(ValueError, match="16384 channels"):
        check_stream(bytes(data), 33005, (48, 64), (48, 64))
