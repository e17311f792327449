"""What the tools share in reading sections: tiles (made if need be), training rows, genes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from pekasc import pp
from pekasc._expression import Matrix, close_genes, gene_positions, no_overlap_message
from pekasc._keys import PATIENT, SECTION, TILE_INSIDE, UNS
from pekasc._sections import (
    Section,
    get_table,
    section_labels,
    section_readers,
    tile_record,
    tiled_sections,
)
from pekasc._settings import get_logger
from pekasc.tiling import PatchReader, TileReader, TilesOfSome, TileSource, TileSpec, TileStream, TileSubset, cached

logger = get_logger(__name__)

SEEN_IN = 0.1
_LEAST_INSIDE = 0.5  # of the area of tiles at a further scale


def ensure_tiles(
    sdata: SpatialData, *, table_name: str, key: str, pixel_size: Mapping[str, Any], spec: TileSpec | None
) -> tuple[list[Section], TileSpec]:
    """Return the tiled sections; tile first, as `spec` says or by default, where that was not done."""
    if not isinstance(sdata, SpatialData):
        raise TypeError(f"Tiles need images: expected a SpatialData, got {type(sdata).__name__}.")
    given = {name: value for name, value in pixel_size.items() if value is not None}
    if tile_record(get_table(sdata, table_name), key) is None:
        size: dict[str, Any] = {} if spec is None else {"tile_px": spec.tile_px, "mpp": spec.mpp}
        pp.tile(sdata, table_name=table_name, key_added=key, **size, **given)
        made = tiled_sections(sdata, table_name=table_name, key=key)
        logger.hint("Tiled: %d px at %g um/px.", made[1].tile_px, made[1].mpp)
        return made
    if given:
        raise ValueError(
            f"{sorted(given)} say how to tile, but the table has tiles {key!r} already. Leave them out, or run "
            "`pekasc.pp.tile` with them."
        )
    sections, there = tiled_sections(sdata, table_name=table_name, key=key)
    if spec is not None and there != spec:
        logger.hint("Using the tiles %r that are there: %d px at %g um/px.", key, there.tile_px, there.mpp)
    return sections, there


@contextmanager
def untiled_on_error(sdata: SpatialData, *, table_name: str, key: str) -> Iterator[None]:
    """Take the tiles that were made inside the block out of the object again if it fails."""
    table = get_table(sdata, table_name)
    had_tiles = tile_record(table, key) is not None
    shapes = set(sdata.shapes) if isinstance(sdata, SpatialData) else set()
    inside, record = table.obs.get(TILE_INSIDE), table.uns.get(UNS)
    try:
        yield
    except BaseException:
        table = get_table(sdata, table_name)
        if not had_tiles and tile_record(table, key) is not None:
            for name in set(sdata.shapes) - shapes:
                del sdata.shapes[name]
            if inside is None:
                del table.obs[TILE_INSIDE]
            else:
                table.obs[TILE_INSIDE] = inside
            if record is None:
                del table.uns[UNS]
            else:
                table.uns[UNS] = record
        raise


def tile_stream(sections: Sequence[Section], spec: TileSpec) -> tuple[TileSource, np.ndarray]:
    """Return the tiles of sections as one stream, and the table row of each."""
    return TileStream(section_readers(sections, spec)), np.concatenate([section.rows for section in sections])


def further_streams(sections: Sequence[Section], spec: TileSpec, scales: Sequence[float]) -> list[TileSource]:
    """Return the same tiles at every further scale, `scales[1:]`, as streams: see :func:`further_readers`."""
    return [TileStream(readers) for readers in further_readers(sections, spec, scales)]


def further_readers(
    sections: Sequence[Section], spec: TileSpec, scales: Sequence[float], **kwargs: Any
) -> list[list[TileReader | PatchReader]]:
    """Return readers of the same tiles at every further scale, `scales[1:]`: as many pixels, each so much larger.

    Raises
    ------
    ValueError
        If a section has stored patches and no image: nothing around them is known. If most of the tiles' area lies
        outside of the images.
    """
    found = []
    for scale in scales[1:]:
        at = spec.scaled(scale)
        readers = section_readers(sections, at, further=True, **kwargs)
        inside = np.concatenate([reader.inside for reader in readers])
        if np.mean(inside) < _LEAST_INSIDE:
            raise ValueError(
                f"At scale {scale:g}, tiles of {at.side_um:g} um lie to {1 - np.mean(inside):.0%} outside of their "
                "images: leave this scale out."
            )
        for section, reader in zip(sections, readers, strict=True):
            coarse = getattr(reader, "upsampling", 1.0)
            logger.info(
                "section %s at scale %g: %d px at %g um/px (%g um), %.0f %% inside the image%s.",
                section.name, scale, at.tile_px, at.mpp, at.side_um, 100 * float(np.mean(reader.inside)),
                f", interpolated {coarse:.2f} times" if coarse > 1 else "",
            )  # fmt: skip
        found.append(readers)
    return found


def cached_scales(
    stream: TileSource,
    sections: Sequence[Section],
    spec: TileSpec,
    scales: Sequence[float],
    max_memory: int,
    mine: np.ndarray | None = None,
) -> list[TileSource]:
    """Return the tiles of `stream`, then those of every further scale, read once; together within `max_memory`.

    With `mine`, numbers of tiles, only those are read and there.
    """
    sources = [stream, *further_streams(sections, spec, scales)]
    share = max(1, max_memory // len(sources))
    if mine is None:
        return [cached(source, max_memory=share) for source in sources]
    return [TilesOfSome(cached(TileSubset(source, mine), max_memory=share), mine, source.n) for source in sources]


def by_label(values: Any, names: pd.Index, argument: str) -> Any:
    """Return a Series in the order of `names`, joined by its index; anything else, or a Series without one, as it is.

    Raises
    ------
    ValueError
        If the index holds other names.
    """
    if not isinstance(values, pd.Series) or isinstance(values.index, pd.RangeIndex):
        return values
    if not values.index.is_unique or set(values.index) != set(names):
        raise ValueError(
            f"The index of the Series `{argument}` does not hold the table's names: it has "
            f"{list(values.index[:3])}, the table {list(names[:3])}. Give a Series with the table's index, or an array."
        )
    return values.loc[names]


def is_boolean(values: Any) -> bool:
    """Tell whether a column or array is boolean, nullable ones without missing values included."""
    return bool(pd.api.types.is_bool_dtype(values) and not pd.isna(values).any())


def training_mask(adata: AnnData, train: Any) -> np.ndarray:
    """Return which rows train: `train` is None (all), a boolean mask, an obs key, or a list of sections.

    Raises
    ------
    KeyError
        If the obs key or a section is not there.
    ValueError
        If a mask is of the wrong length or type, or nothing is left.
    """
    if train is None:
        return np.ones(adata.n_obs, dtype=bool)
    if isinstance(train, str):
        if train not in adata.obs:
            raise KeyError(
                f"`train={train!r}` is no column of `obs`: {list(adata.obs)}. To train on a section, give a list: "
                f"`train=[{train!r}]`."
            )
        column = adata.obs[train]
        if not is_boolean(column):
            raise ValueError(f"`obs[{train!r}]` has dtype {column.dtype}; `train=` needs a boolean column.")
        mask = column.to_numpy(dtype=bool)
    else:
        train = by_label(train, adata.obs_names, "train=")
        values = list(train) if not isinstance(train, np.ndarray | pd.Series) else np.asarray(train)
        if len(values) and all(isinstance(v, bool | np.bool_) for v in values):
            mask = np.asarray(values, dtype=bool)
            if mask.shape != (adata.n_obs,):
                raise ValueError(f"The mask `train=` has length {len(mask)}, the table has {adata.n_obs} rows.")
        else:
            mask = _in_sections(adata, values)
    if not mask.any():
        raise ValueError("`train=` leaves no spots to train on.")
    return mask


def _in_sections(adata: AnnData, wanted: Iterable[Any]) -> np.ndarray:
    regions = section_labels(adata)
    named = adata.obs[SECTION].astype(str).to_numpy(dtype=object) if SECTION in adata.obs else regions
    mask = np.zeros(adata.n_obs, dtype=bool)
    for section in wanted:
        rows = (regions == section) | (named == section)
        if not rows.any():
            there = sorted({*map(str, regions), *map(str, named)})
            raise KeyError(f"`train=` names the section {section!r}, which is not there. Sections: {there}.")
        mask |= rows
    return mask


def obs_groups(adata: AnnData, groups: str | None, rows: np.ndarray) -> np.ndarray:
    """Return the group of table rows `rows`: a column of obs, or their section.

    Raises
    ------
    KeyError
        If the column is not there.
    ValueError
        If a row has no group.
    """
    if groups is None:
        return section_labels(adata)[rows]
    if groups not in adata.obs:
        raise KeyError(f"`groups={groups!r}` not found in `obs`. Available columns: {list(adata.obs)}.")
    column = adata.obs[groups].iloc[rows]
    if column.isna().any():
        raise ValueError(f"{int(column.isna().sum())} training rows have no group in `obs[{groups!r}]`.")
    return column.astype(str).to_numpy(dtype=object)


def default_groups(adata: AnnData, rows: np.ndarray) -> str | None:
    """Return the column that is held out by default: patients, if rows `rows` have two or more; None means sections.

    Sections of one patient are near-duplicate tissue, so whoever names patients has them held out whole.
    """
    if PATIENT not in adata.obs:
        return None
    column = adata.obs[PATIENT].iloc[rows]
    if column.nunique() < 2:
        return None
    if column.isna().any():
        raise ValueError(
            f"{int(column.isna().sum())} spots have no patient in `obs[{PATIENT!r}]`, others have: fill it, leave "
            "them out, or say what to hold out with `groups=`."
        )
    return PATIENT


def seen(expression: Matrix) -> np.ndarray:
    """Return the fraction of rows in which each column is above 0."""
    counts = (expression > 0).sum(axis=0)  # a zero that is stored was not seen
    return np.asarray(counts).ravel() / expression.shape[0]


def expressed_genes(expression: Matrix, groups: np.ndarray) -> np.ndarray:
    """Return positions of genes seen in at least a tenth of the rows of every group."""
    keep = np.all([seen(expression[groups == group]) >= SEEN_IN for group in np.unique(groups)], axis=0)
    return np.flatnonzero(keep)


def wanted_genes(adata: AnnData, names: np.ndarray, genes: Any) -> np.ndarray:
    """Return positions of the genes asked for: a list of names, a boolean mask, or a boolean column of var.

    Raises
    ------
    KeyError
        If a gene or the column is not there.
    ValueError
        If none of the genes is there, or the mask does not fit.
    """
    if isinstance(genes, str):
        if genes not in adata.var or not is_boolean(adata.var[genes]):
            columns = [c for c in adata.var if is_boolean(adata.var[c])]
            raise KeyError(f"`genes={genes!r}` is no boolean column of `var` (there are: {columns}). Or give a list.")
        return _chosen(adata.var[genes].to_numpy(dtype=bool))
    if isinstance(genes, pd.Series) and is_boolean(genes):
        genes = by_label(genes, adata.var_names, "genes=").to_numpy(dtype=bool)
    values = np.asarray(genes)
    if values.dtype == bool:
        if values.shape != (adata.n_vars,):
            raise ValueError(f"The mask `genes=` has shape {values.shape}, the table has {adata.n_vars} genes.")
        return _chosen(values)
    asked = [str(gene) for gene in values]
    if not asked:
        raise ValueError("`genes=` is empty.")
    position = gene_positions(names, asked)
    missing = [gene for gene, at in zip(asked, position, strict=True) if at < 0]
    if len(missing) == len(asked):
        raise ValueError(no_overlap_message(names, asked, adata))
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(asked)} genes asked for are not in the table: {missing[:5]}."
            f"{close_genes(missing[0], names)}"
        )
    return np.unique(position)


def _chosen(mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        raise ValueError("`genes=` is empty: the mask holds no True.")
    return np.flatnonzero(mask)


def places(sections: Iterable[Section]) -> dict[str, np.ndarray]:
    """Return the tile centres of every image, by what it shows: (n, 2) x, y in level-0 pixels.

    Neither the section's name nor its pixel size is part of it: the same tissue under another name stays known.
    """
    found: dict[str, list[np.ndarray]] = {}
    for section in sections:
        for name in section.picture_ids():
            found.setdefault(name, []).append(section.centres_px)
    return {name: np.concatenate(centres) for name, centres in found.items()}


def trained_rows(sections: Iterable[Section], side_um: float, trained_on: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the table rows whose centre lies within half a tile (the widest that is read) of a trained one's."""
    rows = [np.empty(0, dtype=np.int64)]
    for section in sections:
        known = [trained_on[name] for name in section.picture_ids() if name in trained_on]
        if not known:
            continue
        # on the coarser of an anisotropic pixel's two sides: rather a spot too many than a leak
        side_px = side_um * np.linalg.norm(section.um_to_px, axis=1).max()
        rows.append(section.rows[cKDTree(np.concatenate(known)).query(section.centres_px)[0] < side_px / 2])
    return np.concatenate(rows)


def by_row(features: np.ndarray, rows: np.ndarray, n_obs: int) -> np.ndarray:
    """Return `features` at table rows `rows`, NaN elsewhere."""
    out = np.full((n_obs, features.shape[1]), np.nan, dtype=np.float32)
    out[rows] = features
    return out
