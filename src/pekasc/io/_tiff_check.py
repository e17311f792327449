"""Whether the levels of a TIFF can be what it says: tiles lie in the file, as many and as large as a picture needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pekasc.io._limits import RATIO, check_size
from pekasc.io._tiff_directories import MCU_STARTS, Directory, tag_name
from pekasc.io._tiff_layout import Layout

_SAME = (256, 257, 258, 259, 262, 266, 274, 277, 278, 284, 317, 322, 323, 338, 339)  # in all planes of a level
_TILE_ROOM = 16 * 2**20  # a tile of this size needs no justification by its bytes
_ASPECT = 0.01
_LZW = 5


def check_levels(path: Path, directories: dict[int, Directory], levels: Mapping[int, Layout]) -> None:
    """Check that tiles are where the file has room for them, as many and as large as the picture needs.

    Raises
    ------
    ValueError
        If not, or if tiles overlap.
    """
    size = path.stat().st_size
    ranges = [_merged([(0, 8), *(part for directory in directories.values() for part in directory.taken)])]
    with path.open("rb") as file:
        for i, level in levels.items():
            what = f"The image {str(path)!r} (level {i})"
            check_size(*level.shape, size, what)
            for page in level.pages:
                directory = directories.get(page.offset)
                if directory is None:
                    raise ValueError(f"{what} is damaged: its directory at {page.offset} is in no list of the file.")
                _check_numbers(file, directory, directories[level.pages[0].offset], what)
                ranges.append(_check_tiles(file, directory, level, page, size, what))
    _check_overlap(np.concatenate(ranges), f"The image {str(path)!r}")


def is_copy(finest: tuple[int, int], shape: tuple[int, int]) -> bool:
    """Tell whether a level, (height, width), has the aspect of the finest, but for rounding."""
    height, width = finest
    if not 0 < shape[0] <= height or not 0 < shape[1] <= width:
        return finest == shape
    expected = height * shape[1] / width
    return abs(shape[0] - expected) <= max(2, _ASPECT * expected)


def _check_numbers(file: BinaryIO, directory: Directory, first: Directory, what: str) -> None:
    def values(code: int, default: int) -> list[int]:
        found = directory.numbers(file, code)
        return [default] if found is None else found.tolist()

    for code in _SAME:
        if directory is not first and directory.listed(file, code) != first.listed(file, code):
            raise ValueError(f"{what} is damaged: its channels differ in {tag_name(code)}.")
    samples = values(277, 1)[0]
    bits, formats, extra = values(258, 1), values(339, 1), directory.numbers(file, 338)
    if set(bits) != {8} or len(bits) not in (1, samples):
        raise ValueError(f"{what} is damaged: {samples} channels have {bits[:8]} bits.")
    if set(formats) != {1}:
        raise ValueError(f"{what} must hold unsigned integers, but its SampleFormat is {formats[:8]}.")
    if extra is not None and (extra > 2).any():
        raise ValueError(f"{what} is damaged: ExtraSamples is {extra.tolist()[:8]}; 0, 1 and 2 are defined.")
    colours = 1 if values(262, 0)[0] == 1 else 3  # brightness alone, or three
    if extra is not None and len(extra) != samples - colours:
        raise ValueError(f"{what} is damaged: of {samples} channels, ExtraSamples says of {len(extra)} what they are.")
    if values(284, 1)[0] not in (1, 2):
        raise ValueError(f"{what} is damaged: PlanarConfiguration is {values(284, 1)[0]}.")
    if values(317, 1)[0] not in (1, 2):
        raise ValueError(f"{what} has the predictor {values(317, 1)[0]}, which is not one of 8-bit colours.")


def _check_tiles(file: BinaryIO, directory: Directory, level: Layout, page: Any, size: int, what: str) -> np.ndarray:
    """Check the tiles or strips of one page, and return where they begin and end, (n, 2)."""
    width, height, samples, planar, compression = (
        int(directory.listed(file, code)[0]) if code in directory.tags else default
        for code, default in ((256, 0), (257, 0), (277, 1), (284, 1), (259, 1))
    )
    tile_height, tile_width = level.tile_px
    stored = 322 in directory.tags
    offsets, counts = (directory.numbers(file, code) for code in ((324, 325) if stored else (273, 279)))
    if offsets is None or counts is None:
        raise ValueError(f"{what} is damaged: it does not say where its {'tiles' if stored else 'strips'} are.")
    mcu = MCU_STARTS in directory.tags and level.tiled and not stored
    if mcu:
        offsets, counts = (np.asarray(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
        if (offsets < 8).any() or (counts < 0).any():
            raise ValueError(f"{what} is damaged: its tiles are not in order.")
        offsets, counts = offsets.astype(np.uint64), counts.astype(np.uint64)
    n = -(-height // tile_height) * -(-width // tile_width) * (samples if planar == 2 else 1)
    if not len(offsets) == len(counts) == n:
        raise ValueError(
            f"{what} is damaged: {width} x {height} pixels in {'tiles' if level.tiled else 'strips'} of {tile_width} x "
            f"{tile_height} need {n}, but {len(offsets)} offsets and {len(counts)} byte counts are there."
        )
    if stored and (tile_width % 16 or tile_height % 16):
        raise ValueError(f"{what} is damaged: tiles of {tile_width} x {tile_height} pixels, no multiples of 16.")
    written = counts > 0
    ranges = np.stack([offsets[written], offsets[written] + counts[written]], axis=1)
    if (ranges[:, 1] < ranges[:, 0]).any() or (ranges > size).any():
        raise ValueError(
            f"{what} is damaged or cut short: the file has {size} bytes, and its tiles end at {ranges.max()}. Download "
            "it again."
        )
    if not written.any():
        raise ValueError(f"{what} holds no pixels: none of its {n} {'tiles' if level.tiled else 'strips'} was written.")
    tile = tile_height * tile_width * (1 if planar == 2 else samples)
    most = int(counts.max())
    if tile > RATIO * most + _TILE_ROOM:
        raise ValueError(
            f"{what} is damaged: its tiles or strips have {tile_width} x {tile_height} pixels, {tile / 1e6:.0f} MB, "
            f"which no compression puts into {most} bytes."
        )
    if compression == 1:
        rows = np.full(n, tile_height)
        if not stored:  # the last strip of a plane may end with the picture
            short = slice(-(-height // tile_height) - 1, None, -(-height // tile_height))
            rows[short] = np.where(counts[short] == tile, tile_height, (height - 1) % tile_height + 1)
        wrong = written & (counts != rows * (tile // tile_height))
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"{what} is damaged: tile or strip {i} has {counts[i]} bytes, not {rows[i] * (tile // tile_height)}, "
                "and is not compressed."
            )
    if compression == _LZW:
        i = int(np.argmax(written))
        _check_lzw(file, int(offsets[i]), int(counts[i]), tile, f"{what} is damaged: tile or strip {i}")
    return ranges


def _check_lzw(file: BinaryIO, offset: int, count: int, tile: int, what: str) -> None:
    """Check that a tile is not longer than it should be; the decoder leaves out what is too much without a word."""
    import imagecodecs

    file.seek(offset)
    try:
        found = len(imagecodecs.lzw_decode(file.read(count), out=tile + 1))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{what} cannot be decoded: {error}") from error
    if found > tile:
        raise ValueError(f"{what} has more than {tile} bytes.")


def _merged(parts: list[tuple[int, int]]) -> np.ndarray:
    """Return parts of a file, (n, 2), joined where they overlap: tags may share their values."""
    out: list[list[int]] = []
    for begin, end in sorted(parts):
        if out and begin <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([begin, end])
    return np.array(out, np.uint64)


def _check_overlap(ranges: np.ndarray, what: str) -> None:
    """Check that no two parts of the file overlap; tiles with the same content may be one."""
    ranges = ranges[np.lexsort((ranges[:, 1], ranges[:, 0]))]
    before, after = ranges[:-1], ranges[1:]
    overlap = (after[:, 0] < before[:, 1]) & (before != after).any(axis=1)
    if overlap.any():
        i = int(np.argmax(overlap))
        raise ValueError(
            f"{what} is damaged: two of its parts overlap, bytes {before[i, 0]} to {before[i, 1]} and {after[i, 0]} to "
            f"{after[i, 1]}."
        )
