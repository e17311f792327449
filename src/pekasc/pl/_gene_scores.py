"""`pl.gene_scores`: scores per gene, ranked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.patheffects import withStroke
from spatialdata import SpatialData

from pekasc._keys import PEKA, score_key
from pekasc._sections import get_table
from pekasc.pl._draw import ACCENT, DARK, GREY, SMALL, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pekasc.models import Adapter

_LIGHT = "#c2c2c2"


def gene_scores(
    data: SpatialData | AnnData | Adapter | pd.DataFrame,
    *,
    layer: str = PEKA,
    metric: str = "pearson",
    n: int = 6,
    ax: Axes | None = None,
    figsize: tuple[float, float] = (5.0, 3.4),
    table_name: str = "table",
) -> Axes:
    """Plot the scores of all genes, ranked, with the names of the best and the worst.

    Pearson correlations have a dash at the largest one that counting noise allows, an upper bound, where
    :func:`pekasc.tl.evaluate` wrote it: under a low dash, a low score says little about the prediction.

    Parameters
    ----------
    data
        An object with scores from :func:`pekasc.tl.evaluate`, the DataFrame that it returned (averaged over groups), or
        an adapter, for its held-out scores on the training groups.
    layer
        The layer that was scored.
    metric
        The score to plot, such as ``"pearson"``.
    n
        Number of genes to label at either end.
    ax
        Axes to draw on; None creates a figure.
    figsize
        Width and height of the new figure in inches.
    table_name
        Name of the table in a SpatialData.

    Returns
    -------
    The Axes.

    Raises
    ------
    KeyError
        If the scores are not there.
    TypeError
        If `data` has another type.
    ValueError
        If no gene has a score, or `n` is negative.

    Examples
    --------
    >>> import pandas as pd
    >>> import pekasc as pk
    >>> scores = pd.DataFrame({"pearson": [0.2, 0.6, -0.1]}, index=["CD3E", "ERBB2", "VIM"])
    >>> ax = pk.pl.gene_scores(scores)
    """
    if n < 0:
        raise ValueError(f"`n` must not be negative, got {n}.")
    scores = _scores(data, layer, metric, table_name).dropna().sort_values(ascending=False, kind="stable")
    if scores.empty:
        raise ValueError(
            f"No gene has a score {metric!r}: all are NaN. `pekasc.tl.evaluate` scores genes that were predicted and "
            "measured."
        )
    ceilings = _ceilings(data, layer, table_name, scores.index) if metric == "pearson" else np.empty(0)
    if ax is None:
        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    n_best = min(n, (len(scores) + 1) // 2)
    n_worst = min(n, len(scores) // 2)
    ranks = np.arange(1, len(scores) + 1)
    values = scores.to_numpy()
    median = float(np.median(values))
    ax.axhline(0, color=DARK, linewidth=0.8, zorder=1)
    ax.axhline(median, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    size = float(np.clip(2500 / len(scores), 4, 22))
    ax.scatter(ranks, values, s=size, color=GREY, linewidths=0, zorder=2, rasterized=len(ranks) > 5000)
    named = np.r_[:n_best, len(scores) - n_worst : len(scores)]
    ax.scatter(ranks[named], values[named], s=1.5 * size, color=ACCENT, linewidths=0, zorder=3)
    if np.isfinite(ceilings).any():
        label = "ceiling: what counting noise allows at most"
        ax.scatter(ranks, ceilings, s=2 * size, marker="_", color=_LIGHT, linewidths=1, zorder=1.5, label=label)
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=SMALL, borderpad=0, handlelength=1)
    _limits(ax, len(values), np.r_[values, ceilings[np.isfinite(ceilings)]])
    ax.annotate(
        f"median {median:.2f}",
        (1, median),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=SMALL,
        color=GREY,
    )
    first_worst = len(scores) - n_worst
    _name(ax, list(scores.index[:n_best]), ranks[:n_best], values[:n_best], values, top=True)
    _name(ax, list(scores.index[first_worst:]), ranks[first_worst:], values[first_worst:], values, top=False)
    ax.set_xlabel(f"genes, ranked (n = {len(scores)})")
    ax.set_ylabel({"pearson": "Pearson r", "spearman": "Spearman r", "rmse": "RMSE"}.get(metric, metric))
    tidy(ax)
    return ax


def _scores(data: Any, layer: str, metric: str, table_name: str) -> pd.Series:
    if isinstance(data, SpatialData | AnnData):
        var, column = get_table(data, table_name).var, score_key(layer, metric)
        if column not in var:
            raise KeyError(
                f"Scores {column!r} not found in `var`. Available columns: {list(var)}. "
                f"`pekasc.tl.evaluate(sdata, layer={layer!r})` writes them."
            )
        return var[column].astype(np.float64)
    frame = data if isinstance(data, pd.DataFrame) else getattr(data, "gene_scores", None)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"Expected a SpatialData, an AnnData, an Adapter or a DataFrame of scores, got {type(data).__name__}."
        )
    if metric not in frame:
        raise KeyError(f"Scores {metric!r} not found. Available columns: {list(frame)}.")
    names = frame["gene"] if "gene" in frame else frame.index
    return frame[metric].astype(np.float64).groupby(np.asarray(names, dtype=object)).mean()


def _ceilings(data: Any, layer: str, table_name: str, genes: pd.Index) -> np.ndarray:
    """Return the ceilings of genes, NaN where there are none."""
    try:
        return _scores(data, layer, "ceiling", table_name).reindex(genes).to_numpy()
    except KeyError:  # scores of an adapter, or that somebody brings along
        return np.full(len(genes), np.nan)


def _limits(ax: Axes, n: int, values: np.ndarray) -> None:
    low, high = min(0.0, values.min()), max(0.0, values.max())
    span = high - low or 1.0
    ax.set_xlim(1 - 0.03 * n - 0.5, n + 0.03 * n + 0.5)
    ax.set_ylim(low - 0.15 * span, high + 0.06 * span)


def _name(ax: Axes, names: list[str], ranks: np.ndarray, values: np.ndarray, curve: np.ndarray, *, top: bool) -> None:
    """Write names in a column next to the curve: to the right of its upper end, or to the left of its lower end."""
    if not names:
        return
    low, high = ax.get_ylim()
    height_pt = ax.get_window_extent().height * 72 / ax.figure.dpi
    step = (high - low) * (SMALL * 1.2) / height_pt
    y = _spread(values, step)
    y += np.clip(values.mean() - y.mean(), low + step / 2 - y.min(), high - step / 2 - y.max())
    # as close to the curve as possible without overlap
    if top:
        x, align = max((curve > y[-1] - step).sum(), ranks[-1]) + 0.04 * len(curve), "left"
    else:
        x, align = min((curve >= y[0] + step).sum(), ranks[0]) - 0.04 * len(curve), "right"
    for name, rank, value, height in zip(names, ranks, values, y, strict=True):
        ax.annotate(
            str(name),
            (rank, value),
            xytext=(x, height),
            ha=align,
            va="center",
            fontsize=SMALL,
            color=DARK,
            style="italic",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0},  # dashes of ceilings end at a name
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2},
        )


def _spread(values: np.ndarray, step: float) -> np.ndarray:
    """Return descending heights at or below the descending `values`, at least `step` apart."""
    heights = np.empty(len(values))
    last = np.inf
    for i, value in enumerate(values):
        last = min(float(value), last - step)
        heights[i] = last
    return heights
