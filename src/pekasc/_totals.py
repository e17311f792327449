"""Totals recorded at prediction, and whether they belong to the counts at hand, when genes have left the table.

Beside a row's total stand a few of its counts, drawn at random: those of genes that are still there must be the same
now. They are kept per row, so that they stay when rows leave too, and when joining objects drops ``uns``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from pekasc._digests import sha256
from pekasc._expression import Matrix, count_totals, find_counts, gene_columns, of_genes
from pekasc._keys import total_check_key, total_key
from pekasc._settings import get_logger
from pekasc._warnings import warn_user

logger = get_logger(__name__)

_ROUNDING = 1e-6  # relative, of a total
_DRAWN = 65_536  # counts of a table, of which few belong to genes that stay; per row, 4 to 64
_BATCH = 4096  # rows whose counts are copied at a time
_COMPARED = 100_000  # counts; more would say nothing new


def totals_to_record(
    table: AnnData, layer: str | None, columns: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | None:
    """Return totals of all rows, some of their counts, and the record: layer of the counts and number of genes.

    Totals are (n,) float64; counts are (n, 8 to 128) float64, a number for a gene's name followed by its count, and so
    on, NaN in rows without any. Totals are over the genes of the table, or over `columns`, whose names are recorded:
    ``total_genes``. None if the table has no counts, since nothing was measured there.
    """
    if table.X is None and not table.layers:
        return None
    try:
        raw, name = find_counts(table, layer if layer in table.layers else None)
    except ValueError:
        return None
    record: dict[str, Any] = {"counts_layer": name}
    if columns is None:
        columns = gene_columns(table)
    else:
        record["total_genes"] = [str(gene) for gene in table.var_names[columns]]
    drawn = _draw(raw, columns, _numbers(table))
    return count_totals(raw, columns), drawn, {**record, "n_genes_in_total": int(columns.size)}


def recorded_totals(table: AnnData, key: str, record: Mapping[str, Any], raw: Matrix) -> np.ndarray:
    """Return the totals over the genes there were at prediction, if they are recorded and belong to these counts."""
    columns = gene_columns(table)
    if "total_genes" in record:  # of an adapter whose training sections measured different genes
        columns = columns[table.var_names[columns].isin(record["total_genes"])]
    now = count_totals(raw, columns)
    n_then = record.get("n_genes_in_total")
    column = total_key(key)
    if n_then == columns.size:  # whatever the counts are, they are all there
        return now
    if column not in table.obs:
        if n_then is not None:
            _warn(key, f"`obs[{column!r}]` with the totals over {n_then} genes has gone, {columns.size} genes are left")
        return now
    then = table.obs[column].to_numpy(dtype=np.float64)
    known = np.isfinite(then)
    if np.allclose(now[known], then[known], rtol=_ROUNDING, atol=0):
        return now
    if (now > then * (1 + _ROUNDING))[known].any():
        _warn(key, f"the totals recorded in `obs[{column!r}]` are below those of the counts, so they do not fit them")
        return now
    same = _same_counts(table, key, raw, columns, known)
    if not same.all():
        _warn(
            key,
            f"{int((~same).sum())} of {same.size} counts compared are not what they were when the totals in "
            f"`obs[{column!r}]` were recorded, so the totals are taken anew over the {columns.size} genes left",
        )
        return now
    if same.size:
        logger.hint("Totals are those of the genes there were at prediction (obs[%r]).", column)
    else:
        _warn(
            key,
            f"nothing is left to tell whether the totals recorded in `obs[{column!r}]`, which are used, are of these "
            f"counts: `obsm[{total_check_key(key)!r}]` or all of its genes have gone",
        )
    return np.where(known, then, now)


def _numbers(table: AnnData) -> np.ndarray:
    """Return a number for the name of every column, which a float64 holds; -1 where a name is there twice."""
    names = table.var_names
    numbers = np.array([int(sha256(str(name))[:13], 16) for name in names], dtype=np.float64)
    return np.where(names.duplicated(keep=False), -1, numbers)


def _draw(raw: Matrix, columns: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return numbers of genes and their counts, in turn, of counts above 0 drawn at random from every row."""
    rng = np.random.default_rng(0)
    columns = columns[numbers[columns] >= 0]
    per_row = int(np.clip(_DRAWN // max(raw.shape[0], 1), 4, 64))
    out = np.full((raw.shape[0], 2 * per_row), np.nan)
    for start in range(0, raw.shape[0], _BATCH):
        part = sparse.csr_matrix(of_genes(raw[start : start + _BATCH], columns))
        n = np.diff(part.indptr)
        rows = np.flatnonzero(n)
        at = part.indptr[rows, None] + (rng.random((rows.size, per_row)) * n[rows, None]).astype(np.int64)
        out[start + rows, ::2] = numbers[columns[part.indices[at]]]
        out[start + rows, 1::2] = part.data[at]
    return out


def _same_counts(table: AnnData, key: str, raw: Matrix, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Tell of the recorded counts in `rows` whose gene is still there, whether they are the same now."""
    drawn = table.obsm.get(total_check_key(key))
    if not isinstance(drawn, np.ndarray) or drawn.ndim != 2 or not columns.size:
        return np.empty(0, dtype=bool)
    numbers = _numbers(table)[columns]
    order = np.argsort(numbers)
    wanted = drawn[:, ::2]
    at = order[np.minimum(np.searchsorted(numbers, wanted, sorter=order), order.size - 1)]
    row, turn = np.nonzero((numbers[at] == wanted) & rows[:, None])
    every = max(1, row.size // _COMPARED)
    row, turn = row[::every], turn[::every]
    found = np.asarray(raw[row, columns[at[row, turn]]]).ravel()
    return np.asarray(found == drawn[row, 2 * turn + 1])


def _warn(key: str, why: str) -> None:
    warn_user(
        f"Measured values are compared with layers[{key!r}] as log1p(1e4 * count / total), but {why}. Predict again, "
        "or score a table with all genes."
    )
