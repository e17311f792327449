"""The power of the objective that a slide was scanned with, as its file says, and whether a pixel size fits to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pekasc.io._tiff_layout import main_series, open_tiff
from pekasc.io._tiff_mpp import as_number, described_size
from pekasc.io._tiff_ome import ome_images

_LIMITS = (0.5, 250.0)
_UM_AT_ONE = 10.0  # um per pixel times power: scanners have 0.25 um at 40x, 0.5 um at 20x
_FACTOR = 2.0
_ROUNDING = 1.02
_APERIO = re.compile(r"\bAppMag\s*=\s*([^\s|;,]+)")
_SOURCE_LENS = 65421  # of NDPI


@dataclass(frozen=True)
class Power:
    """Power of an objective, and which part of the file says it.

    Attributes
    ----------
    value
        20 for 20x.
    where
        The part of the file.
    whole
        Whether the image has the size that it was scanned with; if it may have been saved at another, its pixels are
        not those of the objective.
    """

    value: float
    where: str
    whole: bool = True


def tiff_power(path: Path, number: int) -> Power | None:
    """Return the objective's power for the image of that number in a TIFF, from the first part of the file that has it.

    Raises
    ------
    ValueError
        If the file cannot be read.
    """
    with open_tiff(str(path)) as file:
        series = main_series(file, str(path), number)
        page = series.levels[0].keyframe
        try:
            size, name = (int(page.imagewidth), int(page.imagelength)), str(series.name or "")
            text, first = str(page.description or ""), str(file.pages.first.description or "")
            lens = page.tags.valueof(_SOURCE_LENS) if file.is_ndpi else None
        except Exception as error:
            raise ValueError(f"The image {str(path)!r} cannot be read as TIFF: {error}") from error
    image = ome_images(first if "<OME" in first[:4096] else None).matching(number, *size, name)
    given = described_size(text)
    match = _APERIO.search(text)
    found = [
        read_power(None if image is None else image.power, "OME metadata"),
        read_power(match.group(1) if match else None, "description (AppMag)", given is None or given == size),
        read_power(lens, "tag SourceLens"),
    ]
    return next((power for power in found if power is not None), None)


def read_power(value: object, where: str, whole: bool = True) -> Power | None:
    """Return a power as a file writes it; None if it is missing, or none of an objective."""
    power = as_number(value)
    return Power(power, where, whole) if power is not None and _LIMITS[0] <= power <= _LIMITS[1] else None


def check_power(power: Power, mpp: float, source: str, file_name: str) -> None:
    """Check that a pixel size is within a factor of 2 of what the objective has on scanners.

    Raises
    ------
    ValueError
        If it is not.
    """
    usual = _UM_AT_ONE / power.value
    if power.whole and not 1 / (_FACTOR * _ROUNDING) <= mpp / usual <= _FACTOR * _ROUNDING:
        raise ValueError(
            f"The slide {file_name!r} says {mpp:.6g} um per pixel by its {source}, but an objective of "
            f"{power.value:g}x by its {power.where}, with which scanners have about {usual:.3g} um. One of them is "
            "wrong, or the image was saved at another size than it was scanned with. Give the right pixel size as "
            "`image_mpp=` (um per pixel)."
        )
