"""Read what pekasc needs of an AnnData file: names, a few columns, centres and counts; the rest is not looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pekasc._h5 import H5File, opened

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_SPARSE = ("csr_matrix", "csc_matrix")


@dataclass
class Expression:
    """Names of rows and genes, columns of ``obs``, centres (n, 2) and counts (rows x genes, float32 CSR)."""

    rows: np.ndarray
    genes: np.ndarray
    obs: pd.DataFrame
    spatial: np.ndarray
    counts: csr_matrix


def read_h5ad(path: Path, columns: Sequence[str]) -> Expression:
    """Read an AnnData file without anything that could run code, or take more memory than the file accounts for.

    Parameters
    ----------
    path
        The file.
    columns
        Columns of ``obs`` to read, where they are there.

    Raises
    ------
    ValueError
        If it is damaged, or lacks something; the message names the file.
    """
    with opened(path) as file:
        for name in ("X", "obs", "var", "obsm/spatial"):
            if not file.is_there(name):
                raise file.wrong(
                    name, "is missing" + (": there are no spot centres" if name.startswith("obsm") else "")
                )
        rows, genes = _index(file, "obs"), _index(file, "var")
        obs = pd.DataFrame(index=pd.RangeIndex(len(rows)))
        for column in columns:
            if file.is_there(f"obs/{column}"):
                obs[column] = _column(file, f"obs/{column}", len(rows))
        spatial = file.numbers("obsm/spatial", 2)
        if len(spatial) != len(rows) or spatial.shape[1] < 2:
            raise file.wrong("obsm/spatial", f"has shape {spatial.shape} for {len(rows)} rows")
        counts = _counts(file, (len(rows), len(genes)))
    return Expression(rows, genes, obs, spatial[:, :2].astype(np.float64), counts)


def _index(file: H5File, name: str) -> np.ndarray:
    if not file.is_group(name):
        raise file.wrong(name, "is no table as anndata writes it since 0.7: read and write the file with anndata")
    index = file.attribute(name, "_index")
    if index is None:
        index = "_index"
    if not isinstance(index, str) or "/" in index:
        raise file.wrong(name, f"names no column as its index, but {index!r}")
    part = f"{name}/{index}"
    if file.is_group(part):  # strings that may be missing
        part += "/values"
    if not file.is_there(part):
        raise file.wrong(part, "is missing")
    return file.strings(part)


def _values(file: H5File, name: str) -> np.ndarray:
    """Return a column of numbers or strings."""
    return file.numbers(name, 1) if file.dataset(name).dtype.kind in "biuf" else file.strings(name)


def _column(file: H5File, name: str, n: int) -> pd.Series:
    """Return a column: plain, categorical, or with missing values."""
    if not file.is_group(name):
        if file.attribute(name, "categories") is not None:
            raise file.wrong(name, "is written as by anndata before 0.8: read and write the file with anndata")
        values: pd.Series = pd.Series(_values(file, name))
    elif file.is_there(f"{name}/codes"):
        codes, categories = file.numbers(f"{name}/codes", 1, "iu"), _values(file, f"{name}/categories")
        if codes.size and (codes.max() >= len(categories) or codes.min() < -1):
            raise file.wrong(name, f"has codes that are none of its {len(categories)} categories")
        values = pd.Series(categories, dtype=object).reindex(codes).reset_index(drop=True)
    elif file.is_there(f"{name}/values") and file.is_there(f"{name}/mask"):
        values, missing = pd.Series(_values(file, f"{name}/values"), dtype=object), file.numbers(f"{name}/mask", 1)
        if len(missing) != len(values):
            raise file.wrong(name, f"has {len(values)} values and {len(missing)} marks of missing ones")
        values = values.mask(missing.astype(bool))
    else:
        raise file.wrong(name, "is no column of anndata")
    if len(values) != n:
        raise file.wrong(name, f"has {len(values)} values for {n} rows")
    return values


def _counts(file: H5File, shape: tuple[int, int]) -> csr_matrix:
    from scipy.sparse import csc_matrix, csr_matrix

    if not file.is_group("X"):
        dense = file.numbers("X", 2)
        if dense.shape != shape:
            raise file.wrong("X", f"has shape {dense.shape} for {shape[0]} rows and {shape[1]} genes")
        return csr_matrix(dense.astype(np.float32))
    kind = file.attribute("X", "encoding-type")
    stated = file.attribute("X", "shape")
    if kind not in _SPARSE:
        raise file.wrong("X", f"must be one of {list(_SPARSE)} or an array, got {kind!r}")
    if not np.array_equal(np.asarray(stated), shape):
        raise file.wrong("X", f"has shape {stated} for {shape[0]} rows and {shape[1]} genes")
    for part in ("data", "indices", "indptr"):
        if not file.is_there(f"X/{part}"):
            raise file.wrong(f"X/{part}", "is missing")
    data, indices, indptr = (
        file.numbers("X/data", 1),
        file.numbers("X/indices", 1, "iu"),
        file.numbers("X/indptr", 1, "iu"),
    )
    n_major, n_minor = shape if kind == "csr_matrix" else shape[::-1]
    if len(indptr) != n_major + 1 or int(indptr[0]) != 0 or (np.diff(indptr.astype(np.int64)) < 0).any():
        raise file.wrong("X/indptr", f"does not divide the values among {n_major} rows")
    if not int(indptr[-1]) == len(data) == len(indices):
        raise file.wrong("X", f"has {len(data)} values, {len(indices)} indices, and {indptr[-1]} by its indptr")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n_minor:
        raise file.wrong("X/indices", f"has indices beyond {n_minor} columns")
    made = (csr_matrix if kind == "csr_matrix" else csc_matrix)((data.astype(np.float32), indices, indptr), shape=shape)
    return made.tocsr()
