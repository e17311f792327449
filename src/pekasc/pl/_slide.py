"""`pl.slide`: a slide without spots: its tiles, and genes, clusters or measures of the tiles on it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import shapely
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.patches import Patch

from pekasc._keys import GRID, PEKA, read_uns
from pekasc._sections import Section, check_spatialdata, get_table, images_of, tile_record, tiled_sections
from pekasc.pl._cells import Cells, box_around, draw_cells
from pekasc.pl._color import Map, color_maps, color_names
from pekasc.pl._draw import DIMMED, SMALL, Box, frame, round_length, scale_bar
from pekasc.pl._picture import picture

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

_TILE_COLOUR = "#11999e"  # no colour of H&E
_PANEL_INCHES = 3.4  # side of a square panel
_FEW = 1.3  # times as large, if there are but two
_LEAST_INCHES = 1.6  # width of a column, for titles
_BESIDE_INCHES = 0.8  # for a colour bar or legend
_FIGURE_INCHES = 14.0
_BAR_INCHES = 2.4
_ENTRY_INCHES = 0.2


def slide(
    sdata: SpatialData,
    color: str | Sequence[str] | None = None,
    *,
    layer: str = PEKA,
    table_name: str = "grid",
    image_name: str | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | None = None,
    vmax: float | None = None,
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """Plot a slide without spots: its tiles, or predicted genes, clusters and measures of its tiles beside the H&E.

    Parameters
    ----------
    sdata
        A slide that :func:`pekasc.pp.tile_grid` has tiled.
    color
        A gene of the layer, a column of ``obs``, numeric (``"sharpness"``) or categorical (``"leiden"``), a column of
        a predicted target (``"key:column"``), or a list of them, one panel for each. None shows which parts of the
        slide have tiles.
    layer
        Layer with the values of genes.
    table_name
        Name of the table of the tiles.
    image_name
        Name of the image, if the table has tiles on several.
    cmap
        Colour map of numeric values. Categories have the colours in ``uns["{color}_colors"]``, as scanpy writes them,
        else those that scanpy would choose.
    vmin, vmax
        Limits of the colour scale, instead of the 1st and 99th percentile.
    figsize
        Width and height of the figure in inches.

    Returns
    -------
    The figure. Data units of its Axes are um; tiles are drawn as the cells of their grid, which do not overlap, or as
    the shapes that they were made for. A tile without a value stays empty. Without `color`, the caption says how many
    tiles :func:`pekasc.pp.tile_grid` left out, and why.

    Raises
    ------
    KeyError
        If the table, its tiles, the image, the layer, or a gene or column is not there.
    TypeError
        If `color` is neither a name nor a list of names.
    ValueError
        If there are no values to draw, too many categories, or tiles on several images.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=1.0)
    >>> pk.pp.tile_grid(sdata, "P1S1_he", tile_px=56, mpp=2.0, stride_um=50)
    >>> figure = pk.pl.slide(sdata)
    >>> figure = pk.pl.slide(sdata, ["sharpness", "tissue_fraction"])
    """
    names = color_names(color)
    table = _tiled_table(sdata, table_name)
    section, side_um = _section(sdata, table_name, image_name)
    maps = color_maps(
        table, names, section.rows, layer=layer, table_name=table_name, cmap=plt.get_cmap(cmap), limits=(vmin, vmax)
    )  # fmt: skip
    cells = tile_cells(sdata, table, section)
    box = box_around(*cells.bounds()) if maps else box_around(_image_corners(section), *cells.bounds())
    caption = "" if maps else _caption(table, section, cells, side_um)
    return _draw(section, cells, maps, box, caption, figsize)


def _tiled_table(sdata: SpatialData, table_name: str) -> AnnData:
    """Return the table, after checking that it has tiles on images that are still there."""
    check_spatialdata(sdata)
    tiled = [name for name, table in sdata.tables.items() if tile_record(table) is not None]
    make = "`pk.pp.tile_grid(sdata, image_name)` makes a table of tiles"
    if table_name not in sdata.tables:
        there = f"Available tables: {list(sdata.tables)}" + (f", with tiles: {tiled}" if tiled else "")
        raise KeyError(f"Table {table_name!r} not found in `sdata.tables`. {there}. {make}.")
    table = get_table(sdata, table_name)
    record = tile_record(table)
    if record is None:
        there = f" Tables with tiles: {tiled}." if tiled else ""
        raise KeyError(f"The table {table_name!r} has no tiles.{there} {make}.")
    for known in record["sections"].values():
        if known["image"] not in images_of(sdata) and not known.get("patches"):
            raise KeyError(
                f"The tiles of the table {table_name!r} lie on the image {known['image']!r}, which is not in "
                f"`sdata.images` any more: {list(images_of(sdata))}. Add it again, or make new tiles: {make}."
            )
    return table


def _section(sdata: SpatialData, table_name: str, image_name: str | None) -> tuple[Section, float]:
    """Return the tiles on one image, and the side of a tile in um."""
    sections, spec = tiled_sections(sdata, table_name=table_name)
    images = [section.image_name for section in sections]
    if image_name is None and len(sections) > 1:
        raise ValueError(
            f"The table {table_name!r} has tiles on several images: choose one with `image_name=`: {images}."
        )
    if image_name is not None and image_name not in images:
        raise KeyError(f"The table {table_name!r} has no tiles on the image {image_name!r}, but on {images}.")
    return sections[0 if image_name is None else images.index(image_name)], spec.side_um


def _to_um(section: Section, points_px: np.ndarray) -> np.ndarray:
    offsets = (points_px - section.centres_px[0]) @ np.linalg.inv(section.um_to_px).T
    return np.asarray(section.centres_um[0] + offsets)


def _image_corners(section: Section) -> np.ndarray:
    width, height = section.size_px
    return _to_um(section, np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64))


def _grid_record(table: AnnData, section: Section) -> Mapping[str, Any]:
    """Return what `pp.tile_grid` recorded of the tiles on the section's image; empty for tiles from elsewhere."""
    record = read_uns(table, GRID)
    return record if isinstance(record, Mapping) and record.get("image") == section.image_name else {}


def tile_cells(sdata: SpatialData, table: AnnData, section: Section) -> Cells:
    """Return the places of a section's tiles: the cells of their grid, or the shapes that they were made for."""
    record = _grid_record(table, section)
    if record.get("shape"):
        return Cells(section.centres_um, float(record["stride_um"]), str(record["shape"]))
    frame = sdata.shapes[section.name].loc[section.ids]
    geometry = frame.geometry.to_numpy()
    if "radius" in frame:
        geometry = shapely.buffer(geometry, frame["radius"].to_numpy(), quad_segs=4)
    parts, owner = shapely.get_parts(geometry, return_index=True)
    points, index = shapely.get_coordinates(shapely.get_exterior_ring(parts), return_index=True)
    points = points @ section.shapes_to_px[:2, :2].T + section.shapes_to_px[:2, 2]
    outlines = np.split(_to_um(section, points), np.flatnonzero(np.diff(index)) + 1)
    return Cells(section.centres_um, outlines=outlines, owner=owner)


def _caption(table: AnnData, section: Section, cells: Cells, side_um: float) -> str:
    """Return the number of tiles, their size, and how many were left out by reason."""
    n = section.rows.size
    record = _grid_record(table, section)
    apart = "" if cells.outlines is not None else f", {cells.stride:g} µm apart"
    size = f"{side_um:g} µm wide{apart}"
    if not record:
        return f"{n:,} tiles\n{size}"
    left_out = {reason: count for reason, count in record["left_out"].items() if count}
    gone = record["n_candidates"] - sum(left_out.values()) - n
    if gone > 0:
        left_out["not in the table any more"] = gone
    reasons = [f"{count:,} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1])]
    lines = [f"{n:,} of {record['n_candidates']:,} tiles", size]
    unbroken = ", ".join(reason.replace(" ", "\u00a0") for reason in reasons)
    return "\n".join(lines + textwrap.wrap(f"left out: {unbroken}", 48) if reasons else lines)


def _draw(
    section: Section,
    cells: Cells,
    maps: list[Map],
    box: Box,
    caption: str,
    figsize: tuple[float, float] | None,
) -> Figure:
    image, extent = picture(section, box)
    n_panels = 1 + max(1, len(maps))
    wide, high = _panel_inches(box, _PANEL_INCHES * (_FEW if n_panels == 2 else 1))
    column = max(wide, _LEAST_INCHES) + _BESIDE_INCHES
    n_columns = int(np.clip(_FIGURE_INCHES // column, 1, n_panels))
    n_rows = -(-n_panels // n_columns)
    fig, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=figsize or (n_columns * column, n_rows * (high + 0.5) + 0.15 * caption.count("\n")),
        squeeze=False,
        layout="compressed",
    )
    for ax in axes.flat[n_panels:]:
        ax.remove()
    first, *others = axes.flat[:n_panels]
    first.imshow(image, extent=extent, interpolation="antialiased")
    frame(first, box)
    scale_bar(first, round_length(box[2] - box[0]))
    first.set_title("H&E")
    first.set_ylabel(section.image_name, parse_math=False)
    for ax in others:
        ax.imshow(image, extent=extent, alpha=DIMMED, interpolation="antialiased")
    if not maps:
        title, _, rest = caption.partition("\n")
        kept = np.ones(len(cells.centres))
        draw_cells(others[0], cells, kept, norm=Normalize(0, 1), cmap=ListedColormap([_TILE_COLOUR]), alpha=0.5)
        others[0].set_title(title)
        others[0].set_xlabel(rest, fontsize=SMALL)
    for ax, shown in zip(others, maps, strict=False):
        draw_cells(ax, cells, shown.values, norm=shown.norm, cmap=shown.cmap)
        ax.set_title(shown.title, style="italic" if shown.italic else "normal", parse_math=False)
        if shown.legend is None:
            _colour_bar(fig, ax, shown, wide, high)
        else:
            _legend(ax, shown.legend, high)
    for ax in others:
        frame(ax, box)  # after the images, which set limits of their own
    return fig


def _panel_inches(box: Box, side: float) -> tuple[float, float]:
    """Return width and height of a panel with the area of a square of this side, but of no more than twice its side."""
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    wide = side * min(np.sqrt(aspect), 2, 2 * aspect)
    return wide, wide / aspect


def _colour_bar(fig: Figure, ax: Axes, shown: Map, wide: float, high: float) -> None:
    length = float(np.clip(_BAR_INCHES / high, 0.3, 1))
    beside = ax.inset_axes((1 + 0.1 / wide, 0.5 - length / 2, 0.13 / wide, length))
    bar = fig.colorbar(ScalarMappable(shown.norm, shown.cmap), cax=beside)
    bar.set_label(shown.unit, fontsize=SMALL + 1, parse_math=False)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def _legend(ax: Axes, entries: Sequence[tuple[str, Any]], high: float) -> None:
    handles = [Patch(facecolor=colour, label=name) for name, colour in entries]
    legend = ax.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        ncols=ceil(len(handles) * _ENTRY_INCHES / max(high, 1)),
        fontsize=SMALL,
        frameon=False,
        handlelength=1,
        handleheight=1,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
