"""`pl.tiles`: tiles as they are passed to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from numbers import Integral
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from pekasc._keys import TILES
from pekasc._sections import examples, get_table, section_readers, tiled_sections, tiled_table, with_stain
from pekasc._settings import get_logger
from pekasc.pl._draw import SMALL, Box, frame, round_length, scale_bar
from pekasc.tiling import TileStream

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from spatialdata import SpatialData

    from pekasc.models import Adapter

logger = get_logger(__name__)


def tiles(
    sdata: SpatialData,
    *,
    n: int = 16,
    names: Sequence[str] | None = None,
    n_columns: int | None = None,
    figsize: tuple[float, float] | None = None,
    adapter: Adapter | None = None,
    table_name: str = "table",
    key: str = TILES,
    random_state: int = 0,
) -> Figure:
    """Plot tiles as they are passed to the encoder, with a scale bar.

    Parameters
    ----------
    sdata
        Sections that :func:`pekasc.pp.tile` has tiled.
    n
        Number of tiles, sampled from all sections and shown in the order of the table.
    names
        Names of the observations to show instead.
    n_columns
        Number of columns; None makes an approximately square grid.
    figsize
        Width and height of the figure in inches.
    adapter
        Show tiles as this adapter reads them: brought to the colours of its training sections, if it was fitted with
        ``readout={"stain": ...}``.
    table_name
        Name of the table.
    key
        Name of the tiles.
    random_state
        Seed of the sampling.

    Returns
    -------
    The figure: one Axes per tile, data units um, titled with the observation's name.

    Raises
    ------
    KeyError
        If the table was not tiled, or an observation has no tile.
    ValueError
        If `n` or `n_columns` is not positive. With an adapter that has a stain map, if a section has too little
        tissue, or none that looks like H&E.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    >>> figure = pk.pl.tiles(sdata, n=4)
    """
    for name, value in (("n", n), ("n_columns", 1 if n_columns is None else n_columns)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    table_name = tiled_table(sdata, table_name)
    sections, spec = tiled_sections(sdata, table_name=table_name, key=key)
    rows = np.concatenate([section.rows for section in sections])
    obs_names = get_table(sdata, table_name).obs_names.to_numpy()[rows]
    if names is None:
        chosen = np.random.default_rng(random_state).permutation(rows.size)[:n]
        chosen = chosen[np.argsort(rows[chosen])]
    else:
        chosen = _positions(obs_names, names)
    if adapter is not None:
        adapter.check_tiles(spec.tile_px, spec.mpp)
        if adapter.stain is None:
            logger.hint("This adapter reads tiles as they are: it was fitted without a stain map.")
        sections = with_stain(sections, spec, adapter.stain)
    pixels = TileStream(section_readers(sections, spec)).read(chosen)

    columns = n_columns or ceil(np.sqrt(len(chosen)))
    n_rows = ceil(len(chosen) / columns)
    side = spec.side_um
    box: Box = (0, 0, side, side)
    fig, axes = plt.subplots(
        n_rows,
        columns,
        figsize=figsize or (1.5 * columns, 1.65 * n_rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(chosen) :]:
        ax.remove()
    for ax, tile, position in zip(axes.flat, pixels, chosen, strict=False):
        ax.imshow(tile, extent=(0, side, side, 0), interpolation="nearest")
        frame(ax, box)
        ax.set_title(str(obs_names[position]), fontsize=SMALL, pad=3)
    scale_bar(axes.flat[0], round_length(side, 0.5), fontsize=SMALL)
    return fig


def _positions(obs_names: np.ndarray, names: Sequence[str]) -> np.ndarray:
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("`names` is empty: name at least one observation.")
    position = {name: i for i, name in enumerate(obs_names)}
    missing = [name for name in names if name not in position]
    if missing:
        raise KeyError(f"No tile for {examples(missing)}. Observations with tiles: {examples(obs_names)}.")
    return np.array([position[name] for name in names])
