"""What the tools share in reading sections: tiles (made if need be), training rows, genes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from pekasc import pp
from pekasc._expression import Matrix, close_genes, gene_positions, no_overlap_message
from pekasc._keys import SECTION, TILE_INSIDE, UNS
from pekasc._sections import (
    Section,
    get_table,
    section_labels,
    section_readers,
    tile_record,
    tiled_sections,
)
from pekasc.tiling import TileSource, TileSpec, TileStream

logger = logging.getLogger(__name__)

SEEN_IN = 0.1


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
        logger.info("Tiled: %d px at %g um/px.", made[1].tile_px, made[1].mpp)
        return made
    if given:
        raise ValueError(
            f"{sorted(given)} say how to tile, but the table has tiles {key!r} already. Leave them out, or run "
            "`pekasc.pp.tile` with them."
        )
    sections, there = tiled_sections(sdata, table_name=table_name, key=key)
    if spec is not None and there != spec:
        logger.info("Using the tiles %r that are there: %d px at %g um/px.", key, there.tile_px, there.mpp)
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
        if column.dtype != bool:
            raise ValueError(f"`obs[{train!r}]` has dtype {column.dtype}; `train=` needs a boolean column.")
        mask = column.to_numpy()
    else:
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


def seen(expression: Matrix) -> np.ndarray:
    """Return the fraction of rows in which each column is above 0."""
    counts = expression.getnnz(axis=0) if sparse.issparse(expression) else (expression > 0).sum(axis=0)
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
        if genes not in adata.var or adata.var[genes].dtype != bool:
            columns = [c for c in adata.var if adata.var[c].dtype == bool]
            raise KeyError(f"`genes={genes!r}` is no boolean column of `var` (there are: {columns}). Or give a list.")
        return np.flatnonzero(adata.var[genes].to_numpy())
    values = np.asarray(genes)
    if values.dtype == bool:
        if values.shape != (adata.n_vars,):
            raise ValueError(f"The mask `genes=` has shape {values.shape}, the table has {adata.n_vars} genes.")
        return np.flatnonzero(values)
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


def fingerprints(sections: Iterable[Section], rows: np.ndarray) -> np.ndarray:
    """Return a 64-bit fingerprint of the spots at table `rows`: section, instance id and place in um."""
    wanted = set(rows.tolist())
    out = []
    for section in sections:
        for row, identity, (x, y) in zip(section.rows, section.ids, section.centres_um, strict=True):
            if int(row) in wanted:
                text = f"{section.name}|{identity}|{x:.1f}|{y:.1f}"
                out.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    return np.array(out, dtype=np.uint64)


def by_row(features: np.ndarray, rows: np.ndarray, n_obs: int) -> np.ndarray:
    """Return `features` at table rows `rows`, NaN elsewhere."""
    out = np.full((n_obs, features.shape[1]), np.nan, dtype=np.float32)
    out[rows] = features
    return out
