"""Targets that are no genes: columns of an obsm, such as cell-type proportions, pathway scores or an embedding."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from pandas.api import types
from scipy import sparse

from pekasc._keys import UNS, check_key, read_uns, target_key
from pekasc._warnings import warn_user

_FORM = '`target={"obsm": key}`'


def obsm_of(target: Any) -> str | None:
    """Return the key of an argument ``target={"obsm": key}``, None for a scale of genes.

    Raises
    ------
    TypeError, ValueError
        If it is a mapping of another form.
    """
    if not isinstance(target, Mapping):
        return None
    if set(target) != {"obsm"}:
        raise ValueError(f"`target={dict(target)!r}` is not known: a target that is no gene is {_FORM}.")
    return check_key(target["obsm"], argument="target")


def target_label(key: str) -> str:
    """Return how records and prints name the target."""
    return f"obsm[{key!r}]"


def obsm_columns(table: AnnData, key: str, *, argument: str = "target") -> pd.DataFrame:
    """Return ``obsm[key]`` as float64, with the names of its columns: those of a DataFrame, else "0", "1", ...

    Values may be NaN or infinite.

    Raises
    ------
    KeyError
        If it is not there.
    ValueError
        If it is no table of numbers, or the names of its columns are not unique.
    """
    if key not in table.obsm:
        near = difflib.get_close_matches(key, list(table.obsm), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"`{argument}`: obsm[{key!r}] is not in the table.{hint} Available keys: {list(table.obsm)}.")
    values, name = table.obsm[key], f"obsm[{key!r}]"
    if isinstance(values, pd.DataFrame):
        names = [str(column) for column in values.columns]
        wrong = {str(c): str(t) for c, t in values.dtypes.items() if not (types.is_numeric_dtype(t) and _is_real(t))}
        if wrong:
            raise ValueError(
                f"{name} has {len(wrong)} columns that are no numbers: {dict(list(wrong.items())[:3])}. Drop them, or "
                "put one column of 0 and 1 for each of their values in their place (`pandas.get_dummies`)."
            )
        array = values.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        array = _array(values, name)
        names = [str(i) for i in range(array.shape[1])]
    if not names:
        raise ValueError(f"{name} has no columns, so there is nothing to predict.")
    _check_names(names, name)
    return pd.DataFrame(array, index=table.obs_names, columns=names)


def _is_real(dtype: Any) -> bool:
    return not types.is_complex_dtype(dtype)


def _array(values: Any, name: str) -> np.ndarray:
    for read in ("to_memory", "compute"):
        values = getattr(values, read)() if hasattr(values, read) else values
    array = np.asarray(values.toarray() if sparse.issparse(values) else values)
    if array.ndim != 2:
        raise ValueError(
            f"{name} has shape {array.shape}: a target has one row a spot and one or several columns. Give a single "
            "column as `obsm[key] = values.reshape(-1, 1)`, or as a DataFrame, which names it."
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {array.dtype}: numbers are needed.")
    return array.astype(np.float64)


def _check_names(names: list[str], name: str) -> None:
    seen = pd.Index(names)
    twice = seen[seen.duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{name} names {len(twice)} columns more than once (such as {list(twice[:3])}): drop or rename the "
            "duplicates first."
        )
    if "" in names:
        raise ValueError(f"{name} has a column without a name: name it first.")


def training_target(table: AnnData, key: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of the columns of ``obsm[key]``, and their values in the training spots, float32.

    Raises
    ------
    KeyError, ValueError
        As for :func:`obsm_columns`; if values are NaN or infinite, or every column is constant.
    """
    frame = obsm_columns(table, key)
    with np.errstate(over="ignore"):
        values = frame.to_numpy()[rows].astype(np.float32)
    finite = np.isfinite(values)
    bad = int((~finite.all(axis=1)).sum())
    if bad:
        columns = list(frame.columns[~finite.all(axis=0)])
        raise ValueError(
            f"obsm[{key!r}] is NaN or infinite in {bad} of the {rows.size} training spots (columns {columns[:3]}"
            f"{', ...' if len(columns) > 3 else ''}). Leave these spots out, "
            f'`train=np.isfinite(np.asarray(sdata["table"].obsm[{key!r}], dtype=float)).all(axis=1)`, or fill in what '
            "is missing."
        )
    if not (np.ptp(values, axis=0) > 0).any():
        raise ValueError(
            f"Every column of obsm[{key!r}] is constant over the {rows.size} training spots: there is nothing to learn."
        )
    slashes = [name for name in frame if "/" in name]
    if slashes:
        warn_user(
            f"{len(slashes)} columns of obsm[{key!r}] have a slash in their name (such as {slashes[0]!r}), and AnnData "
            "does not write those: rename them before the object is to be saved."
        )
    return frame.columns.to_numpy(dtype=object), values


def recorded_targets(table: AnnData, key_added: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the targets that were predicted under `key_added`: the key of their obsm, and the record."""
    for name in table.uns.get(UNS, {}):
        record = read_uns(table, name)
        if not isinstance(record, Mapping) or record.get("kind") != "prediction" or "obsm" not in record:
            continue
        if record["key_added"] == key_added and name in table.obsm:
            yield str(record["obsm"]), record


def predicted_target(table: AnnData, key_added: str, key: str) -> pd.DataFrame:
    """Return the predicted columns of a target, NaN in rows that were not predicted.

    Raises
    ------
    KeyError
        If there are none.
    """
    name = target_key(key_added, key)
    if name not in table.obsm:
        there = [target for target, _ in recorded_targets(table, key_added)]
        raise KeyError(
            f"obsm[{name!r}] not found: there are no predictions of {key!r}. Targets predicted under {key_added!r}: "
            f"{there}. `pekasc.tl.predict_expression` writes them, with an adapter of `target={{'obsm': {key!r}}}`."
        )
    return obsm_columns(table, name)


def measured_target(table: AnnData, key: str, columns: pd.Index, *, argument: str = "target") -> np.ndarray:
    """Return the measured values of predicted columns, (n, columns); NaN in spots without them.

    Raises
    ------
    KeyError
        If they are not in the table, or lack some of the columns.
    """
    frame = obsm_columns(table, key, argument=argument)
    missing = columns.difference(frame.columns, sort=False)
    if len(missing):
        raise KeyError(
            f"obsm[{key!r}] lacks {len(missing)} of the {len(columns)} predicted columns: {list(missing[:3])}. It has "
            f"{list(frame.columns[:5])}."
        )
    values = frame[columns].to_numpy()
    return np.where(np.isfinite(values).all(axis=1, keepdims=True), values, np.nan)


def target_column(table: AnnData, key_added: str, name: str) -> tuple[str, str] | None:
    """Return key and column of a name ``"key:column"`` of a predicted target; None if it is that of a gene."""
    key, colon, column = name.partition(":")
    if not colon or name in table.var_names:
        return None
    return (key, column) if key in table.obsm or any(recorded_targets(table, key_added)) else None


def predicted_column(table: AnnData, key_added: str, key: str, column: str) -> np.ndarray:
    """Return a predicted column of a target, (n,); NaN in rows that were not predicted.

    Raises
    ------
    KeyError
        If there is no such target or column.
    """
    frame = predicted_target(table, key_added, key)
    if column not in frame:
        near = difflib.get_close_matches(column, list(frame), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        name = target_key(key_added, key)
        raise KeyError(f"obsm[{name!r}] has no column {column!r}.{hint} It has {list(frame)[:8]}.")
    return frame[column].to_numpy()
