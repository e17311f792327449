"""`datasets.phantom`: synthetic sections with known expected expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import dask.array as da
import numpy as np
import pandas as pd

from pekasc import _assemble
from pekasc._keys import write_uns
from pekasc._settings import get_logger
from pekasc.datasets._phantom_counts import (
    Genes,
    draw_counts,
    expected_shares,
    patient_effect,
    plant_genes,
    surroundings,
)
from pekasc.datasets._phantom_image import STATES, SlideParams, render_region, stain, tissue_depth

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

logger = get_logger(__name__)

Array = Literal["visium", "st"]
# um per step of array_col and array_row, diameter of a spot in um
_ARRAYS: dict[Array, tuple[float, float, float]] = {
    "visium": (50.0, 100.0 * np.sin(np.pi / 3), 55.0),
    "st": (200.0, 200.0, 100.0),
}
_EXACT_FACTOR = 4  # coarser levels are rendered at their own pixel size instead of averaged
_STRIP_PX = 512  # rows of the finest level rendered at once: drawing takes 32 bytes a pixel
_EAGER_PX = 50_000_000
_CHUNK_PX = 1024
_MAX_MPP = 4.0
_MIN_DEPTH_UM = 10.0


@dataclass(frozen=True)
class Slide:
    """A rendered slide as a source of regions."""

    params: SlideParams

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.params.shape_px[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.params.shape_px[1]

    def region(self, x0: int, y0: int, width: int, height: int, factor: int) -> np.ndarray:
        """Return a rectangle of the slide downscaled by `factor`."""
        if factor > _EXACT_FACTOR:
            return render_region(self.params.at_mpp(self.params.mpp * factor), x0, y0, width, height)
        rows, end = _STRIP_PX // factor, y0 + height
        strips = []
        for y in range(y0, end, rows):
            n = min(rows, end - y)
            fine = render_region(self.params, x0 * factor, y * factor, width * factor, n * factor)
            strips.append(_assemble.block_mean(fine, factor))
        return strips[0] if len(strips) == 1 else np.concatenate(strips, axis=1)


def phantom(
    n_patients: int = 2,
    n_sections: int = 1,
    *,
    size_um: float | tuple[float, float] = 1500.0,
    mpp: float = 0.5,
    n_genes: int = 200,
    n_spots: int | None = None,
    array: Array = "visium",
    lazy: bool | None = None,
    random_state: int = 0,
) -> SpatialData:
    """Generate synthetic H&E sections with counts whose dependence on the image is known.

    Any part of the image can be rendered on its own from the seed and the coordinates, so a slide of
    100,000 x 100,000 pixels is created at once (``size_um=50_000, n_spots=500``) and rendered where it is read. Half of
    the genes depend on the tissue state (tumour, stroma, immune, gland, fat), a quarter on the density of nuclei, and a
    quarter on nothing. Counts are negative binomial with a library size per spot and dropout. Patients differ in stain,
    composition and, slightly, in expression.

    Parameters
    ----------
    n_patients
        Number of patients.
    n_sections
        Number of sections per patient.
    size_um
        Side of the slide in um, or width and height.
    mpp
        Pixel size of the finest level in um per pixel, at most 4.
    n_genes
        Number of genes, at least 4.
    n_spots
        Maximum number of spots per section, those nearest to the centre of the slide. By default all on tissue.
    array
        Grid of the spots: ``"visium"`` (hexagonal, pitch 100 um, diameter 55 um) or ``"st"`` (square, 200 um, 100 um).
    lazy
        Whether pixels are rendered whenever they are read, or once and kept in memory. By default, lazily if all
        sections have more than 50 million pixels. The pixels are the same.
    random_state
        Seed. The same seed gives the same bytes.

    Returns
    -------
    SpatialData. For the section ``P1S1`` (patient 1, section 1): the multi-scale image ``images["P1S1_he"]``, uint8;
    the spots ``shapes["P1S1_spots"]``, circles; both in the coordinate system ``P1S1``, in pixels of the finest level.
    One table ``tables["table"]`` of all spots:

    - ``X``: counts, float32 CSR; ``layers["truth"]``: expected expression without noise, log1p(1e4 * share), float32
    - ``obs``: section, patient, array_row, array_col, region, spot_id, phantom_density (nuclei per square millimeter
      in the 112 um around the spot)
    - ``obsm["spatial"]``: centres in pixels; ``obsm["phantom_states"]``: membership in each state, a DataFrame
    - ``var``: phantom_depends_on ("state", "density", "nothing"), phantom_state, phantom_effect (log fold change)
    - ``uns["pekasc"]``: image_mpp, and phantom (the arguments)

    Raises
    ------
    ValueError
        If a number is out of range, or no spot lies on tissue.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> sorted(sdata.images), sorted(sdata.shapes)
    (['P1S1_he'], ['P1S1_spots'])
    """
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

    width_um, height_um = _check(n_patients, n_sections, size_um, mpp, n_genes, n_spots, array)
    genes = plant_genes(n_genes, np.random.default_rng([random_state, 0]))
    slides = {
        (p, s): slide_params(p, s, width_um=width_um, height_um=height_um, mpp=mpp, random_state=random_state)
        for p in range(n_patients)
        for s in range(n_sections)
    }
    if lazy is None:
        lazy = sum(h * w for h, w in (params.shape_px for params in slides.values())) > _EAGER_PX
    images, shapes, parts = {}, {}, []
    for (p, s), params in slides.items():
        part = _section(genes, params, p, s, array, n_spots, random_state)
        parts.append(part)
        images[f"{part.name}_he"] = _image(params, part.name, lazy)
        shapes[f"{part.name}_spots"] = _assemble.spots(part.centres_px, _ARRAYS[array][2] / 2 / mpp, part.name)
    table = _assemble.table(
        csr_matrix(np.concatenate([part.counts for part in parts]).astype(np.float32)),
        pd.concat([part.obs for part in parts], ignore_index=True),
        genes.var,
        np.concatenate([part.centres_px for part in parts]),
        {name: float(mpp) for name in images},
        images,
    )
    table.layers["truth"] = np.log1p(1e4 * np.concatenate([part.shares for part in parts])).astype(np.float32)
    states = np.concatenate([part.states for part in parts])
    table.obsm["phantom_states"] = pd.DataFrame(states, index=table.obs_names, columns=list(STATES))
    arguments: dict[str, Any] = {"n_patients": n_patients, "n_sections": n_sections, "random_state": random_state}
    arguments |= {"width_um": width_um, "height_um": height_um, "mpp": float(mpp), "n_genes": n_genes, "array": array}
    write_uns(table, "phantom", arguments)
    logger.info("phantom: %d sections of %d x %d px, %d spots.", len(images), *params.shape_px[::-1], table.n_obs)
    return SpatialData(images=images, shapes=shapes, tables={"table": table})


def slide_params(
    patient: int, section: int, *, width_um: float, height_um: float, mpp: float, random_state: int
) -> SlideParams:
    """Return the slide of a section of a patient, both counted from 0."""
    rng = np.random.default_rng([random_state, 1, patient])
    look = stain(int(rng.integers(2**62)))
    mean = SlideParams(seed=0, width_um=width_um, height_um=height_um, mpp=mpp)
    tumour, stroma, immune, gland, fat = np.round(np.asarray(mean.state_bias) + rng.normal(0, 0.025, 5), 6).tolist()
    # shorter wavelengths on a small slide, so that it has all tissue states
    scale = float(np.clip(0.17 * min(width_um, height_um), 150.0, 1500.0))
    seed = int(np.random.default_rng([random_state, 2, patient, section]).integers(2**62))
    return replace(
        mean,
        seed=seed,
        state_bias=(tumour, stroma, immune, gland, fat),
        state_scale_um=scale,
        density_scale_um=0.8 * scale,
        **look,
    )


@dataclass(frozen=True)
class _Section:
    name: str
    obs: pd.DataFrame
    centres_px: np.ndarray
    states: np.ndarray
    shares: np.ndarray
    counts: np.ndarray


def _section(
    genes: Genes, params: SlideParams, p: int, s: int, array: Array, n_spots: int | None, random_state: int
) -> _Section:
    grid, centres_um = _grid(params, array)
    inside = tissue_depth(params, centres_um) > _MIN_DEPTH_UM
    grid, centres_um = grid[inside], centres_um[inside]
    if n_spots is not None and n_spots < len(grid):
        middle = np.array([params.width_um, params.height_um]) / 2
        near = np.argsort(np.abs(centres_um - middle).max(1), kind="stable")[:n_spots]
        near.sort()
        grid, centres_um = grid[near], centres_um[near]
    if not len(grid):
        raise ValueError(
            f"No spot lies on the tissue of a slide of {params.width_um:g} x {params.height_um:g} um: "
            "give a larger `size_um`."
        )
    states, density = surroundings(params, centres_um)
    effect = patient_effect(genes, np.random.default_rng([random_state, 3, p]))
    shares = expected_shares(genes, states, density, effect)
    obs = pd.DataFrame(
        {
            "section": f"P{p + 1}S{s + 1}",
            "patient": f"P{p + 1}",
            "array_row": grid[:, 1],
            "array_col": grid[:, 0],
            "phantom_density": density,
        }
    )
    counts = draw_counts(genes, shares, np.random.default_rng([random_state, 4, p, s]))
    return _Section(f"P{p + 1}S{s + 1}", obs, centres_um / params.mpp, states, shares, counts)


def _grid(params: SlideParams, array: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return grid indices (n, 2: col, row), row by row, and centres in um of all spots on a slide."""
    pitch_x, pitch_y, diameter = _ARRAYS[array]
    size = np.array([params.width_um, params.height_um])
    pitch = np.array([pitch_x, pitch_y])
    last = np.floor((size - diameter) / pitch).astype(int)  # whole spots only
    if (last < 0).any():
        return np.empty((0, 2), int), np.empty((0, 2))
    start = (size - last * pitch) / 2
    cols, rows = np.meshgrid(np.arange(last[0] + 1), np.arange(last[1] + 1))
    grid = np.stack([cols.ravel(), rows.ravel()], axis=1)
    if array == "visium":  # every second column in every second row
        grid = grid[grid.sum(1) % 2 == 0]
    return grid, start + grid * pitch


def _image(params: SlideParams, name: str, lazy: bool) -> DataTree | DataArray:
    levels = _assemble.lazy_levels(Slide(params), chunk_px=_CHUNK_PX, token=params)
    if not lazy:
        levels = _draw(Slide(params), levels)
    return _assemble.multiscale(levels, name)


def _draw(slide: Slide, levels: Sequence[da.Array]) -> list[da.Array]:
    """Render the finest level once, on all threads, and compute the coarser ones from it."""
    fine = np.asarray(levels[0].compute(scheduler="threads"))
    out = []
    for level, factor in zip(levels, _assemble.factors(slide.height, slide.width), strict=True):
        pixels = (
            np.asarray(level.compute(scheduler="threads"))
            if factor > _EXACT_FACTOR
            else _assemble.block_mean(fine, factor)
        )
        out.append(da.from_array(pixels, chunks=level.chunks, name=f"{level.name}-drawn"))
    return out


def _check(
    n_patients: int,
    n_sections: int,
    size_um: float | tuple[float, float],
    mpp: float,
    n_genes: int,
    n_spots: int | None,
    array: str,
) -> tuple[float, float]:
    counted = [("n_patients", n_patients, 1), ("n_sections", n_sections, 1), ("n_genes", n_genes, 4)]
    counted += [] if n_spots is None else [("n_spots", n_spots, 1)]
    for argument, value, least in counted:
        if value < least:
            raise ValueError(f"`{argument}` must be at least {least}, got {value}.")
    if not 0 < mpp <= _MAX_MPP:
        raise ValueError(f"`mpp` must lie in (0, {_MAX_MPP:g}] um per pixel, got {mpp}.")
    if array not in _ARRAYS:
        raise ValueError(f"`array={array!r}` is unknown. Known arrays: {list(_ARRAYS)}.")
    width_um, height_um = size_um if isinstance(size_um, tuple | list) else (size_um, size_um)
    if min(width_um, height_um) <= 0:
        raise ValueError(f"`size_um` must be positive, got {size_um}.")
    return float(width_um), float(height_um)
