"""`pp.split`: folds that keep groups together."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import did_you_mean
from pekasc._keys import FOLD, check_free, check_key, write_uns
from pekasc._sections import check_table, examples, get_table, writable_table


def split(
    data: SpatialData | AnnData,
    *,
    groups: str,
    n_folds: int | None = None,
    key_added: str = FOLD,
    table_name: str = "table",
) -> None:
    """Assign every observation to a fold, such that no group is in two folds.

    Spots of one section or patient are nearly duplicates of each other, so folds of random spots give scores that do
    not hold for a new patient.

    Parameters
    ----------
    data
        A SpatialData or an AnnData.
    groups
        Column of `obs` with the groups to keep together, usually the patient.
    n_folds
        Number of folds, balanced by number of observations. None makes one fold per group (leave-one-group-out), in
        sorted order.
    key_added
        Column of `obs` for the folds.
    table_name
        Name of the table in a SpatialData.

    Returns
    -------
    None, and writes

    ``obs[key_added]``
        Number of the fold in which the row is held out, int64, from 0.
    ``uns["pekasc"][key_added]``
        `groups` and the number of folds.

    Raises
    ------
    KeyError
        If the table or column is not there.
    ValueError
        If rows have no group, or there are fewer groups than two or than `n_folds`.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=600)
    >>> pk.pp.split(sdata, groups="patient")
    >>> sorted(int(fold) for fold in sdata["table"].obs["fold"].unique())
    [0, 1, 2]
    """
    check_key(key_added)
    table = get_table(data, table_name)
    check_table(table)
    if groups not in table.obs:
        close = did_you_mean(groups, table.obs)
        raise KeyError(f"Groups {groups!r} not found in `obs`.{close} Available columns: {list(table.obs)}.")
    if key_added == groups:
        raise ValueError(f"`key_added={key_added!r}` would overwrite the groups. Take another name.")
    check_free(table, key_added, "split", slot="obs")
    column = table.obs[groups]
    if column.isna().any():
        missing = table.obs_names[column.isna()]
        raise ValueError(
            f"{len(missing)} rows have no group in `obs[{groups!r}]`: {examples(missing)}. Fill it, or leave these "
            "rows out."
        )
    try:
        codes, names = pd.factorize(
            column.astype(column.cat.categories.dtype) if column.dtype == "category" else column, sort=True
        )
    except TypeError as error:
        raise ValueError(f"`obs[{groups!r}]` must hold names or numbers of groups: {error}.") from error
    if len(names) < 2:
        raise ValueError(
            f"`obs[{groups!r}]` has a single group, {examples(names)}: nothing to hold out. Name a column with two "
            "or more."
        )
    if n_folds is not None:
        codes = _balanced(codes, len(names), n_folds, groups)
    table = writable_table(data, table_name)
    table.obs[key_added] = codes.astype(np.int64)
    write_uns(table, key_added, {"groups": groups, "n_folds": int(codes.max()) + 1}, kind="split")


def _balanced(codes: np.ndarray, n_groups: int, n_folds: int, groups: str) -> np.ndarray:
    from sklearn.model_selection import GroupKFold

    if isinstance(n_folds, bool) or not isinstance(n_folds, Integral):
        raise TypeError(f"`n_folds` must be an integer, got {n_folds!r}.")
    if n_folds < 2 or n_folds > n_groups:
        raise ValueError(f"`n_folds={n_folds}` must be between 2 and {n_groups}, the number of groups in {groups!r}.")
    folds = np.empty(codes.size, dtype=np.int64)
    for fold, (_, held_out) in enumerate(GroupKFold(n_splits=int(n_folds)).split(codes, groups=codes)):
        folds[held_out] = fold
    return folds
