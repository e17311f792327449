"""`pl.expression`: H&E, measured and predicted expression side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from scipy import sparse

from pekasc._expression import close_genes
from pekasc._keys import PEKA, TILES, bound_keys, novelty_key, target_key, trust_key
from pekasc._layers import missing_layer
from pekasc._measured import as_stored, measured, was_trained_on
from pekasc._obsm import measured_target, predicted_column, target_column
from pekasc._sections import Section, get_table, tiled_table
from pekasc.pl._draw import (
    DIMMED,
    NOVEL,
    SMALL,
    Box,
    bounding_box,
    frame,
    robust_limits,
    round_length,
    scale_bar,
    shade,
    spots,
)
from pekasc.pl._picture import chosen_sections, label, picture, radii_um

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

BACKGROUNDS = ("white", "image")
_PANEL_INCHES = 2.7
_MAX_INCHES = 6.0  # maximum height of a row, for tall, narrow sections
UNIT = "log1p(counts per 10k)"


@dataclass(frozen=True, eq=False)
class _Row:
    """Data to draw of one section."""

    name: str
    section: Section
    radii: np.ndarray
    measured: np.ndarray | None
    predicted: np.ndarray
    ends: tuple[np.ndarray, ...]
    trained: np.ndarray
    box: Box
    novel: np.ndarray | None


def expression(
    sdata: SpatialData,
    gene: str,
    *,
    layer: str = PEKA,
    truth: str | None = None,
    counts_layer: str | None = None,
    section: str | list[str] | None = None,
    interval: bool = False,
    background: str = "white",
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    figsize: tuple[float, float] | None = None,
    table_name: str = "table",
    key: str = TILES,
) -> Figure:
    """Plot H&E, measured and predicted expression of a gene, one section per row, with one colour scale.

    Or of a column of another target: ``"key:column"`` for an adapter of ``target={"obsm": key}``.

    Both are on the scale of the predictions, log1p of counts per 10,000 unless the adapter's ``target`` is another. The
    colour scale of all panels runs from the 1st to the 99th percentile of measured and predicted values, so that
    predictions with less contrast than the measurement look like it.

    Parameters
    ----------
    sdata
        Sections with predicted expression, see :func:`pekasc.tl.predict_expression`.
    gene
        Name of the gene; ``"key:column"`` for a column of the target in ``obsm[key]``.
    layer
        Layer with the predicted values, which is the `key_added` of :func:`pekasc.tl.predict_expression`.
    truth
        Layer with measured values on the scale of the predictions; None uses log1p(1e4 * count / total) of the counts,
        or, of an adapter with ``target="as_is"``, the layer it was trained on. Of another target, another
        key of obsm.
    counts_layer
        Layer with counts; None uses `X` if it holds counts, else ``layers["counts"]``. A table without counts is
        plotted without measured values.
    section
        One or several sections, by region or by ``obs["section"]``; None plots all.
    interval
        Also plot the lower and the upper end of the interval around the prediction, which a calibrated adapter gives
        (:func:`pekasc.tl.calibrate`).
    background
        ``"white"``, or ``"image"`` to draw the spots on the dimmed H&E image.
    cmap
        Colour map.
    vmin, vmax
        Limits of the colour scale, instead of the percentiles.
    figsize
        Width and height of the figure in inches.
    table_name
        Name of the table.
    key
        Name of the tiles, from which positions and pixel sizes are taken.

    Returns
    -------
    The figure. Data units of its Axes are um; spots are drawn to scale, empty circles are spots without a value. Titles
    show the Pearson correlation over the spots of the section, and whether the adapter was trained on them; where it
    was on some, it is over the others. Of a calibrated adapter, a gene of low trust says so in the title, and
    predictions of tiles that the training hardly shows (a novelty below 0.01) are shaded.

    Raises
    ------
    KeyError
        If the gene, the layer, the target or its column, the table or a section is not there.
    ValueError
        If the gene has no predicted values, `background` is unknown, or `counts_layer` holds no counts or does nothing.
        If there is no interval.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> figure = pk.pl.expression(sdata, "DENSITY_001", layer="truth")  # here: the expected value
    """
    if not isinstance(gene, str):
        raise TypeError(f"`gene` must be the name of one gene, got {gene!r}: call once for each.")
    if background not in BACKGROUNDS:
        raise ValueError(f"`background={background!r}` is not known, use one of {list(BACKGROUNDS)}.")
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name)
    target = target_column(table, layer, gene)
    if target is None:
        predicted = _predicted(table, gene, layer, table_name)
        truth_values = _measured(table, gene, layer, truth, counts_layer)
        unit = UNIT if truth is None and not as_stored(table, layer) else "expression"
    else:
        predicted, truth_values = _of_target(table, layer, *target, truth, counts_layer)
        unit = target[0]
    ends = _ends(table, gene, layer, target) if interval else ()
    trained = was_trained_on(table, layer)
    novelty = table.obs.get(novelty_key(layer))
    novel = None if novelty is None else novelty.to_numpy(dtype=np.float64) < NOVEL
    low = target is None and str(table.var.get(trust_key(layer), pd.Series(dtype=str)).get(gene)) == "low"
    rows = []
    for found in chosen_sections(sdata, section, table_name, key):
        radii = radii_um(sdata, found)
        rows.append(
            _Row(
                label(sdata, found, table_name),
                found,
                radii,
                None if truth_values is None else truth_values[found.rows],
                predicted[found.rows],
                tuple(end[found.rows] for end in ends),
                trained[found.rows],
                bounding_box(found.centres_um, radii),
                None if novel is None else novel[found.rows],
            )
        )
    limits = robust_limits(
        *(v for row in rows for v in (row.measured, row.predicted, *row.ends) if v is not None), vmin=vmin, vmax=vmax
    )
    title = f"{gene} (low trust)" if low else gene
    return _draw(rows, title, Normalize(*limits), cmap, unit, background, figsize)


def _column(table: AnnData, gene: str) -> int:
    if gene not in table.var_names:
        names = table.var_names.to_numpy()
        raise KeyError(f"Gene {gene!r} not found in `var_names`.{close_genes(gene, names)}")
    return int(table.var_names.get_loc(gene))


def _values(table: AnnData, gene: str, layer: str) -> np.ndarray:
    return _dense(table.layers[layer][:, [_column(table, gene)]])


def not_predicted(gene: str, layer: str) -> ValueError:
    """Return the error about a gene that a layer of predictions lacks."""
    return ValueError(
        f"Gene {gene!r} was not predicted: layers[{layer!r}] holds only NaN for it. An adapter predicts "
        "`adapter.genes`."
    )


def _predicted(table: AnnData, gene: str, layer: str, table_name: str) -> np.ndarray:
    if layer not in table.layers:
        raise missing_layer(table, layer, table_name)
    values = _values(table, gene, layer)
    if np.isnan(values).all():
        raise not_predicted(gene, layer)
    return values


def _measured(table: AnnData, gene: str, layer: str, truth: str | None, counts_layer: str | None) -> np.ndarray | None:
    if truth is not None:
        if truth not in table.layers:
            raise missing_layer(table, truth, measured=True)
        return _values(table, gene, truth)
    column = _column(table, gene)
    if counts_layer is None and "counts" not in table.layers:
        # in a table of predictions, `X` holds predictions as well
        own = None if table.X is None else _dense(table.X[:, [column]])
        if own is None or np.array_equal(own, _values(table, gene, layer), equal_nan=True):
            return None
    values, known = measured(table, layer, counts_layer, otherwise=", or a layer on its scale (`truth=`)")
    return np.where(known, _dense(values[:, [column]]), np.nan)


def _of_target(
    table: AnnData, layer: str, key: str, column: str, truth: str | None, counts_layer: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the predicted and, where they are in the table, the measured values of a column of a target."""
    if counts_layer is not None:
        raise ValueError("`counts_layer=` does nothing for a target that is no gene, which is drawn as stored.")
    predicted = predicted_column(table, layer, key, column)
    if np.isnan(predicted).all():
        raise ValueError(
            f"Column {column!r} was not predicted: obsm[{target_key(layer, key)!r}] holds only NaN for it."
        )
    if truth is None and key not in table.obsm:
        return predicted, None
    argument = "gene" if truth is None else "truth"
    return predicted, measured_target(table, truth or key, pd.Index([column]), argument=argument)[:, 0]


def _ends(table: AnnData, gene: str, layer: str, target: tuple[str, str] | None) -> tuple[np.ndarray, ...]:
    """Return the lower and the upper end of the interval around the predictions of a gene."""
    if target is not None:
        raise ValueError("`interval=True` draws intervals of genes: those of another target are in obsm.")
    names = bound_keys(layer)
    if any(name not in table.layers for name in names):
        raise ValueError(
            f"layers[{layer!r}] has no intervals: calibrate the adapter (`adapter = pekasc.tl.calibrate(adapter)`) and "
            "predict again."
        )
    ends = tuple(_values(table, gene, name) for name in names)
    if any(np.isnan(end).all() for end in ends):
        raise ValueError(f"Gene {gene!r} has no interval: it was not measured in the groups of the calibration.")
    return ends


def _dense(column: Any) -> np.ndarray:
    return np.asarray(column.toarray() if sparse.issparse(column) else column, dtype=np.float64).ravel()


def _correlation(row: _Row) -> str:
    """Return the correlation of a section, over the spots that the adapter was not trained on where there are both."""
    known = np.isfinite(row.predicted)
    among = row.trained & known
    mixed = bool(among.any() and (known & ~row.trained).any())
    said = " on spots not trained on" if mixed else " (trained on)" if among.any() else ""
    if row.measured is None:
        return " (some trained on)" if mixed else said
    known &= np.isfinite(row.measured) & ~(row.trained & mixed)
    x, y = row.measured[known], row.predicted[known]
    if known.sum() < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return f", r undefined{said}"
    return f", r = {np.corrcoef(x, y)[0, 1]:.2f}{said}"


def _draw(
    rows: list[_Row],
    gene: str,
    norm: Normalize,
    cmap: str | Colormap,
    unit: str,
    background: str,
    figsize: tuple[float, float] | None,
) -> Figure:
    with_measured = rows[0].measured is not None
    n_columns = (3 if with_measured else 2) + len(rows[0].ends)
    heights = [min(_PANEL_INCHES * (row.box[3] - row.box[1]) / (row.box[2] - row.box[0]), _MAX_INCHES) for row in rows]
    fig, axes = plt.subplots(
        len(rows),
        n_columns,
        figsize=figsize or (_PANEL_INCHES * n_columns + 0.9, sum(heights) + 0.35 * len(rows)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for i, (row, panels) in enumerate(zip(rows, axes, strict=True)):
        image, extent = picture(row.section, row.box)
        _panel_image(panels[0], row, image, extent)
        if i == 0:
            panels[0].set_title("H&E")
        values = [("measured", row.measured)] if row.measured is not None else []
        values.append((f"predicted{_correlation(row)}", row.predicted))
        values += zip(("lower end of the interval", "upper end"), row.ends, strict=False)
        for ax, (title, shown) in zip(panels[1:], values, strict=True):
            if background == "image":
                ax.imshow(image, extent=extent, alpha=DIMMED, interpolation="antialiased")
            frame(ax, row.box)
            spots(ax, row.section.centres_um, row.radii, shown, norm=norm, cmap=cmap)
            ax.set_title(title)
        if row.novel is not None and row.novel.any():
            for ax in panels[-1 - len(row.ends) :]:
                shade(ax, row.section.centres_um[row.novel], row.radii[row.novel])
    # a gene's name may contain characters with a meaning in mathtext
    fig.suptitle(gene, style="normal" if gene.startswith(f"{unit}:") else "italic", parse_math=False)
    shrink = 0.7 if len(rows) == 1 else 0.5
    bar = fig.colorbar(ScalarMappable(norm, cmap), ax=axes[:, 1:], shrink=shrink, aspect=18, pad=0.02)
    bar.set_label(unit, fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    return fig


def _panel_image(ax: Axes, row: _Row, image: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    ax.imshow(image, extent=extent, interpolation="antialiased")
    frame(ax, row.box)
    scale_bar(ax, round_length(row.box[2] - row.box[0]))
    ax.set_ylabel(row.name)
