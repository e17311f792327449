"""Pixel sizes: sources, their agreement, and the pixel size from the array's grid. Pure numbers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from pekasc._warnings import warn_user

ARRAYS = {
    # um per step of array_col and array_row, pitch in um
    "visium": (50.0, 100.0 * np.sin(np.pi / 3), 100.0),  # odd rows hold the odd columns
    "visium_hd": (1.0, 1.0, 1.0),  # per um of the bins, whose size the region's name says: square_008um
    "st": (200.0, 200.0, 200.0),
}
_HD_BIN = re.compile(r"square_(\d{3})um")
_LATTICE_TOLERANCE = 0.02  # of the pitch, and of the ratio of the two axes
_FEWEST_LATTICE_SPOTS = 7  # a spot and its six neighbours
VISIUM_SPOT_UM = 65.0  # Space Ranger's spot diameter in um; the printed spot is 55 um
VISIUM_DIAMETERS_UM = (50.0, 72.0)  # either of them, with rounded radii
TOLERANCE = 0.02  # of two sources that agree
MPP_LIMITS = (0.05, 50.0)


def check_mpp(value: Any, what: str) -> float:
    """Check that `value` is a positive number, and return it as float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number (um per pixel), got {type(value).__name__}: {value!r}.")
    number: Any = value
    if not 0 < number <= sys.float_info.max:  # a large integer is no float
        raise ValueError(f"{what} must be a positive number (um per pixel), got {str(value)[:40]}.")
    if not MPP_LIMITS[0] <= number <= MPP_LIMITS[1]:
        raise ValueError(
            f"{what} must be between {MPP_LIMITS[0]:g} and {MPP_LIMITS[1]:g} um per pixel, got {float(number):g}: no "
            "image of tissue has that."
        )
    return float(value)


class PixelSizeUnknown(ValueError):
    """No source says the pixel size.

    Attributes
    ----------
    argument
        The argument of :func:`pekasc.pp.tile` that would say it, if the object shows which.
    """

    argument = ""


def choose_pixel_size(
    sources: Mapping[str, float],
    *,
    region: str | None,
    image_name: str,
    size_px: tuple[int, int],
    arrays: Sequence[str],
    circles: bool,
    strict: bool,
) -> tuple[float, str]:
    """Return the pixel size and its source: the first of `sources`, with which the others must agree.

    `region` is None for a slide without spots. For the error, `arrays` are those whose grid the spots lie on, and
    `circles` tells whether they have a diameter.

    Raises
    ------
    PixelSizeUnknown
        If there is no source.
    ValueError
        With `strict`, if two differ by more than 2 %.
    """
    of_region = "" if region is None else f" (section {region!r})"
    if not sources:
        raise _unknown(of_region, image_name, size_px, arrays, circles)
    (source, value), *others = sources.items()
    for other, other_value in others:
        if abs(value / other_value - 1) <= TOLERANCE:
            continue
        message = (
            f"Pixel sizes of image {image_name!r}{of_region} disagree: {value:.4g} um from {_say(source)}, "
            f"{other_value:.4g} um from {_say(other)}."
        )
        if strict:
            how = "Correct the wrong one; `strict=False` goes on with the first."
            if region is None:
                how = (
                    "Correct the wrong one; what a slide's file says, `image_mpp=` of `pekasc.io.read_slide` replaces."
                )
            raise ValueError(
                f"{message} {how} (A pixel size belongs to the full resolution, level 0, of that very image.)"
            )
        warn_user(f"{message} The first is taken.")
    return value, source


def warn_of_pixels(system: str, image_name: str, px_to_um: np.ndarray, sources: Mapping[str, float]) -> None:
    """Warn of a system said to be in um in which a pixel is 1, which is what pixels are, if it is the only source.

    `px_to_um` is the 3 x 3 matrix from pixels to it.
    """
    if len(sources) == 1 and np.array_equal(px_to_um[:2, :2], np.eye(2)):
        warn_user(
            f"{system!r} (`um_coordinate_system=`) makes a pixel of image {image_name!r} exactly 1 um: is it in um, or "
            "in pixels? If in pixels, give `image_mpp=` instead."
        )


def _say(source: str) -> str:
    return {
        "image_mpp": "`image_mpp`",
        "um_coordinate_system": "`um_coordinate_system`",
        "array": "the array",
        "lattice": "the Visium lattice (obs columns array_row and array_col, 100 um apart)",
        "recorded": '`table.uns["pekasc"]["image_mpp"]`',
        "slide": "the slide's own file",
        "image": "what its reader wrote into its attributes",
        "cell_areas": "the areas of Xenium's cells (obs columns cell_area and nucleus_area, in square um)",
    }[source]


def _unknown(
    of_region: str, image_name: str, size_px: tuple[int, int], arrays: Sequence[str], circles: bool
) -> PixelSizeUnknown:
    unknown = f"The pixel size of image {image_name!r}{of_region} is not known, and pekasc does not guess it."
    argument = f"image_mpp={{{image_name!r}: ...}}" if of_region else "image_mpp="
    mpp = f"`{argument}` (um per pixel of this image, {size_px[0]} x {size_px[1]} px)"
    um = "`um_coordinate_system=` with the name of a coordinate system in micrometers"
    if "visium_hd" in arrays:
        error = PixelSizeUnknown(
            f"{unknown} The region is named like bins of Visium HD, and they lie on the grid of array_row and "
            f'array_col: add `array="visium_hd"`. Otherwise give {mpp}.'
        )
        error.argument = 'array="visium_hd"'
        return error
    if not arrays:
        spots = ', or `array="visium"` if the circles have the diameter of Visium spots, 65 um' if circles else ""
        return PixelSizeUnknown(f"{unknown} Give {mpp}, or {um}{spots}.")
    known = " or ".join(f'`array="{array}"`' for array in arrays)
    pitch = " or ".join(f"{ARRAYS[array][2]:g}" for array in arrays)
    return PixelSizeUnknown(
        f"{unknown} Give {mpp}, {um}, or {known} if that is what the grid of array_row and array_col is: {pitch} um "
        "from spot to spot."
    )


def fitting_arrays(col: np.ndarray, row: np.ndarray, centres_px: np.ndarray, region: str) -> list[str]:
    """Return the arrays on whose grid the spots lie."""
    found = []
    for array in ARRAYS:
        try:
            array_pixel_size(array, col, row, centres_px, region)
        except ValueError:
            continue
        found.append(array)
    return found


def bin_um(region: str) -> float | None:
    """Return the side of a Visium HD bin in um from the region's name (``..._square_008um``), or None."""
    found = _HD_BIN.search(region)
    return float(found[1]) if found and float(found[1]) > 0 else None


def lattice_pixel_size(col: np.ndarray, row: np.ndarray, centres_px: np.ndarray) -> float | None:
    """Return um per pixel if indices and centres are those of a Visium slide, with a pitch of 100 um, else None.

    On no other array is row + col even for every spot while the centres form a hexagonal lattice. The fit must be
    within 2 % of the pitch.
    """
    if len(col) < _FEWEST_LATTICE_SPOTS or not np.isfinite([*col, *row]).all():
        return None
    if (col % 1).any() or (row % 1).any() or ((col + row) % 2).any() or np.unique(row % 2).size < 2:
        return None
    px_per_um, residual_um = _fit_grid(*ARRAYS["visium"][:2], col, row, centres_px)
    if px_per_um is None:
        return None
    stretch = np.linalg.svd(px_per_um, compute_uv=False)
    if stretch[0] > (1 + _LATTICE_TOLERANCE) * stretch[1] or residual_um > _LATTICE_TOLERANCE * ARRAYS["visium"][2]:
        return None
    return float(1 / np.sqrt(abs(np.linalg.det(px_per_um))))


def _fit_grid(
    step_col: float, step_row: float, col: np.ndarray, row: np.ndarray, centres_px: np.ndarray
) -> tuple[np.ndarray | None, float]:
    """Return the 2 x 2 matrix from um on the grid to pixels, and the root mean square of the residuals in um.

    The matrix is None if the spots lie on one line.
    """
    grid = np.column_stack([col * step_col, row * step_row]).astype(np.float64)
    grid -= grid.mean(axis=0)
    centres = centres_px - centres_px.mean(axis=0)
    if np.linalg.matrix_rank(grid) < 2:
        return None, float("nan")
    px_per_um, *_ = np.linalg.lstsq(grid, centres, rcond=None)
    mpp = 1 / np.sqrt(max(abs(np.linalg.det(px_per_um)), 1e-300))
    return px_per_um, float(mpp * np.sqrt(((centres - grid @ px_per_um) ** 2).sum(axis=1).mean()))


def array_pixel_size(array: str, col: np.ndarray, row: np.ndarray, centres_px: np.ndarray, region: str) -> float:
    """Return um per pixel from a least squares fit of spot centres to their grid indices.

    Distances to nearest neighbours would be biased: with jittered centres, the nearest of several neighbours is closer
    than the pitch.
    """
    step_col, step_row, pitch = ARRAYS[array]
    if array == "visium_hd":
        side = bin_um(region)
        if side is None:
            raise ValueError(
                f'`array="visium_hd"` takes the size of the bins from the region\'s name (square_008um), and the '
                f"table annotates {region!r}. Take the table of bins, or give `image_mpp=`."
            )
        step_col = step_row = pitch = side
    px_per_um, residual_um = _fit_grid(step_col, step_row, col, row, centres_px)
    if px_per_um is None:
        raise ValueError(
            f"Section {region!r}: at least 3 spots that do not lie on one line are needed to take the pixel size "
            f"from the array, it has {len(col)} spots. Give `image_mpp=`."
        )
    stretch = np.linalg.svd(px_per_um, compute_uv=False)
    mpp = 1 / np.sqrt(max(abs(np.linalg.det(px_per_um)), 1e-300))
    if stretch[0] > 1.1 * stretch[1] or residual_um > 0.25 * pitch:
        raise ValueError(
            f'Section {region!r}: the columns array_row and array_col do not fit an array of type "{array}": '
            f"steps of {stretch[0]:.4g} and {stretch[1]:.4g} px per um along two axes, centres {residual_um:.3g} um "
            f"off the grid. Check `array=` and the columns, or give `image_mpp=`."
        )
    return float(mpp)


def nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Return the rotation or reflection nearest to a 2 x 2 matrix."""
    u, _, vt = np.linalg.svd(matrix)
    return np.asarray(u @ vt)
