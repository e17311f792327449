"""Where a slide shows tissue: detected in a coarse version of it, or given as shapes, labels or a mask."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from spatialdata import SpatialData
from spatialdata.models import Image2DModel

from pekasc._sections._images import affine, coordinate_systems, levels_of, transform
from pekasc._sections._overview import coarse, tissue_mask
from pekasc._sections._resolve import Section
from pekasc._sections._slides import images_of
from pekasc._settings import get_logger

logger = get_logger(__name__)

_DETECTION_UM = 8.0  # pixel size at which tissue is looked for
_DETECTION_PX = 4_000_000
_SAMPLES = 8  # a tile's tissue fraction is taken at 8 x 8 points
_ASPECT = 0.02
_WHOLE = 0.98
_SMALL = 0.01  # of the area of the largest piece
_ALL_PIECES = 2**31 - 1
_CONTRAST = 3.0  # grey levels: grain and lamp of a blank slide differ by less, the faintest tissue by more


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Mask of tissue over an image.

    Parameters
    ----------
    mask
        (height, width) bool.
    px_to_mask
        3 x 3 matrix from level-0 pixels of the image to pixels of the mask.
    """

    mask: np.ndarray
    px_to_mask: np.ndarray

    def fraction(self, centres_px: np.ndarray, half_px: np.ndarray) -> np.ndarray:
        """Return the fraction of each tile on tissue, (n,) float32, at 8 x 8 points.

        Parameters
        ----------
        centres_px
            (n, 2) centres in level-0 pixels.
        half_px
            (2, 2) matrix from (-1 to 1, -1 to 1) within a tile to an offset in level-0 pixels.
        """
        steps = (np.arange(_SAMPLES) + 0.5) / _SAMPLES * 2 - 1
        inside = np.column_stack([a.ravel() for a in np.meshgrid(steps, steps)]) @ half_px.T
        total = np.zeros(len(centres_px), dtype=np.float32)
        for offset in inside:
            x, y = np.floor(transform(self.px_to_mask, centres_px + offset)).astype(np.int64).T
            there = (x >= 0) & (y >= 0) & (x < self.mask.shape[1]) & (y < self.mask.shape[0])
            total[there] += self.mask[y[there], x[there]]
        return total / len(inside)


def tissue_of_slide(sdata: SpatialData, section: Section, tissue: Any) -> TissueMask | None:
    """Return where a slide shows tissue; None if all of it is taken (``tissue=False``).

    Raises
    ------
    KeyError
        If `tissue` names neither shapes nor labels.
    TypeError
        If it is nothing of the kind.
    ValueError
        If there is no tissue, or a mask does not belong to the image.
    """
    if tissue is False:
        return None
    if isinstance(tissue, str) and tissue == "detect":
        found = detect_tissue(section)
    elif isinstance(tissue, str):
        found = _element_mask(sdata, section, tissue)
    elif hasattr(tissue, "__array__") and hasattr(tissue, "ndim"):
        found = _array_mask(section, np.asarray(tissue))
    else:
        raise TypeError(
            '`tissue` must be "detect", False, the name of shapes or labels, or a mask (a 2-D array), got '
            f"{type(tissue).__name__}."
        )
    if not found.mask.any():
        name = repr(tissue) if isinstance(tissue, str) else "..."
        raise _no_tissue(section, "was found" if name == "'detect'" else f"is in `tissue={name}`")
    return found


def _no_tissue(section: Section, where: str) -> ValueError:
    return ValueError(
        f"No tissue {where} on image {section.image_name!r}. Give `tissue=` as shapes, labels or a mask, or False to "
        "take all of the image."
    )


def coarse_picture(section: Section) -> tuple[np.ndarray, np.ndarray]:
    """Return a coarse version of a whole slide, uint8 (y, x, 3), and its pixel in level-0 pixels, x and y."""
    assert section.pyramid is not None
    return coarse(section.pyramid, np.zeros(2, dtype=int), np.array(section.size_px), _coarse_px(section))


def _coarse_px(section: Section) -> float:
    """Return the pixel of a mask in level-0 pixels: 8 um, or more where that would be too many."""
    return max(_DETECTION_UM / section.mpp, float(np.sqrt(np.prod(section.size_px, dtype=float) / _DETECTION_PX)))


def detect_tissue(section: Section) -> TissueMask:
    """Find tissue with :func:`squidpy.experimental.im.detect_tissue` in a coarse version of the slide.

    Its answer is checked: what it takes for tissue must be darker than the rest. Where the corners of the image are
    tissue, they are not taken for background.

    Raises
    ------
    ValueError
        If what it finds is brighter than the rest in either way.
    """
    picture, step = coarse_picture(section)
    grey = picture.astype(np.float32).mean(axis=-1)
    contrasts = []
    for corners in (True, False):
        mask, n_small = _squidpy_mask(picture, corners)
        if mask.mean() > _WHOLE and not tissue_mask(picture).any():
            mask[:] = False  # a blank slide has no darker part
        if mask.all() or not mask.any():
            break
        contrasts.append(float(grey[~mask].mean() - grey[mask].mean()))
        if contrasts[-1] > _CONTRAST:
            break
    else:
        if max(contrasts) > -_CONTRAST:
            raise _no_tissue(section, "was found")
        raise ValueError(
            f"Tissue detection takes the bright parts of image {section.image_name!r} for tissue (mean grey level "
            f"{grey[mask].mean():.0f} inside, {grey[~mask].mean():.0f} outside). Give `tissue=` as shapes, labels or a "
            "mask, or False to take all of the image."
        )
    if n_small:
        logger.hint("image %s: %d pieces of less than 1 %% of the largest are left out.", section.image_name, n_small)
    logger.hint("image %s: %.0f %% of it is tissue.", section.image_name, 100 * mask.mean())
    return TissueMask(mask, np.diag([1 / step[0], 1 / step[1], 1.0]))


def _squidpy_mask(picture: np.ndarray, corners_are_background: bool) -> tuple[np.ndarray, int]:
    """Return squidpy's mask without pieces of less than 1 % of the largest, and how many those are.

    Squidpy's own choice, Otsu's threshold on the pieces' areas, leaves out the smaller of two biopsies.
    """
    import squidpy as sq

    # an image of its own: squidpy would scale the mask up to the size of the slide
    sdata = SpatialData(images={"image": Image2DModel.parse(np.moveaxis(picture, -1, 0), dims=("c", "y", "x"))})
    with quiet("spatialdata._logging"):  # which squidpy logs its steps to
        pieces = sq.experimental.im.detect_tissue(
            sdata, "image", corners_are_background=corners_are_background, min_specimen_area_frac=0.0,
            n_samples=_ALL_PIECES, inplace=False,
        )  # fmt: skip
    pieces = np.asarray(pieces)
    area = np.bincount(pieces.ravel())
    area[0] = 0
    small = (area > 0) & (area < _SMALL * area.max())
    return (pieces > 0) & ~small[pieces], int(small.sum())


@contextmanager
def quiet(name: str) -> Iterator[None]:
    other = logging.getLogger(name)
    level = other.level
    other.setLevel(logging.WARNING)
    try:
        yield
    finally:
        other.setLevel(level)


def _element_mask(sdata: SpatialData, section: Section, name: str) -> TissueMask:
    kind = "labels" if name in sdata.labels else "shapes"
    element = sdata.labels.get(name, sdata.shapes.get(name))
    if element is None:
        raise KeyError(
            f"`tissue={name!r}` is neither shapes nor labels. Available shapes: {list(sdata.shapes)}, labels: "
            f'{list(sdata.labels)}. Or `tissue="detect"`.'
        )
    image = images_of(sdata)[section.image_name]
    shared = sorted(coordinate_systems(element) & coordinate_systems(image), key=lambda s: (s != "global", s))
    if not shared:
        raise ValueError(
            f"The {kind} `tissue={name!r}` (in {sorted(coordinate_systems(element))}) and the image "
            f"{section.image_name!r} (in {sorted(coordinate_systems(image))}) share no coordinate system. Add one "
            "with `spatialdata.transformations.set_transformation`."
        )
    to_px = np.linalg.inv(affine(image, shared[0])) @ affine(element, shared[0])
    if kind == "labels":
        return _labels_mask(section, levels_of(element), to_px, name)
    return _rasterized(section, element.geometry.to_numpy(), element.get("radius"), to_px)


def _labels_mask(section: Section, levels: list[Any], to_px: np.ndarray, name: str) -> TissueMask:
    """Return labels as a mask with pixels of about 8 um, so that it does not grow with the slide."""
    width, height = levels[0].sizes["x"], levels[0].sizes["y"]
    every = _coarse_px(section) / np.linalg.norm(to_px[:2, :2], axis=0).max()
    level = next((level for level in reversed(levels) if width / level.sizes["x"] <= max(every, 1)), levels[0])
    step = max(1, int(every * level.sizes["x"] / width))
    values = np.asarray(level.transpose("y", "x").data[step // 2 :: step, step // 2 :: step]) > 0
    to_mask = np.diag([level.sizes["x"] / width / step, level.sizes["y"] / height / step, 1.0])
    corners = transform(to_px, np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64))
    size = np.clip(corners.max(axis=0), 0, section.size_px) - np.clip(corners.min(axis=0), 0, section.size_px)
    share = float(np.prod(size / section.size_px))
    if share < _WHOLE:
        logger.warning(
            "The labels %r lie over %.2g %% of the image %s, and nothing else is taken for tissue. If they are of all "
            "of it, set their scale with `spatialdata.transformations.set_transformation`.",
            name, 100 * share, section.image_name,
        )  # fmt: skip
    return TissueMask(values, to_mask @ np.linalg.inv(to_px))


def _rasterized(section: Section, geometry: np.ndarray, radius: Any, to_px: np.ndarray) -> TissueMask:
    """Return polygons or circles as a mask with pixels of about 8 um."""
    if radius is not None:
        geometry = shapely.buffer(geometry, np.asarray(radius, dtype=np.float64))
    geometry = shapely.transform(shapely.make_valid(geometry), lambda xy: transform(to_px, xy))
    step = _coarse_px(section)
    width, height = np.maximum(1, np.ceil(np.array(section.size_px) / step)).astype(int)
    union = shapely.union_all(geometry)
    shapely.prepare(union)
    x, y = ((np.arange(n) + 0.5) * step for n in (width, height))
    mask = np.stack([shapely.contains_xy(union, x, np.full(width, at)) for at in y])
    return TissueMask(mask, np.diag([1 / step, 1 / step, 1.0]))


def _array_mask(section: Section, mask: np.ndarray) -> TissueMask:
    if mask.ndim != 2 or mask.dtype.kind not in "bui" or not mask.size:
        binary = " Of a probability, it is `mask > 0.5`." if mask.ndim == 2 and mask.dtype.kind == "f" else ""
        raise ValueError(
            f"`tissue=` as a mask must be a 2-D array of bool or integers, got shape {mask.shape}, {mask.dtype}."
            f"{binary}"
        )
    width, height = section.size_px
    scale = np.array([mask.shape[1] / width, mask.shape[0] / height])
    # sizes of coarse levels are rounded
    if abs(scale[0] / scale[1] - 1) > max(_ASPECT, 2 / min(mask.shape)):
        raise ValueError(
            f"The mask `tissue=` of {mask.shape[1]} x {mask.shape[0]} px has another aspect than the image "
            f"{section.image_name!r} of {width} x {height} px: it does not belong to it."
        )
    return TissueMask(mask > 0, np.diag([*scale, 1.0]))
