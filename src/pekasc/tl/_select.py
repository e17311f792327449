"""Turn the arguments `train`, `groups` and `genes` into rows, labels and columns of the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pekasc._expression import close_genes, did_you_mean, gene_positions, no_overlap_message
from pekasc._keys import PATIENT, SECTION
from pekasc._sections import section_labels
from pekasc._settings import get_logger

logger = get_logger(__name__)


def by_label(values: Any, names: pd.Index, argument: str) -> Any:
    """Return a Series reordered to `names` by its index; other values, or a Series with a range index, unchanged.

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
        raise ValueError(
            f"`train=` leaves no spots of {adata.n_obs} to train on: the mask holds no True, or the named sections "
            "have no rows."
        )
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
        close = did_you_mean(groups, adata.obs)
        raise KeyError(f"`groups={groups!r}` not found in `obs`.{close} Available columns: {list(adata.obs)}.")
    column = adata.obs[groups].iloc[rows]
    if column.isna().any():
        raise ValueError(
            f"{int(column.isna().sum())} training rows have no group in `obs[{groups!r}]`: fill it, or leave them "
            "out (`train=`)."
        )
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


def wanted_genes(
    adata: AnnData, names: np.ndarray, genes: Any, columns: np.ndarray, argument: str = "genes"
) -> np.ndarray:
    """Return the indices in `names` of `genes`: a list of names, a boolean mask, or a boolean column of var.

    `columns` are the columns of the table that `names` are of; others are no genes (antibody counts, controls).
    `argument` is the caller's argument, for errors.

    Raises
    ------
    KeyError
        If a gene or the column is not there.
    ValueError
        If none of the genes is there, one is no gene, or the mask has a wrong length.
    """
    if isinstance(genes, str):
        if genes not in adata.var or not is_boolean(adata.var[genes]):
            there = [c for c in adata.var if is_boolean(adata.var[c])]
            raise KeyError(
                f"`{argument}={genes!r}` is no boolean column of `var` (there are: {there}). Or give a list."
            )
        return _chosen(adata.var[genes].to_numpy(dtype=bool), columns, argument)
    if isinstance(genes, pd.Series) and is_boolean(genes):
        genes = by_label(genes, adata.var_names, f"{argument}=").to_numpy(dtype=bool)
    values = np.asarray(genes)
    if values.dtype == bool:
        if values.shape != (adata.n_vars,):
            raise ValueError(f"The mask `{argument}=` has shape {values.shape}, the table has {adata.n_vars} genes.")
        return _chosen(values, columns, argument)
    wanted = [str(gene) for gene in values]
    if not wanted:
        raise ValueError(f"`{argument}=` is empty: name at least one gene, or leave it out.")
    position = gene_positions(names, wanted)
    missing = [gene for gene, at in zip(wanted, position, strict=True) if at < 0]
    others = sorted(set(missing) & set(adata.var_names.drop(adata.var_names[columns])))
    if others:
        kinds = sorted(set(adata.var.loc[others, "feature_types"].astype(str)))
        raise ValueError(
            f"{len(others)} of the {len(wanted)} genes asked for are no gene expression by "
            f'`var["feature_types"]`: {others[:3]} ({", ".join(kinds)}). Leave them out.'
        )
    if len(missing) == len(wanted):
        where = "" if argument == "genes" else f"`{argument}=`: "
        raise ValueError(where + no_overlap_message(names, wanted, adata))
    if missing:
        raise KeyError(
            f"`{argument}=`: {len(missing)} of {len(wanted)} genes asked for are not in the table: {missing[:5]}."
            f"{close_genes(missing[0], names)}"
        )
    return np.unique(position)


def _chosen(mask: np.ndarray, columns: np.ndarray, argument: str) -> np.ndarray:
    if not mask[columns].any():
        raise ValueError(
            f"`{argument}=` is empty: the mask holds no True for a gene of the table's expression. Give one that "
            "does, or leave it out."
        )
    n_others = int(mask.sum() - mask[columns].sum())
    if n_others:
        logger.hint(
            '%d of `%s=` are no gene expression by `var["feature_types"]` and are left out.', n_others, argument
        )
    return np.flatnonzero(mask[columns])
