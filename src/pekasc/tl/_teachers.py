"""Make or read the teacher of a table's spots, for `embed_expression`, `fit_adapter` and `cross_validate`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from pekasc._expression import Matrix
from pekasc._keys import feature_key, read_uns
from pekasc._settings import get_logger
from pekasc.models import Teacher
from pekasc.models.teachers import MAX_TOKENS, TEACHERS, Source, StoredTeacher, TeacherModel, check_files

logger = get_logger(__name__)


def stored_key(adata: AnnData, teacher: Teacher) -> str | None:
    """Return the key in obsm with the embedding of `teacher`, or None if it has to be computed.

    A teacher that needs model files, such as scFoundation, is read from obsm if no files are given.

    Raises
    ------
    KeyError
        If it is neither in the registry nor in obsm.
    ValueError
        If its files are missing, or given for a teacher that needs none.
    """
    name = teacher.name
    if name in TEACHERS:
        key = feature_key(name)
        if TEACHERS[name].files and teacher.files is None and key in adata.obsm:
            return key
        check_files(teacher)
        return None
    found = next((key for key in (name, f"X_{name}") if key in adata.obsm), None)
    if found is None:
        raise KeyError(
            f"`teacher={name!r}` is neither one of {list(TEACHERS)} nor a key of `obsm`: {list(adata.obsm)}. "
            "Compute it first with `pekasc.tl.embed_expression`, or store an embedding there."
        )
    if teacher.files is not None:
        raise ValueError(f"`teacher={name!r}` is read from `obsm[{found!r}]`: leave `files=` out.")
    return found


def check_installed(teacher: str) -> None:
    """Check that the package of a teacher is installed, now and not after an hour of embedding.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    row = TEACHERS.get(teacher)
    if row is not None and row.require is not None:
        row.require()


def _record(adata: AnnData, key: str) -> dict[str, Any]:
    record = read_uns(adata, key)
    return record if isinstance(record, dict) else {}


def fitted_here(adata: AnnData, key: str) -> dict[str, Any] | None:
    """Return the record of an embedding in ``obsm[key]`` that was fitted on spots of this table; None if it was not."""
    record = _record(adata, key)
    return record if "n_spots" in record and record.get("fitted", True) else None


def stored_teacher(adata: AnnData, key: str, name: str, rows: np.ndarray) -> StoredTeacher:
    """Return the embedding of rows `rows` in ``obsm[key]`` as a teacher called `name`.

    Raises
    ------
    ValueError
        If it is no matrix, was replaced since `embed_expression` wrote it, or has NaN or infinite values in `rows`.
    """
    record = _record(adata, key)
    if fitted_here(adata, key) is not None:
        logger.warning(
            "The teacher obsm[%r] was fitted on %s spots of this table: if you will test on some of them, their "
            "expression leaks into the training.", key, record["n_spots"],
        )  # fmt: skip
    value = adata.obsm[key]
    value = value.to_numpy() if isinstance(value, pd.DataFrame) else value
    value = value[rows].toarray() if sparse.issparse(value) else np.asarray(value)[rows]
    # licence and digest in the record hold only for the embedding that was written with it
    width = value.shape[1] if value.ndim == 2 else 0
    if record.get("n_components", width) != width:
        raise ValueError(
            f"obsm[{key!r}] has {width} columns, but `pekasc.tl.embed_expression` wrote {record['n_components']} "
            "there: it holds something else now. Store that under another key, or embed again."
        )
    return StoredTeacher(value, name, record.get("licence"), record.get("digest"))


def make_teacher(
    teacher: Teacher,
    *,
    expression: Matrix | None,
    counts: Matrix | None,
    genes: np.ndarray,
    expressed: np.ndarray,
    n_components: int | None,
    device: torch.device,
    precision: str,
    random_state: int = 0,
    progress: bool = False,
) -> TeacherModel:
    """Return a teacher of the registry for some spots; see :class:`pekasc.models.teachers.Source`."""
    return TEACHERS[teacher.name].make(
        Source(
            expression=expression,
            counts=counts,
            genes=genes,
            expressed=expressed,
            n_components=n_components,
            files=teacher.files,
            max_tokens=MAX_TOKENS if teacher.max_tokens is None else teacher.max_tokens,
            device=device,
            precision=precision,
            random_state=random_state,
            progress=progress,
        )
    )
