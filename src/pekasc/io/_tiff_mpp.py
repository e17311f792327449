"""The pixel size that a TIFF says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pekasc.io._tiff_layout import main_series, open_tiff

_UM_PER = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}
_MPP_LIMITS = (0.02, 20.0)
_SQUARE = 0.02


def tiff_mpp(path: Path) -> float | None:
    """Return the pixel size in um of a TIFF's finest level from its metadata, or None if missing or implausible.

    It is in the OME metadata of an OME-TIFF, in the description of an Aperio slide, and else in the resolution tags.
    """
    with open_tiff(str(path)) as file:
        series, _ = main_series(file, str(path))
        page: Any = series.levels[0].keyframe
        text = page.description or ""
        found: list[float] = []
        if file.is_ome and file.ome_metadata:
            found = _ome_mpp(file.ome_metadata, file.series.index(series))
        elif match := re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", text):
            found = [float(match.group(1))]
        elif {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
            # without a unit the numbers are only a ratio
            unit = page.tags["ResolutionUnit"].value if "ResolutionUnit" in page.tags else 2
            if int(unit) in (2, 3):
                found = [1 / per_um for per_um in page.get_resolution(unit="micrometer") if per_um > 0]
    if not found or max(found) > (1 + _SQUARE) * min(found) or not _MPP_LIMITS[0] <= found[0] <= _MPP_LIMITS[1]:
        return None  # programs without a pixel size write defaults such as 72 dots per inch
    return found[0]


def _ome_mpp(metadata: str, image: int) -> list[float]:
    """Return the pixel sizes along x and y of one image of OME metadata, in um."""
    from xml.etree import ElementTree

    pixels = [e for e in ElementTree.fromstring(metadata).iter() if e.tag.endswith("}Pixels")]
    if image >= len(pixels):
        return []
    found = []
    for axis in "XY":
        value = pixels[image].get(f"PhysicalSize{axis}")
        factor = _UM_PER.get(pixels[image].get(f"PhysicalSize{axis}Unit", "µm"))
        if value is not None and factor is not None:
            found.append(float(value) * factor)
    return found
