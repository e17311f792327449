"""`pl.history`: training losses, and the held-out error by which the number of epochs was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from pekasc.pl._draw import ACCENT, DARK, GREY, SMALL, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pekasc.models import Adapter

_LOSSES = {
    "loss": (DARK, "loss"), "kd": ("#3b6fb6", "distillation"), "sa": ("#d08a1d", "structure alignment"),
    "matching": ("#4f9a58", "feature matching"),
}  # fmt: skip
_LEGEND: dict[str, Any] = {"framealpha": 0.85, "edgecolor": "none"}
_REFIT = -1


def history(
    adapter: Adapter, *, axes: tuple[Axes, Axes] | None = None, figsize: tuple[float, float] = (7.4, 2.9)
) -> np.ndarray:
    """Plot the training losses and the held-out error per epoch, with the chosen number of epochs.

    Parameters
    ----------
    adapter
        A trained adapter.
    axes
        Two Axes to draw on, for losses and held-out error; None creates a figure.
    figsize
        Width and height of the new figure in inches.

    Returns
    -------
    The two Axes. Left: losses per epoch, thin for the inner folds, bold for the final fit on all training groups.
    Right: held-out error per epoch, thin for each fold, bold for their mean; 1 is the error of the mean predictor.

    Raises
    ------
    TypeError
        If `adapter` has no training history.
    ValueError
        If nothing was trained (a frozen encoder).

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, recipe={"epochs": 1, "n_views": 1}, progress=False)
    >>> axes = pk.pl.history(adapter)
    """
    frame = getattr(adapter, "history", None)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"Expected an Adapter, got {type(adapter).__name__}.")
    if frame.empty:
        raise ValueError("Nothing was trained: this adapter is a frozen encoder, and has no history.")
    if axes is None:
        _, made = plt.subplots(1, 2, figsize=figsize, layout="constrained")
        axes = (made[0], made[1])
    _losses(axes[0], frame)
    _held_out(axes[1], frame, chosen=int(adapter.info["epochs"]))
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(x=0.03)
        tidy(ax)
    return np.array(axes, dtype=object)


def _losses(ax: Axes, frame: pd.DataFrame) -> None:
    for column, (color, name) in _LOSSES.items():
        # not part of the loss, or of an adapter saved by an earlier version
        if column not in frame or frame[column].isna().all():
            continue
        for fold, rows in frame.dropna(subset=[column]).groupby("fold"):
            final = fold == _REFIT
            ax.plot(
                rows["epoch"],
                rows[column],
                color=color,
                linewidth=1.8 if final else 0.8,
                alpha=1 if final else 0.45,
                marker="o" if len(rows) == 1 else None,
                markersize=3,
            )
        ax.plot([], [], color=color, linewidth=1.8, label=name)
    ax.plot([], [], color=GREY, linewidth=0.8, label="the same, inner folds")
    ax.set_ylabel("training loss")
    # room above the curves for the legend
    ax.set_ylim(0, ax.get_ylim()[1] * 1.35)
    ax.legend(fontsize=SMALL, loc="upper right", ncols=2, **_LEGEND)


def _held_out(ax: Axes, frame: pd.DataFrame, chosen: int) -> None:
    folds = frame[(frame["fold"] != _REFIT) & frame["val_error"].notna()]
    for _, rows in folds.groupby("fold"):
        ax.plot(rows["epoch"], rows["val_error"], color=GREY, linewidth=0.8, alpha=0.8)
        if "held_out" in rows:
            ax.annotate(
                str(rows["held_out"].iloc[0]),
                (rows["epoch"].iloc[-1], rows["val_error"].iloc[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=GREY,
                annotation_clip=False,
            )
    mean = folds.groupby("epoch")["val_error"].mean()
    ax.plot(mean.index, mean, color=DARK, linewidth=1.8, label="mean of held-out groups")
    if chosen in mean.index:
        ax.plot(chosen, mean[chosen], "o", color=ACCENT, markersize=5, zorder=4, label=f"chosen: epoch {chosen}")
        ax.axvline(chosen, color=ACCENT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    low, high = ax.get_ylim()
    if low <= 1 <= high + 0.5 * (high - low):
        ax.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    ax.set_ylabel("held-out error\n(1: mean predictor)")
    # room above the curves; one column, since two are wider than the panel
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))
    ax.legend(fontsize=SMALL, loc="upper right", **_LEGEND)
