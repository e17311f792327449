"""Drawing on Axes in micrometers, independent of pekasc's data model."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke

Box = tuple[float, float, float, float]  # x0, y0, x1, y1

DARK = "#222222"
GREY = "#8a8a8a"
ACCENT = "#b5322c"
SMALL = 8
DIMMED = 0.35  # H&E under spots and tiles
NOVEL = 0.01  # p-value of tiles that the training hardly shows
_PERCENTILES = (1, 99)  # of values, where colours end
_RASTERIZE_ABOVE = 5000  # number of spots from which a vector file becomes too large


def round_length(width: float, fraction: float = 0.25) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that is at most `fraction` of `width`."""
    target = width * fraction
    power = 10.0 ** np.floor(np.log10(target))
    return float(max(step * power for step in (1, 2, 5) if step * power <= target * (1 + 1e-9)))


def length_label(um: float) -> str:
    """Return the length with its unit: 200 µm, 2 mm."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


def bounding_box(centres: np.ndarray, radii: np.ndarray) -> Box:
    """Return the box around circles, with a margin of 7 % of its longer side."""
    low, high = (centres - radii[:, None]).min(axis=0), (centres + radii[:, None]).max(axis=0)
    pad = 0.07 * max(float((high - low).max()), 1.0)
    return float(low[0] - pad), float(low[1] - pad), float(high[0] + pad), float(high[1] + pad)


def frame(ax: Axes, box: Box) -> None:
    """Set up Axes for a map: equal aspect, y pointing down as in the image, no ticks, no frame."""
    ax.set_xlim(box[0], box[2])
    ax.set_ylim(box[3], box[1])
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def scale_bar(ax: Axes, length: float, *, fontsize: float = SMALL) -> Rectangle:
    """Draw a bar of `length` data units with its label in the lower left corner, readable on any tissue."""
    x0, x1 = ax.get_xlim()
    bottom, top = ax.get_ylim()
    width, height = x1 - x0, top - bottom  # height < 0: y points down
    halo: list[AbstractPathEffect] = [withStroke(linewidth=2.5, foreground="white")]
    bar = Rectangle(
        (x0 + 0.04 * width, bottom + 0.04 * height),
        length,
        0.012 * abs(width) * np.sign(height),
        facecolor=DARK,
        edgecolor="none",
        path_effects=halo,
        zorder=5,
    )
    ax.add_patch(bar)
    text = ax.annotate(
        length_label(length),
        (x0 + 0.04 * width + length / 2, bottom + 0.04 * height + bar.get_height()),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=fontsize,
        color=DARK,
        zorder=5,
    )
    text.set_path_effects(halo)
    return bar


def spots(
    ax: Axes, centres: np.ndarray, radii: np.ndarray, values: np.ndarray, *, norm: Normalize, cmap: str | Colormap
) -> EllipseCollection:
    """Draw circles at their true size, coloured by value; spots without a value are empty rings."""
    known = np.isfinite(values)
    if not known.all():
        missing = _circles(ax, centres[~known], radii[~known])
        missing.set(facecolor="none", edgecolor=GREY, linewidth=0.4)
    drawn = _circles(ax, centres[known], radii[known])
    drawn.set(array=values[known], norm=norm, cmap=cmap, edgecolor="none")
    return drawn


def shade(ax: Axes, centres: np.ndarray, radii: np.ndarray) -> EllipseCollection:
    """Draw a veil with a dark ring over circles whose values are not to be trusted."""
    veil = _circles(ax, centres, radii)
    veil.set(facecolor=(1, 1, 1, 0.7), edgecolor="black", linewidth=0.6)
    return veil


def _circles(ax: Axes, centres: np.ndarray, radii: np.ndarray) -> EllipseCollection:
    circles = EllipseCollection(
        2 * radii,
        2 * radii,
        np.zeros(len(radii)),
        units="xy",
        offsets=centres,
        offset_transform=ax.transData,
        rasterized=len(radii) > _RASTERIZE_ABOVE,
    )
    ax.add_collection(circles, autolim=False)
    return circles


def robust_limits(
    *values: np.ndarray,
    vmin: float | None = None,
    vmax: float | None = None,
) -> tuple[float, float]:
    """Return common colour limits of all `values`, ignoring NaN; never equal; `vmin` and `vmax` take precedence."""
    known = [np.asarray(v, dtype=np.float64).ravel() for v in values]
    pooled = np.concatenate([v[np.isfinite(v)] for v in known]) if known else np.empty(0)
    low, high = np.percentile(pooled, _PERCENTILES) if pooled.size else (0.0, 1.0)
    if high <= low and pooled.size:
        # percentiles coincide for a gene in very few spots: use the whole range
        low, high = pooled.min(), pooled.max()
    low = low if vmin is None else vmin
    high = high if vmax is None else vmax
    return float(low), float(high if high > low else low + 1)


def tidy(ax: Axes) -> None:
    """Remove the upper and right spines."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=SMALL)
