"""What the first bytes of a compressed tile say, before a decoder believes them."""

from __future__ import annotations

import struct

_JPEG = {7, 33007, 34892}  # not the old kind, 6, whose tables lie elsewhere
_JPEG2000 = {33003, 33004, 33005, 34712}
_PNG, _WEBP = 34933, 50001
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_CODESTREAM = b"\xff\x4f\xff\x51"
_BOXES = 4096  # a codestream begins within
_MOST_CHANNELS = 4
_MOST_TILES = 1024


def check_stream(data: bytes, compression: int, tile_px: tuple[int, int], needed_px: tuple[int, int]) -> None:
    """Check that a tile in a format with a size of its own has that of the tiles, or of what the image needs of it.

    A decoder makes room for what the stream says, and a picture of another shape would be cut into rows anew.

    Parameters
    ----------
    data
        The tile, compressed.
    compression
        TIFF's number of the compression; others than JPEG, JPEG 2000, PNG and WebP have no size of their own.
    tile_px
        Height and width of the tiles.
    needed_px
        The same, of the part within the image.

    Raises
    ------
    ValueError
        If it has another size, or is cut short.
    """
    if compression in _JPEG:
        size = _jpeg(data)
    elif compression in _JPEG2000:
        size = _jpeg2000(data)
    elif compression == _PNG:
        size = struct.unpack(">II", data[16:24])[::-1] if len(data) > 24 else (0, 0)
    elif compression == _WEBP:
        size = _webp(data)
    else:
        return
    if not (size[0] in (tile_px[0], needed_px[0]) and size[1] in (tile_px[1], needed_px[1])):
        raise ValueError(f"it says that it has {size[1]} x {size[0]} pixels, not {tile_px[1]} x {tile_px[0]}")


def _jpeg(data: bytes) -> tuple[int, int]:
    # libjpeg fills with grey what is missing, and decodes without an error
    if data.rfind(b"\xff\xd9") < 0:
        raise ValueError("its JPEG stream is cut short")
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ValueError("its JPEG stream has no frame")


def _jpeg2000(data: bytes) -> tuple[int, int]:
    at = data.find(_CODESTREAM, 0, _BOXES)
    if at < 0 or len(data) < at + 42:
        raise ValueError("it has no JPEG 2000 codestream")
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">IIIIII", data, at + 8)
    channels = struct.unpack_from(">H", data, at + 40)[0]
    # a decoder makes room for each of its own tiles
    if (right - left) * (bottom - top) > _MOST_TILES * tile_width * tile_height:
        raise ValueError(f"its JPEG 2000 codestream has tiles of {tile_width} x {tile_height} pixels")
    if not 0 < channels <= _MOST_CHANNELS:
        raise ValueError(f"its JPEG 2000 codestream has {channels} channels")
    return bottom - top, right - left


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if len(data) < 30 or data[:4] != b"RIFF":
        raise ValueError("it has no WebP stream")
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (n & 0x3FFF for n in struct.unpack_from("<HH", data, 26))
    return height, width
