"""The pixel size that a TIFF says: OME metadata, descriptions, ImageJ's metadata and resolution tags must agree."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pekasc._sections import MPP_LIMITS
from pekasc.io._lengths import INCH_UM, is_no_length, um_per_unit
from pekasc.io._tiff_layout import main_series, open_tiff
from pekasc.io._tiff_ome import ome_images
from pekasc.io._tiff_philips import philips_spacing

_TOLERANCE = 0.02
_TAG_UNITS = {2: ("inch", INCH_UM), 3: ("cm", 1e4), 4: ("mm", 1e3), 5: ("um", 1.0)}  # 4 and 5 are of libraries
_NUMBER = r"([^\s|;]+)"
_SIZE = re.compile(r"^\s*(\d{1,9})x(\d{1,9})\b(?:\s*\[[^\]\n]*?(\d{1,9})x(\d{1,9})\])?", re.MULTILINE)


@dataclass(frozen=True)
class _Source:
    """What one part of the file says: a size in um, or why it says none that can be used."""

    where: str
    mpp: float | None = None
    problem: str = ""
    also: tuple[float, ...] = ()  # what it may mean, if another source confirms it

    def __str__(self) -> str:
        if not self.problem:
            return f"{self.mpp:.6g} um per pixel by its {self.where}"
        problem = self.problem
        if self.where.endswith("tags"):  # which are several
            problem = re.sub(r"^(say|give|ha)s\b", lambda verb: {"ha": "have"}.get(verb[1], verb[1]), problem)
        return f"its {self.where} {problem}"


@dataclass(frozen=True)
class PixelSize:
    """The pixel size of the finest level in um, or None, what says it, and what the file says beside it."""

    mpp: float | None
    unused: list[str] = field(default_factory=list)
    source: str = ""


def tiff_mpp(path: Path, number: int | None = None) -> PixelSize:
    """Return the pixel size of the finest level of a TIFF's image of that number, by default the largest.

    Raises
    ------
    ValueError
        If two sources in the file differ by more than 2 %.
    """
    with open_tiff(str(path)) as file:
        series = main_series(file, str(path), number)
        page = series.levels[0].keyframe
        try:
            size = (int(page.imagewidth), int(page.imagelength))
            number, name = file.series.index(series), str(series.name or "")
            texts = [str(page.description or ""), str(file.pages.first.description or "")]
            tags = {code: page.tags.valueof(code) for code in (282, 283, 296)}
        except Exception as error:
            raise ValueError(f"The image {str(path)!r} cannot be read as TIFF: {error}") from error
    found = [
        *_ome(texts[1], number, size, name),
        *_aperio(texts[0], size),
        *_philips(texts[1]),
        *_resolution(tags, texts[0]),
    ]
    return _agree(found, path.name)


def pixel_size(where: str, values: Sequence[Any]) -> PixelSize:
    """Return the pixel size of a slide that one place says, as written for x and y in um; None is nothing."""
    if None in values:
        return PixelSize(None)
    sizes = [size for value in values if (size := as_number(value)) is not None]
    if len(sizes) < len(values):
        return PixelSize(None, [f"its {where} says {values}, which is no size"])
    return _agree([_source(where, sizes)], "")


def _agree(found: Sequence[_Source], name: str) -> PixelSize:
    usable = [source for source in found if source.mpp is not None]
    unused = [str(source) for source in found if source.mpp is None and not source.also]
    chosen = usable[0].mpp if usable else None
    for other in usable[1:]:
        if not _same(other.mpp, chosen):
            raise _disagreement(name, usable[0], other)
    for source in found:
        if not source.also:
            continue
        if chosen is None:
            unused.append(str(source))
        elif not any(_same(mpp, chosen) for mpp in source.also):
            raise _disagreement(name, usable[0], source)
    return PixelSize(chosen, unused, usable[0].where if usable else "")


def _disagreement(name: str, one: _Source, other: _Source) -> ValueError:
    return ValueError(
        f"The slide {name!r} says two pixel sizes: {one}, but {other}. Give the right one as `image_mpp=` "
        "(um per pixel)."
    )


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= _TOLERANCE * min(a, b)


def described_size(text: str) -> tuple[int, int] | None:
    """Return width and height of the image that an Aperio description tells of."""
    given = _SIZE.search(text)
    if given is None:
        return None
    # [x,y WxH] is the part of the scan that the file holds
    width, height = int(given.group(3) or given.group(1)), int(given.group(4) or given.group(2))
    return (width, height) if width and height else None


def as_number(text: Any) -> float | None:
    """Return a number that is written or given; None if it is none, or not positive and finite."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _source(where: str, sizes: Sequence[float], note: str = "") -> _Source:
    """Return a source that says these sizes of a pixel, in um, along x and y."""
    words = " x ".join(f"{size:.4g}" for size in sizes) if not _same(sizes[0], sizes[-1]) else f"{sizes[0]:.4g}"
    if not _same(sizes[0], sizes[-1]):
        return _Source(where, problem=f"says {words} um per pixel{note}, which is not square")
    if not MPP_LIMITS[0] <= sizes[0] <= MPP_LIMITS[1]:
        return _Source(where, problem=f"says {words} um per pixel{note}, which no microscope has")
    return _Source(where, sizes[0])


def _ome(text: str, number: int, size: tuple[int, int], name: str) -> list[_Source]:
    if not text.lstrip().startswith("<") or "<OME" not in text[:4096]:
        return []
    where = "OME metadata"
    images = ome_images(text)
    if not images:
        return [_Source(where, problem="cannot be read: it is damaged, or describes no image")]
    image = images.matching(number, *size, name)
    if image is None:
        if not any(other.physical for other in images):
            return []
        return [_Source(where, problem=f"describes no image of {size[0]} x {size[1]} pixels")]
    sizes = []
    for value, unit in image.physical.values():
        factor, count = um_per_unit(unit), as_number(value)
        if factor is None:
            why = "which is no length" if is_no_length(unit) else "a unit that is not known"
            return [_Source(where, problem=f"says {value} {unit!r} per pixel, {why}")]
        if count is None or as_number(count * factor) is None:
            return [_Source(where, problem=f"says {value!r} {unit} per pixel, which is no size")]
        sizes.append(count * factor)
    return [_source(where, sizes)] if sizes else []


def _aperio(text: str, size: tuple[int, int]) -> list[_Source]:
    """Return what ``MPP =`` in a description says, which holds for an image of the size that the description gives."""
    match = re.search(rf"\bMPP\s*=\s*{_NUMBER}", text)
    if match is None:
        return []
    where, said = "description (MPP)", match.group(1).rstrip(",")
    mpp = as_number(said)
    if mpp is None:
        return [_Source(where, problem=f"says {said!r} um per pixel, which is no size")]
    source = _source(where, [mpp])
    given = described_size(text)
    if source.mpp is None or given is None:
        return [source]
    width, height = given
    if _same(width, size[0]) and _same(height, size[1]):
        return [source]
    scaled = [mpp * width / size[0], mpp * height / size[1]]
    problem = (
        f"says {mpp:.6g} um per pixel for an image of {width} x {height} pixels, while this one has "
        f"{size[0]} x {size[1]}"
    )
    # part of that image at its pixel size, or all of it at another
    return [_Source(where, problem=problem, also=(mpp, scaled[0]) if _same(*scaled) else (mpp,))]


def _philips(text: str) -> list[_Source]:
    written = philips_spacing(text)
    if written is None:
        return []
    where = "description (DICOM_PIXEL_SPACING)"
    sizes = [size for value in written if (size := as_number(value)) is not None]
    if len(written) != 2 or len(sizes) != 2:
        said = f"says {' x '.join(written)} mm per pixel, which is no size" if written else "cannot be read"
        return [_Source(where, problem=said)]
    return [_source(where, [1e3 * size for size in sizes])]


def _resolution(tags: dict[int, Any], text: str) -> list[_Source]:
    if tags[282] is None or tags[283] is None:
        return []
    per_unit = [_rational(tags[282]), _rational(tags[283])]
    unit = 2 if tags[296] is None else int(tags[296]) if isinstance(tags[296], int) else 0
    found = []
    names = [_imagej_unit(text, f"{axis}unit") or _imagej_unit(text, "unit") for axis in "xy"]
    if names[0] is not None and names[1] is not None:
        found += _in_units("ImageJ metadata", per_unit, [(name, um_per_unit(name)) for name in (names[0], names[1])])
        if unit not in _TAG_UNITS:
            return found
    if unit in _TAG_UNITS:
        return found + _in_units("resolution tags", per_unit, [_TAG_UNITS[unit]] * 2, unit == 2)
    if None not in per_unit and per_unit != [1.0, 1.0]:
        problem = f"say {per_unit[0]:.6g} pixels per unit, without a unit"
        found.append(_Source("resolution tags", problem=problem))
    return found


def _in_units(
    where: str, per_unit: list[float | None], units: list[tuple[str, float | None]], dots: bool = False
) -> list[_Source]:
    for name, factor in units:
        if factor is None:
            if is_no_length(name):
                return []  # not calibrated
            return [_Source(where, problem=f"gives pixels per {name!r}, a unit that is not known")]
    sizes = [factor / n for n, (_, factor) in zip(per_unit, units, strict=True) if n is not None and factor is not None]
    if len(sizes) < 2 or any(as_number(size) is None for size in sizes):
        return [_Source(where, problem="has a resolution that is no positive number")]
    note = f" ({per_unit[0]:.6g} dots per inch)" if dots else ""
    return [_source(where, sizes, note)]


def _imagej_unit(text: str, key: str) -> str | None:
    if not text.startswith("ImageJ="):
        return None
    match = re.search(rf"^{key}=(.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else None


def _rational(value: Any) -> float | None:
    if isinstance(value, tuple):
        if len(value) != 2 or not value[1]:
            return None
        value = value[0] / value[1]
    return as_number(value)
