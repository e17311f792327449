"""Which tiles of a slide are kept: on the image, on tissue, in focus and without pen marks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pekasc._sections import Section, TissueMask
from pekasc.tiling import (
    TileGeometry,
    TileReader,
    TileSpec,
    TileStream,
    batches,
    pen_fraction,
    sharpness,
    sharpness_threshold,
)

_QUALITY_MPP = 1.0  # um per pixel at which focus and pen marks are judged
_QUALITY_BATCH = 64
_LEAST_PX = 8


@dataclass(frozen=True, eq=False)
class Quality:
    """What was measured of every candidate, which are kept, and how many are not, by reason."""

    tissue: np.ndarray
    sharpness: np.ndarray
    pen: np.ndarray
    keep: np.ndarray
    left_out: dict[str, int]
    thresholds: dict[str, float]


def measure(
    slide: Section, spec: TileSpec, centres_px: np.ndarray, mask: TissueMask | None,
    min_tissue: float | None, min_sharpness: float | str | None, max_pen: float | None,
) -> Quality:  # fmt: skip
    """Measure tissue, focus and pen marks of every candidate that is left, and say which are kept."""
    n = len(centres_px)
    tissue, sharp, pen = (np.full(n, np.nan, np.float32) for _ in range(3))
    keep = TileGeometry(centres_px, slide.um_to_px, spec).inside(*slide.size_px) > 0
    left_out = {
        "off the image": int((~keep).sum()),
        "with too little tissue": 0,
        "out of focus": 0,
        "with pen marks": 0,
    }
    thresholds: dict[str, float] = {}
    if mask is not None:
        tissue = mask.fraction(centres_px, slide.um_to_px * spec.side_um / 2)
        if min_tissue is not None:
            thresholds["min_tissue"] = float(min_tissue)
            bare = keep & (tissue < min_tissue)
            left_out["with too little tissue"], keep = int(bare.sum()), keep & ~bare
    if min_sharpness is None and max_pen is None:
        return Quality(tissue, sharp, pen, keep, left_out, thresholds)
    at = np.flatnonzero(keep)
    sharp[at], pen[at] = _focus_and_pen(slide, spec, centres_px[at])
    if min_sharpness is not None:
        least = sharpness_threshold(sharp[at]) if isinstance(min_sharpness, str) else float(min_sharpness)
        thresholds["min_sharpness"] = least
        blurred = keep & (sharp < least)  # a tile without structure has no sharpness
        left_out["out of focus"], keep = int(blurred.sum()), keep & ~blurred
    if max_pen is not None:
        thresholds["max_pen"] = float(max_pen)
        marked = keep & (pen > max_pen)
        left_out["with pen marks"], keep = int(marked.sum()), keep & ~marked
    return Quality(tissue, sharp, pen, keep, left_out, thresholds)


def _focus_and_pen(slide: Section, spec: TileSpec, centres_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sharpness and pen fraction of tiles, read at about 1 um per pixel."""
    if slide.pyramid is None or not len(centres_px):
        return np.empty(0, np.float32), np.empty(0, np.float32)
    mpp = max(_QUALITY_MPP, slide.mpp)
    seen = TileSpec(max(_LEAST_PX, round(spec.side_um / mpp)), spec.side_um / max(_LEAST_PX, round(spec.side_um / mpp)))
    stream = TileStream([TileReader(slide.pyramid, TileGeometry(centres_px, slide.um_to_px, seen))])
    sharp, pen = (np.empty(len(centres_px), np.float32) for _ in range(2))
    for index, tiles in batches(stream, _QUALITY_BATCH):
        sharp[index], pen[index] = sharpness(tiles), pen_fraction(tiles)
    return sharp, pen
