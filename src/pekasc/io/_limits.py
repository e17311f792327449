"""How large a decoded picture may be, for the size of its file."""

from __future__ import annotations

from pekasc._settings import get_logger

logger = get_logger(__name__)

# deflate, the densest of the common compressions, makes at most 1032 bytes of one
RATIO = 1100
_ROOM = 64 * 2**20  # of files that are small altogether
_LARGE_CHUNK = 512 * 2**20  # decoded at once: worth a warning


def check_size(height: int, width: int, file_size: int, what: str) -> None:
    """Check that a picture is not larger than the bytes in its file justify.

    Raises
    ------
    ValueError
        If it is, or has no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{what} has no pixels: {width} x {height}.")
    if 3 * height * width > RATIO * file_size + _ROOM:
        raise ValueError(
            f"{what} is damaged: it says that it has {width} x {height} pixels, {3 * height * width / 1e6:.0f} MB, "
            f"which no compression puts into {file_size} bytes."
        )


def warn_of_large_chunk(file_name: str, size: int) -> None:
    """Warn of a picture of which `size` bytes, a great many, are decoded at once."""
    if size > _LARGE_CHUNK:
        logger.warning(
            "The image %s has no tiles: %.1f GB are decoded at once to look at any part of it. Write it as a tiled "
            "pyramid.", file_name, size / 1e9,
        )  # fmt: skip
