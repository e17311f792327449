"""Read the spots of an object as arrays, the same for every call: tiles, expression, groups, sections, positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc import pp
from pekasc._expression import (
    Matrix,
    count_totals,
    counts,
    gene_columns,
    gene_names,
    of_genes,
    report_no_genes,
    target_matrix,
)
from pekasc._keys import TILE_INSIDE, UNS
from pekasc._options import Readout
from pekasc._panels import Panels
from pekasc._sections import (
    PixelSizeUnknown,
    Section,
    check_spatialdata,
    check_table,
    check_tile_key,
    get_table,
    present_table,
    section_labels,
    section_readers,
    tile_call,
    tile_record,
    tiled_sections,
)
from pekasc._settings import get_logger
from pekasc.tiling import PatchReader, TileReader, TilesOfSome, TileSource, TileSpec, TileStream, TileSubset, cached
from pekasc.tl._panels import check_not_mixed, training_panels
from pekasc.tl._select import default_groups, obs_groups, training_mask

logger = get_logger(__name__)

_LEAST_INSIDE = 0.5  # mean fraction of a wider field of view inside the image
_LEAST_KEPT = 0.5  # fraction of training spots that a wider field may leave to inner folds
_AUTO = 4.0  # width of the automatic field of view, in tiles


@dataclass(frozen=True, eq=False)
class Spots:
    """The spots of an object that have a tile and measured expression, in the order of its sections.

    Parameters
    ----------
    table
        The table.
    sections
        The tiled sections, with these spots only.
    spec
        Size of the tiles.
    rows
        Row of the table for every spot, (n,).
    columns
        Columns of the table that are genes: all, but for antibody counts and the like.
    expression
        Expression, spots x genes: the head's target, unless that is no gene.
    names
        Names of the genes.
    group_key
        Column of obs with the groups; None if the groups are the sections.
    groups, labels
        Group and section of every spot, (n,).
    coords_um
        Positions within the section in um, (n, 2).
    counts_layer
        Layer with counts; None for ``X``, or ``layers["counts"]``.
    panels
        Which spots measured which genes; None: all measured all. `expression` is 0 where a gene was not measured.
    """

    table: AnnData
    sections: list[Section]
    spec: TileSpec
    rows: np.ndarray
    columns: np.ndarray
    expression: Matrix
    names: np.ndarray
    group_key: str | None
    groups: np.ndarray
    labels: np.ndarray
    coords_um: np.ndarray
    counts_layer: str | None
    panels: Panels | None = None

    @cached_property
    def counts(self) -> Matrix:
        """Raw counts, spots x genes."""
        return of_genes(counts(self.table[self.rows], self.counts_layer), self.columns)

    @property
    def totals(self) -> np.ndarray:
        """Total count of every spot, (n,) float64, over the genes that all sections measured."""
        shared = np.arange(self.names.size) if self.panels is None else np.flatnonzero(self.panels.shared)
        return count_totals(self.counts, shared)

    @cached_property
    def stream(self) -> TileStream:
        """Stream of the tiles, read from their images."""
        return TileStream(section_readers(self.sections, self.spec))

    def read_tiles(self, scales: Sequence[float], max_memory: int, local: np.ndarray | None = None) -> list[TileSource]:
        """Read the tiles at every scale once, into at most `max_memory` bytes of memory or into files.

        With `local`, indices of tiles, only those are read.
        """
        further = [TileStream(readers) for readers in further_readers(self.sections, self.spec, scales)]
        sources: list[TileSource] = [self.stream, *further]
        share = max(1, max_memory // len(sources))
        if local is None:
            return [cached(source, max_memory=share) for source in sources]
        return [TilesOfSome(cached(TileSubset(source, local), max_memory=share), local, source.n) for source in sources]


@contextmanager
def reading(
    sdata: SpatialData,
    *,
    table_name: str,
    key: str,
    layer: str | None,
    target: Any = "log1p",
    gene_key: str | None,
    train: Any = None,
    groups: str | None,
    panels: Any = None,
    mixed: bool = False,
) -> Iterator[Spots]:
    """Read the spots of an object, which is tiled first if it has no tiles, and restored if anything fails.

    Parameters
    ----------
    sdata, table_name, key
        The object, its table, and the name of its tiles.
    layer, target, gene_key
        Layer, scale and gene names of the expression. With a target that is no gene (a mapping), the layer of the
        counts, whose log1p is the expression.
    train
        Spots to read; others are not looked at.
    groups
        Column of obs with the groups; None is patients if there are two or more, else sections.
    panels
        Genes that every section measured, by region; see :func:`training_panels`.
    mixed
        Whether sections may have measured different genes.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the object is not a SpatialData, has no such table, layer, column or tiles, or no spot is left.
    """
    table = get_table(sdata, table_name)
    check_table(table)
    mask = training_mask(table, train)
    columns = gene_columns(table)
    report_no_genes(table, columns)
    names = gene_names(table, gene_key, columns)
    # only these rows of the matrix are ever read
    candidates = np.flatnonzero(mask)
    found = training_panels(table, candidates, panels, names, columns)
    if found is not None and not mixed:
        check_not_mixed(found)
    totals = None if found is None else columns[found.shared]
    expression = of_genes(target_matrix(table if mask.all() else table[candidates], layer, target, totals), columns)
    if found is not None:
        expression = found.masked(expression)
    with untiled_on_error(sdata, table_name=table_name, key=key):
        sections, spec = ensure_tiles(sdata, table_name=table_name, key=key)
        # a spot without counts has no log-normalised expression
        keep = np.ones(candidates.size, dtype=bool)
        if target != "as_is":
            keep = np.asarray(expression.sum(axis=1)).ravel() > 0
        usable = np.zeros(table.n_obs, dtype=bool)
        usable[candidates[keep]] = True
        tiled = sections
        sections = [part for part in (s.take(usable[s.rows]) for s in tiled) if part.rows.size]
        if not sections:
            raise ValueError(
                f"No spot has both a tile and counts: {int(keep.sum())} have counts, "
                f"{sum(section.rows.size for section in tiled)} a tile. Name the layer with counts (`layer=`), or "
                "tile these sections (`pekasc.pp.tile`)."
            )
        rows = np.concatenate([section.rows for section in sections])
        empty, untiled = int((~keep).sum()), int(keep.sum() - rows.size)
        if empty or untiled:
            logger.hint("Left out: %d spots without counts, %d without a tile.", empty, untiled)
        if not np.array_equal(rows, candidates):  # avoids a second copy if nothing changes
            at = np.searchsorted(candidates, rows)
            expression, found = expression[at], None if found is None else found.take(at)
        groups = default_groups(table, rows) if groups is None else groups
        yield Spots(
            table=table,
            sections=sections,
            spec=spec,
            rows=rows,
            columns=columns,
            expression=expression,
            names=names,
            group_key=groups,
            groups=obs_groups(table, groups, rows),
            labels=section_labels(table)[rows],
            coords_um=np.concatenate([section.centres_um for section in sections]),
            # with target="as_is" `layer` holds no counts: look for those in the default places
            counts_layer=None if target == "as_is" else layer,
            panels=found,
        )


def ensure_tiles(
    sdata: SpatialData, *, table_name: str, key: str, spec: TileSpec | None = None
) -> tuple[list[Section], TileSpec]:
    """Return the tiled sections; tile an untiled object first, with the size of `spec` or the defaults.

    Raises
    ------
    KeyError, ValueError
        If tiling needs more arguments, such as the pixel size: the message shows the call to make.
    """
    check_spatialdata(sdata)
    table = get_table(sdata, table_name, spec)
    if tile_record(table, key) is None:
        check_tile_key(table, key, tile_call(table, table_name, key))
        size: dict[str, Any] = {} if spec is None else {"tile_px": spec.tile_px, "mpp": spec.mpp}
        try:
            pp.tile(sdata, table_name=table_name, key_added=key, **size)
        except (KeyError, ValueError) as error:
            missing = error.argument if isinstance(error, PixelSizeUnknown) else ""
            raise type(error)(
                f"{error.args[0] if error.args else error} {_tile_line(table_name, key, size, missing)}"
            ) from error
        made = tiled_sections(sdata, table_name=table_name, key=key)
        logger.hint("Tiled: %d px at %g um/px.", made[1].tile_px, made[1].mpp)
        return made
    sections, there = tiled_sections(sdata, table_name=table_name, key=key)
    if spec is not None and there != spec:
        logger.hint("Using the tiles %r that are there: %d px at %g um/px.", key, there.tile_px, there.mpp)
    return sections, there


def _tile_line(table_name: str, key: str, size: dict[str, Any], missing: str) -> str:
    """Return the part of an error that shows how to tile; `missing` is the argument that was missing, if known."""
    given = {"tile_px": 224, "mpp": 0.5, **size}
    shown = [f"{name}={value:g}" for name, value in given.items()]
    if table_name != "table":
        shown.append(f"table_name={table_name!r}")
    if key != "tiles":
        shown.append(f"key_added={key!r}")
    if missing:
        line, what = f"pekasc.pp.tile(sdata, {', '.join([*shown, missing])})", ""
    else:
        line, what = f"pekasc.pp.tile(sdata, {', '.join(shown)}, ...)", " with what is missing"
    return f"The sections have no tiles yet: run `{line}`{what}, then this call again."


@contextmanager
def untiled_on_error(sdata: SpatialData, *, table_name: str, key: str) -> Iterator[None]:
    """Remove the tiles that were made inside the block from the object if the block raises."""
    table = get_table(sdata, table_name)
    had_tiles = tile_record(table, key) is not None
    shapes = set(sdata.shapes) if isinstance(sdata, SpatialData) else set()
    inside, record = table.obs.get(TILE_INSIDE), table.uns.get(UNS)
    try:
        yield
    except BaseException:
        now = get_table(sdata, table_name)
        if not had_tiles and tile_record(now, key) is not None:
            for name in set(sdata.shapes) - shapes:
                del sdata.shapes[name]
            if now is not table:  # of a view, a copy was tiled
                sdata.tables[present_table(sdata, table_name)] = table
            elif inside is None:
                del table.obs[TILE_INSIDE]
            else:
                table.obs[TILE_INSIDE] = inside
            if now is table and record is None:
                del table.uns[UNS]
            elif now is table:
                table.uns[UNS] = record
        raise


def further_readers(
    sections: Sequence[Section], spec: TileSpec, scales: Sequence[float], *, quiet: bool = False, **kwargs: Any
) -> list[list[TileReader | PatchReader]]:
    """Return readers of larger fields of view, `scales[1:]`: the same tiles at the same `tile_px`, coarser pixels.

    Raises
    ------
    ValueError
        If a section has stored patches and no image, so that there is no tissue around them. If most of the tiles'
        area lies outside of the images.
    """
    found = []
    for scale in scales[1:]:
        scaled = spec.scaled(scale)
        readers = section_readers(sections, scaled, further=True, **kwargs)
        inside = np.concatenate([reader.inside for reader in readers])
        if np.mean(inside) < _LEAST_INSIDE:
            raise ValueError(
                f"`fields_um`: tiles of {scaled.side_um:g} um lie to {1 - np.mean(inside):.0%} outside of their "
                "images: leave this field of view out."
            )
        for section, reader in zip(sections, readers, strict=True):
            coarse = getattr(reader, "upsampling", 1.0)
            if quiet:
                continue
            logger.hint(
                "section %s, field of view of %g um: %d px at %g um/px, %.0f %% inside the image%s.",
                section.name, scaled.side_um, scaled.tile_px, scaled.mpp, 100 * float(np.mean(reader.inside)),
                f", interpolated {coarse:.2f} times" if coarse > 1 else "",
            )  # fmt: skip
        found.append(readers)
    return found


def field_scales(spec: TileSpec, fields_um: Any) -> tuple[float, ...]:
    """Return the fields of view as multiples of the pixel size, 1 (the tile itself) first.

    Raises
    ------
    ValueError
        If a field is no wider than the tile.
    """
    widths = () if fields_um in (None, "auto") else tuple(fields_um)
    for width in widths:
        if width <= spec.side_um * 1.01:
            raise ValueError(
                f"`fields_um`: {width:g} um is not wider than the tile ({spec.side_um:g} um): give widths beyond it, "
                f"such as ({_AUTO * spec.side_um:g},)."
            )
    return (1.0, *(width / spec.side_um for width in widths))


def fields_of(spots: Spots, readout: Readout, folds_of: Callable[[float], list[tuple[int, int]]]) -> tuple[float, ...]:
    """Return the widths of the fields of view beyond the tile; for ``"auto"``, one of four tiles if it can be read.

    Parameters
    ----------
    spots
        The training spots.
    readout
        The option object.
    folds_of
        Function from the width of the widest field of view in um to the numbers of training spots of every inner fold,
        with its margin and with that of the tile.
    """
    if readout.fields_um != "auto":
        return () if readout.fields_um is None else tuple(readout.fields_um)
    if not readout.reads_fields:
        return ()
    width = _AUTO * spots.spec.side_um
    try:
        further_readers(spots.sections, spots.spec, (1.0, _AUTO), quiet=True)
    except ValueError as error:
        logger.hint("Field of view: the tile alone, since %g um cannot be read: %s", width, error)
        return ()
    try:
        kept = folds_of(width)
    except ValueError:
        kept = [(0, 1)]
    least = min(wide / max(narrow, 1) for wide, narrow in kept)
    if least < _LEAST_KEPT:
        logger.hint(
            "Field of view: the tile alone. The margin of one of %g um would leave an inner fold %.0f %% of its spots.",
            width, 100 * least,
        )  # fmt: skip
        return ()
    return (width,)
