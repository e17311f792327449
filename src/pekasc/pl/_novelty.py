"""`pl.novelty`: where tiles are unlike those of the training, how many are, and what they look like."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pekasc._keys import GRID, PEKA, TILES, novelty_key, read_uns
from pekasc._measured import was_trained_on
from pekasc._sections import Section, check_spatialdata, get_table, section_readers, tiled_sections, tiled_table
from pekasc.pl._cells import box_around, draw_cells
from pekasc.pl._draw import (
    ACCENT,
    DARK,
    DIMMED,
    GREY,
    NOVEL,
    SMALL,
    bounding_box,
    frame,
    round_length,
    scale_bar,
    spots,
    tidy,
)
from pekasc.pl._picture import chosen_sections, label, picture, radii_um
from pekasc.pl._slide import tile_cells
from pekasc.tiling import TileStream

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from spatialdata import SpatialData

_BINS = 4  # a decade
_LEAST = 1e-4  # p-value from which on colours and bars are the same: how far beyond all known tiles, nobody knows
_PANEL_INCHES = 2.8
_TILE_INCHES = 1.15
_COLUMNS = 3


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Rows of a table that have a novelty, section by section."""

    sdata: SpatialData
    table_name: str
    table: AnnData
    sections: list[Section]
    values: np.ndarray  # of every row of the table
    trained: np.ndarray  # whether the adapter was trained on a row


def novelty(
    sdata: SpatialData,
    *,
    layer: str = PEKA,
    n: int = 6,
    section: str | list[str] | None = None,
    cmap: str | Colormap = "YlOrRd_r",
    figsize: tuple[float, float] | None = None,
    table_name: str = "table",
    key: str = TILES,
) -> Figure:
    """Plot where tiles are unlike those of the training, how many are, and the tiles at both ends.

    Novelty is a p-value: the share of tiles of held-out training sections that are at least as far from the training
    tiles, or at least as like a tile with a known fault. Small is novel. Look at the most novel tiles: folds, pens,
    another pixel size, tissue or stain are what a prediction should not be read from.

    Parameters
    ----------
    sdata
        Sections or a slide that a calibrated adapter predicted, see :func:`pekasc.tl.calibrate`.
    layer
        The predictions, whose novelty is in ``obs["{layer}_novelty"]``.
    n
        Number of tiles to show at either end.
    section
        One or several sections, by region or by ``obs["section"]``; None plots all.
    cmap
        Colour map.
    figsize
        Width and height of the figure in inches.
    table_name
        Name of the table; where there is none of the default name, that of the tiles of a slide.
    key
        Name of the tiles.

    Returns
    -------
    The figure: a map of each section on the dimmed H&E image, data units um; a histogram, and dashed what tiles like
    those of the training would show; the most and the least novel tiles, with their p-values. Tiles that the adapter
    was trained on are in maps only, as long as there are others.

    Raises
    ------
    KeyError
        If the table, its tiles, the novelty or a section is not there.
    TypeError
        If `sdata` is no SpatialData.
    ValueError
        If no tile has a novelty, or `n` is not positive.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.calibrate(pk.tl.fit_adapter(sdata, method=None, train=["P1S1", "P2S1"], progress=False))
    >>> pk.tl.predict_expression(sdata, adapter, progress=False)
    >>> figure = pk.pl.novelty(sdata, section="P3S1", n=4)
    """
    if isinstance(n, bool) or n < 1:
        raise ValueError(f"`n` must be a positive integer, got {n!r}.")
    check_spatialdata(sdata)
    found = _found(sdata, layer, section, tiled_table(sdata, table_name), key)
    rows = np.concatenate([one.rows for one in found.sections])
    p = found.values[rows]
    known = np.isfinite(p)
    new = known & ~found.trained[rows]
    apart = bool(new.any())  # of training tiles alone, the figure is still drawn
    known = np.flatnonzero(new if apart else known)
    order = known[np.argsort(p[known], kind="stable")]
    n = min(n, len(order))
    norm = LogNorm(10.0 ** floor(log10(np.clip(p[order[0]], _LEAST, 0.001))), 1)

    n_panels = len(found.sections) + 1
    n_columns = min(n_panels, _COLUMNS)
    n_rows = ceil(n_panels / n_columns)
    width = max(n_columns * _PANEL_INCHES + 1, n * _TILE_INCHES)
    heights = [n_rows * (_PANEL_INCHES + 0.3), 2 * (_TILE_INCHES + 0.25)]
    fig = plt.figure(figsize=figsize or (width, sum(heights)), layout="constrained")
    parts = fig.add_gridspec(2, 1, height_ratios=heights)
    above, below = fig.add_subfigure(parts[0]), fig.add_subfigure(parts[1])
    axes = above.subplots(n_rows, n_columns, squeeze=False)
    for ax in axes.flat[n_panels:]:
        ax.remove()
    for ax, one in zip(axes.flat, found.sections, strict=False):
        _map(ax, found, one, norm, cmap)
    what = "tiles" if not apart or not found.trained[rows].any() else "tiles not trained on"
    _histogram(axes.flat[n_panels - 1], p[known], norm, plt.get_cmap(cmap), what)
    bar = above.colorbar(ScalarMappable(norm, cmap), ax=list(axes.flat[: n_panels - 1]), shrink=0.7, aspect=18)
    bar.set_label("novelty (p-value)", fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.outline.set_visible(False)
    _examples(below, found, {"most novel": order[:n], "least novel": order[::-1][:n]}, p, key)
    return fig


def _found(sdata: SpatialData, layer: str, section: Any, table_name: str, key: str) -> _Tiles:
    table, column = get_table(sdata, table_name), novelty_key(layer)
    if column not in table.obs:
        others = [name for name, other in sdata.tables.items() if column in other.obs]
        there = f"Tables that have it: {others}" if others else f"Available columns: {list(table.obs)}"
        raise KeyError(
            f"Novelty {column!r} not found in `obs` of the table {table_name!r}. {there}. "
            "Predictions of a calibrated adapter have it: `adapter = pekasc.tl.calibrate(adapter)`, then "
            "`pekasc.tl.predict_expression(sdata, adapter)`."
        )
    values = table.obs[column].to_numpy(dtype=np.float64, na_value=np.nan)
    tiled_sections(sdata, table_name=table_name, key=key)  # an error says how to tile
    sections = chosen_sections(sdata, section, table_name, key)
    if not any(np.isfinite(values[one.rows]).any() for one in sections):
        raise ValueError(f"`obs[{column!r}]` has no values in these sections: all are NaN.")
    return _Tiles(sdata, table_name, table, sections, values, was_trained_on(table, layer))


def _map(ax: Axes, found: _Tiles, section: Section, norm: LogNorm, cmap: str | Colormap) -> None:
    values = np.maximum(found.values[section.rows], _LEAST)
    grid = read_uns(found.table, GRID) is not None
    cells = tile_cells(found.sdata, found.table, section) if grid else None
    radii = np.empty(0) if grid else radii_um(found.sdata, section)
    box = bounding_box(section.centres_um, radii) if cells is None else box_around(*cells.bounds())
    image, extent = picture(section, box)
    ax.imshow(image, extent=extent, alpha=DIMMED, interpolation="antialiased")
    if cells is None:
        drawn = spots(ax, section.centres_um, radii, values, norm=norm, cmap=cmap)
        drawn.set(edgecolor=GREY, linewidth=0.3)  # what is not novel is as pale as the image
    else:
        draw_cells(ax, cells, values, norm=norm, cmap=cmap, alpha=0.85)
    frame(ax, box)  # after the images, which set limits of their own
    scale_bar(ax, round_length(box[2] - box[0]))
    trained = " (trained on)" if found.trained[section.rows].any() else ""
    ax.set_title(f"{label(found.sdata, section, found.table_name)}{trained}", fontsize=SMALL + 2, parse_math=False)


def _histogram(ax: Axes, p: np.ndarray, norm: LogNorm, cmap: Colormap, what: str) -> None:
    least = float(norm.vmin or 1)
    edges = np.logspace(log10(least), 0, _BINS * round(-log10(least)) + 1)
    counts, _ = np.histogram(np.maximum(p, least), edges)  # the first bar has all below it
    expected = len(p) * np.diff(np.r_[0, edges[1:]])
    middle = np.sqrt(edges[:-1] * edges[1:])
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=cmap(norm(middle)), edgecolor=GREY, linewidth=0.4)
    # p-values of tiles like those of the training are uniform
    ax.stairs(
        expected, edges, baseline=None, color=DARK, linewidth=1, linestyle=(0, (3, 2)),
        label="tiles like those of the training",
    )  # fmt: skip
    ax.axvline(NOVEL, color=ACCENT, linewidth=0.8, linestyle=(0, (4, 3)), ymax=0.7)
    ax.set_xscale("log")
    ax.set_xlim(least, 1)
    ax.xaxis.set_major_locator(LogLocator())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylim(0, 1.45 * max(counts.max(), expected.max()))
    share = (p < NOVEL).mean()
    ax.text(
        0.03, 0.86, f"{share:.1%} of {len(p):,} tiles below {NOVEL:g}", transform=ax.transAxes, fontsize=SMALL,
        color=ACCENT, ha="left", va="top",
    )  # fmt: skip
    ax.legend(loc="upper left", fontsize=SMALL, frameon=False, borderpad=0.2, handlelength=1.6)
    ax.set_xlabel("novelty (p-value):\nsmall is unlike the training", fontsize=SMALL + 1)
    ax.set_ylabel(what, fontsize=SMALL + 1)
    tidy(ax)


def _examples(fig: SubFigure, found: _Tiles, chosen: dict[str, np.ndarray], p: np.ndarray, key: str) -> None:
    """Draw tiles, a row for each end."""
    sections, spec = tiled_sections(found.sdata, table_name=found.table_name, key=key)
    stream = TileStream(section_readers(sections, spec))
    place = {int(row): at for at, row in enumerate(np.concatenate([one.rows for one in sections]))}
    rows = np.concatenate([one.rows for one in found.sections])
    side = spec.side_um
    n = max(len(at) for at in chosen.values())
    axes = fig.subplots(len(chosen), n, squeeze=False)
    for line, (name, at) in zip(axes, chosen.items(), strict=True):
        pixels = stream.read(np.array([place[int(rows[i])] for i in at]))
        for ax, tile, i in zip(line, pixels, at, strict=True):
            ax.imshow(tile, extent=(0, side, side, 0), interpolation="nearest")
            frame(ax, (0, 0, side, side))
            ax.set_title(f"p = {p[i]:.2g}", fontsize=SMALL, pad=2)
        line[0].set_ylabel(name, fontsize=SMALL + 1)
    scale_bar(axes[0, 0], round_length(side, 0.5), fontsize=SMALL)
