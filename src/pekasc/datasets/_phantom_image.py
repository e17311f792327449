"""Render any rectangle of a synthetic H&E slide, and return its tissue state and nuclear density at any point.

Noise fields, outline, glands, fat cells and nuclei are functions of hashed integer lattices in micrometers. The pixels
of a rectangle therefore do not depend on other rectangles, and the cost is proportional to its area. The geometry uses
only +, -, *, / and square roots, which round the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pekasc.datasets._phantom_kernels import count_nuclei, fields_at, render

STATES = ("tumour", "stroma", "immune", "gland", "fat")
MAX_MPP = 1024.0

# optical density of hematoxylin and eosin in R, G, B (Ruifrok and Johnston 2001, eosin with the red that scanners show)
_HEMATOXYLIN = (0.68, 0.66, 0.31)
_EOSIN = (0.16, 0.92, 0.35)
_OD_MAX, _OD_STEPS = 4.0, 16384


@dataclass(frozen=True)
class SlideParams:
    """Parameters of a synthetic slide.

    Attributes
    ----------
    seed
        Seed of the tissue.
    width_um, height_um
        Extent of the slide; with `outline`, tissue fills most of it.
    mpp
        Micrometers per pixel.
    hematoxylin, eosin
        Unit optical-density vectors of the two stains in R, G, B.
    hematoxylin_strength, eosin_strength
        Factors on the amounts of stain.
    background
        Colour of empty glass, 0 to 255.
    state_bias
        Added to the noise field of each state: higher is more of it.
    state_scale_um, density_scale_um
        Wavelength of the fields of tissue state and of nuclear density.
    nucleus_scale
        Factor on nuclear diameters.
    crowding
        Factor on nuclear density.
    outline
        Whether the tissue ends before the slide does; else it is everywhere.
    blur_um
        Width of the optics' blur.
    noise
        Standard deviation of the sensor noise, in grey levels.
    """

    seed: int
    width_um: float
    height_um: float
    mpp: float = 0.5
    hematoxylin: tuple[float, float, float] = _HEMATOXYLIN
    eosin: tuple[float, float, float] = _EOSIN
    hematoxylin_strength: float = 1.0
    eosin_strength: float = 1.0
    background: tuple[float, float, float] = (243.0, 241.0, 244.0)
    state_bias: tuple[float, float, float, float, float] = (0.03, 0.05, -0.03, 0.0, -0.04)
    state_scale_um: float = 420.0
    density_scale_um: float = 240.0
    nucleus_scale: float = 1.0
    crowding: float = 1.0
    outline: bool = True
    blur_um: float = 0.3
    noise: float = 2.0

    @property
    def shape_px(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return round(self.height_um / self.mpp), round(self.width_um / self.mpp)

    def at_mpp(self, mpp: float) -> SlideParams:
        """Return the same slide at another pixel size."""
        return replace(self, mpp=mpp)


class Kernel(NamedTuple):
    """The values of :class:`SlideParams` for the compiled code."""

    seed: np.uint64
    mpp: float
    half_width: float
    half_height: float
    outline: bool
    state_scale: float
    density_scale: float
    nucleus_scale: float
    crowding: float
    fibre_x: float
    fibre_y: float
    bias: np.ndarray


def _kernel(params: SlideParams) -> Kernel:
    direction = np.random.default_rng(params.seed).normal(size=2)
    direction /= np.sqrt((direction**2).sum())
    return Kernel(
        seed=np.uint64(params.seed % 2**63),
        mpp=float(params.mpp),
        half_width=params.width_um / 2,
        half_height=params.height_um / 2,
        outline=bool(params.outline),
        state_scale=float(params.state_scale_um),
        density_scale=float(params.density_scale_um),
        nucleus_scale=float(params.nucleus_scale),
        crowding=float(params.crowding),
        fibre_x=float(direction[0]),
        fibre_y=float(direction[1]),
        bias=np.asarray(params.state_bias, dtype=np.float64),
    )


def stain(seed: int, *, spread: float = 1.0) -> dict[str, Any]:
    """Return the fields of :class:`SlideParams` for the stain and scanner of one patient.

    Parameters
    ----------
    seed
        Seed of the patient.
    spread
        Factor on the variation between patients; 0 is the mean stain.

    Returns
    -------
    Keyword arguments for :class:`SlideParams` or :func:`dataclasses.replace`.
    """
    rng = np.random.default_rng(seed)

    def vector(mean: tuple[float, ...]) -> tuple[float, ...]:
        v = np.clip(np.asarray(mean) + spread * rng.normal(0, 0.05, 3), 0.03, None)
        return tuple(float(x) for x in np.round(v / np.sqrt((v**2).sum()), 6))

    white = np.clip(242 + spread * rng.normal(0, 4, 3), 220, 254)
    return {
        "hematoxylin": vector(_HEMATOXYLIN),
        "eosin": vector(_EOSIN),
        "hematoxylin_strength": float(np.clip(1 + spread * rng.normal(0, 0.15), 0.5, 1.7)),
        "eosin_strength": float(np.clip(1 + spread * rng.normal(0, 0.18), 0.5, 1.7)),
        "background": tuple(float(x) for x in white),
    }


def random_slide(seed: int, **fixed: Any) -> SlideParams:
    """Return a slide of 2 mm with random stain, composition, scale, blur and noise, for training robust encoders.

    Parameters
    ----------
    seed
        Seed of the tissue and of the random fields.
    fixed
        Fields of :class:`SlideParams` with given values.
    """
    rng = np.random.default_rng([seed, 1])
    chosen: dict[str, Any] = {
        **stain(int(rng.integers(2**31)), spread=1.5),
        "state_bias": tuple(float(b) for b in np.round(rng.normal(0, 0.08, len(STATES)), 6)),
        "state_scale_um": float(rng.uniform(150, 700)),
        "density_scale_um": float(rng.uniform(100, 400)),
        "nucleus_scale": float(rng.uniform(0.8, 1.25)),
        "crowding": float(rng.uniform(0.6, 1.4)),
        "blur_um": float(rng.uniform(0.0, 0.9)),
        "noise": float(rng.uniform(0.5, 4)),
    }
    return SlideParams(seed=seed, **{"width_um": 2000.0, "height_um": 2000.0, **chosen, **fixed})


def _transmittance() -> np.ndarray:
    # rounded, since the last bit of exp() differs between machines
    return np.round(np.exp(-np.linspace(0, _OD_MAX, _OD_STEPS)), 7).astype(np.float32)


def render_region(params: SlideParams, x0: int, y0: int, width: int, height: int) -> np.ndarray:
    """Render a rectangle of the slide.

    Parameters
    ----------
    params
        The slide.
    x0, y0
        Upper left pixel, at `params.mpp`; may be negative.
    width, height
        Size in pixels.

    Returns
    -------
    uint8 array (3, `height`, `width`); a pixel is the same in every rectangle that contains it.

    Raises
    ------
    ValueError
        If the size is not positive or `params.mpp` lies outside (0, 1024].
    """
    if width < 1 or height < 1:
        raise ValueError(f"The size of a region must be positive, got width={width}, height={height}.")
    if not 0 < params.mpp <= MAX_MPP:
        raise ValueError(f"`mpp` must lie in (0, {MAX_MPP:g}] um per pixel, got {params.mpp}.")
    stains = np.stack(
        [
            np.asarray(params.hematoxylin) * params.hematoxylin_strength,
            np.asarray(params.eosin) * params.eosin_strength,
        ]
    ).astype(np.float32)
    side = float(min(0.25, 0.5 * (params.blur_um / params.mpp) ** 2))
    out = np.empty((3, height, width), dtype=np.uint8)
    render(
        _kernel(params),
        int(x0),
        int(y0),
        stains * np.float32((_OD_STEPS - 1) / _OD_MAX),
        np.asarray(params.background, dtype=np.float32),
        _TRANSMITTANCE,
        np.float32(side),
        np.float32(params.noise),
        out,
    )
    return out


def tissue_state(params: SlideParams, xy_um: np.ndarray) -> np.ndarray:
    """Return the membership of each point in the tissue states :data:`STATES`.

    Parameters
    ----------
    params
        The slide.
    xy_um
        Points (n, 2), micrometers from the upper left corner.

    Returns
    -------
    float64 array (n, 5) whose rows sum to 1.
    """
    return fields_at(_kernel(params), np.ascontiguousarray(xy_um, dtype=np.float64))[:, : len(STATES)].copy()


def tissue_depth(params: SlideParams, xy_um: np.ndarray) -> np.ndarray:
    """Return the approximate distance of each point from the tissue's border in um; negative outside the tissue."""
    return fields_at(_kernel(params), np.ascontiguousarray(xy_um, dtype=np.float64))[:, 8].copy()


def nuclear_density(params: SlideParams, xy_um: np.ndarray, side_um: float) -> np.ndarray:
    """Return the density of nuclei, counted by centre, in squares around points.

    Parameters
    ----------
    params
        The slide.
    xy_um
        Centres of the squares (n, 2), micrometers from the upper left corner.
    side_um
        Side of the squares.

    Returns
    -------
    float64 array (n,), nuclei per square millimeter.
    """
    counts = count_nuclei(_kernel(params), np.ascontiguousarray(xy_um, dtype=np.float64), float(side_um))
    return counts / (side_um / 1000.0) ** 2


_TRANSMITTANCE = _transmittance()
