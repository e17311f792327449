"""Check whether spots lie on tissue, or would with flipped, transposed or rescaled coordinates. Pure arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pekasc._sections import tissue_mask

_Points = np.ndarray
_ON_TISSUE = 0.1  # fraction of the tile's area
_CLEARLY = 0.1
_STANDARD_ERRORS = 3.0
# beyond doubt: a third of the centres or more lie off the tissue, and far more would lie on it. Pale, fatty tissue
# beside dense tissue makes a flip look somewhat better where nothing is wrong.
_OFF = 2 / 3
_WIDE = 0.3
_NONE = 0.1

# functions from (x, y) in an image of w x h to the point with flipped, rotated or transposed coordinates
_VARIANTS: dict[str, Callable[[np.ndarray, np.ndarray, float, float], tuple[np.ndarray, np.ndarray]]] = {
    "flipped in x": lambda x, y, w, h: (w - x, y),
    "flipped in y": lambda x, y, w, h: (x, h - y),
    "rotated by 180 degrees": lambda x, y, w, h: (w - x, h - y),
    "transposed (x and y swapped)": lambda x, y, w, h: (y, x),
    "rotated by 90 degrees clockwise": lambda x, y, w, h: (w - y, x),
    "rotated by 90 degrees counter-clockwise": lambda x, y, w, h: (y, h - x),
    "transposed and rotated by 180 degrees": lambda x, y, w, h: (w - y, h - x),
}


@dataclass(frozen=True)
class Placement:
    """Result of :func:`check_placement`.

    Attributes
    ----------
    inside
        Mask of centres inside the image.
    on_tissue
        Mask of centres whose tile shows tissue.
    problem
        Description of the problem, or an empty string.
    certain
        Whether the problem is beyond doubt: most centres lie off the tissue and would not with other coordinates, or
        lie off the image.
    """

    inside: np.ndarray
    on_tissue: np.ndarray
    problem: str
    certain: bool = False


def check_placement(
    centres_px: _Points, size_px: tuple[int, int], picture: np.ndarray | None, side_px: float
) -> Placement:
    """Check that centres lie on tissue, and whether they would with flipped, rotated, transposed or scaled coordinates.

    Parameters
    ----------
    centres_px
        (n, 2) x, y in level-0 pixels.
    size_px
        Width and height of level 0.
    picture
        Coarse version of the image, (height, width, 3), or None to check the image's borders only.
    side_px
        Side of a tile in level-0 pixels.
    """
    width, height = size_px
    tissue = _tissue_around(picture, side_px / width) if picture is not None else np.ones((1, 1), dtype=bool)

    def score(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
        col = np.clip((x / width * tissue.shape[1]).astype(int), 0, tissue.shape[1] - 1)
        row = np.clip((y / height * tissue.shape[0]).astype(int), 0, tissue.shape[0] - 1)
        return inside, inside & tissue[row, col]

    x, y = centres_px.T
    inside, on_tissue = score(x, y)
    variants = {name: score(*variant(x, y, width, height))[1] for name, variant in _VARIANTS.items()}
    factor = _scale_to_tissue(centres_px, size_px, tissue)
    problem = ""
    best = max(variants, key=lambda name: variants[name].sum())
    rescaled = score(x * (factor or 1), y * (factor or 1))[1]
    reoriented = _clearly_better(variants[best], on_tissue)
    # coordinates of another scale lie in one corner, where a rotation may look better by chance
    scaled = factor is not None and _clearly_better(rescaled, variants[best] if reoriented else on_tissue)
    certain = False
    if factor is not None and scaled:
        # tissue in one corner of a slide full of spots looks the same
        certain = on_tissue.mean() < _NONE and _beyond_doubt(rescaled, on_tissue)
        problem = (
            f"the coordinates seem to be of another scale: x {x.min():.6g} to {x.max():.6g}, y {y.min():.6g} to "
            f"{y.max():.6g} on an image of {width} x {height} px; only {int(on_tissue.sum())} of {len(x)} centres "
            f"lie on tissue, multiplied by about {factor:.3g} {int(rescaled.sum())} would. "
            "Correct the transformation of the shapes or image (Space Ranger: full, hires or lowres image)"
        )
    elif reoriented:
        certain = _beyond_doubt(variants[best], on_tissue)
        problem = (
            f"the coordinates seem to be {best}: {int(variants[best].sum())} of {len(x)} centres would lie on tissue, "
            f"as they are {int(on_tissue.sum())} do. Correct them, or the transformation of the shapes or image"
        )
    elif 2 * inside.sum() < len(x):
        certain = True
        problem = (
            f"only {int(inside.sum())} of {len(x)} centres lie inside the image: x {x.min():.6g} to {x.max():.6g}, "
            f"y {y.min():.6g} to {y.max():.6g}, image {width} x {height} px. They may be of another scale or image: "
            "correct the transformation of the shapes or image"
        )
    return Placement(inside, on_tissue, problem, certain)


def _tissue_around(picture: np.ndarray, side: float) -> np.ndarray:
    """Return the mask of positions whose tile (`side` as a fraction of the image's width) shows tissue."""
    from scipy.ndimage import uniform_filter

    mask = tissue_mask(picture)
    size = int(max(1, round(side * mask.shape[1])))
    return np.asarray(uniform_filter(mask.astype(np.float32), size=size, mode="nearest") >= _ON_TISSUE)


def _clearly_better(other: np.ndarray, as_is: np.ndarray) -> bool:
    n = len(as_is)
    p, q = ((mask.sum() + 1) / (n + 2) for mask in (other, as_is))  # smoothed, since few spots are weak evidence
    error = np.sqrt(p * (1 - p) / n + q * (1 - q) / n)
    return bool(other.mean() - as_is.mean() > _CLEARLY and p - q > _STANDARD_ERRORS * error)


def _beyond_doubt(other: np.ndarray, as_is: np.ndarray) -> bool:
    return bool(as_is.mean() < _OFF and other.mean() - as_is.mean() > _WIDE)


def _scale_to_tissue(centres_px: np.ndarray, size_px: tuple[int, int], tissue: np.ndarray) -> float | None:
    """Return the scale factor from the largest coordinates of centres to those of tissue, if not close to 1."""
    rows, cols = np.nonzero(tissue)
    if not rows.size:
        return None
    tissue_end = np.array(
        [(cols.max() + 1) / tissue.shape[1] * size_px[0], (rows.max() + 1) / tissue.shape[0] * size_px[1]]
    )
    end = centres_px.max(axis=0)
    if (end <= 0).any():
        return None
    factor = float((tissue_end / end).min())
    return factor if factor < 0.67 or factor > 1.5 else None
