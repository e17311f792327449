"""`pl.calibration`: how many held-out measurements lie in intervals of every nominal level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from pekasc.pl._draw import ACCENT, DARK, GREY, SMALL, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pekasc.models import Adapter


def calibration(adapter: Adapter, *, ax: Axes | None = None, figsize: tuple[float, float] = (4.4, 4.0)) -> Axes:
    """Plot the share of held-out measurements in their interval against the nominal level, by group.

    The nominal level is that of the model of noise around a prediction, before any calibration, with the noise of
    other groups. A curve below the diagonal belongs to a group whose measurements are farther from the prediction than
    the noise says: intervals would be too narrow there. How far the groups lie apart is how far a new one may be off.

    Parameters
    ----------
    adapter
        An adapter from :func:`pekasc.tl.fit_adapter`, calibrated or not.
    ax
        Axes to draw on; None creates a figure.
    figsize
        Width and height of the new figure in inches.

    Returns
    -------
    The Axes: a thin line for each held-out training group, mean over genes, the one that is covered least in red, and
    their mean in bold. Of a calibrated adapter, a dot where this reaches the level of its intervals.

    Raises
    ------
    TypeError
        If `adapter` is no adapter.
    ValueError
        If it has no held-out predictions (saved by an earlier version), or none of a gene that was measured.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, progress=False)
    >>> ax = pk.pl.calibration(adapter)
    """
    from pekasc.models.trust import EDGES, percent

    names, curve = _held_out(adapter)
    if ax is None:
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    least = int(curve.mean(axis=1).argmin())
    others = [i for i in range(len(names)) if i != least]
    for number, i in enumerate(others):
        label = "each of the others" if number == 0 else None
        ax.plot(EDGES, curve[i], color=GREY, linewidth=0.8, alpha=0.8, zorder=2, label=label)
    if others:
        ax.plot(EDGES, curve[least], color=ACCENT, linewidth=1, zorder=3, label=f"{names[least]}: covered least")
    mean = curve.mean(axis=0)
    what = f"mean of {len(names)} held-out groups" if others else f"{names[least]}, the only held-out group"
    ax.plot(EDGES, mean, color=DARK, linewidth=1.8, zorder=4, label=what)
    calibrated = getattr(adapter, "calibration", None)
    if calibrated is not None:
        level = calibrated.level
        at = float(np.interp(level, mean, EDGES))
        ax.axhline(level, color=DARK, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
        label = f"{percent(level)} lie in nominal {at:.0%} intervals"
        ax.plot(at, level, "o", color=DARK, markersize=5, zorder=5, label=label)
    style: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "transform": ax.transAxes}
    ax.text(0.03, 0.97, "wider than needed", ha="left", va="top", **style)
    ax.text(0.97, 0.42, "too narrow", ha="right", va="top", **style)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("nominal level of the interval")
    ax.set_ylabel("share of held-out measurements in it")
    tidy(ax)
    handles, labels = ax.get_legend_handles_labels()
    order = np.argsort([handle.get_zorder() for handle in handles])[::-1]
    legend = ax.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="lower right", fontsize=SMALL, framealpha=0.85,
        edgecolor="none",
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # names of groups are no formulas
    return ax


def _held_out(adapter: Any) -> tuple[list[str], np.ndarray]:
    """Return the names of the groups that have scores, and their curves, (groups, edges)."""
    if not hasattr(adapter, "held_out"):
        raise TypeError(f"Expected an Adapter, got {type(adapter).__name__}.")
    held_out = adapter.held_out
    if held_out is None:
        raise ValueError(
            "This adapter has no held-out predictions to plot: it was saved by an earlier version. Fit it again."
        )
    there = np.isfinite(held_out.curve).all(axis=1)
    if not there.any():
        raise ValueError("No gene was measured in a group that was held out, so there is no calibration curve.")
    curve = np.asarray(held_out.curve[there], dtype=np.float64)
    return [name for name, known in zip(held_out.groups, there, strict=True) if known], curve
