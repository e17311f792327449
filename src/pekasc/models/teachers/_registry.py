"""Registry of teachers: how each is made from the expression of the training spots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pekasc._expression import Matrix
from pekasc.models.runtime import Registry
from pekasc.models.teachers._pca import PcaTeacher
from pekasc.models.teachers._scfoundation import CHECKPOINT, GENE_INDEX, MAX_TOKENS, ScFoundationTeacher
from pekasc.models.teachers._scvi import ScviTeacher, require_scvi
from pekasc.models.teachers._teacher import Teacher, TeacherModel


@dataclass(frozen=True)
class Source:
    """Data and settings to make a teacher from.

    Parameters
    ----------
    expression
        Log-normalised expression, spots x genes, for teachers that need it.
    counts
        Raw counts, spots x genes, for teachers that need them.
    genes
        Names of the genes.
    expressed
        Indices of the genes detected in enough spots to fit a teacher on.
    n_components
        Dimensions of the embedding; None is the default of the teacher.
    files
        Folder with the teacher's official files.
    max_tokens
        Maximum number of tokens per batch.
    device, precision, random_state, progress
        As in ``tl.fit_adapter``.
    """

    expression: Matrix | None
    counts: Matrix | None
    genes: np.ndarray
    expressed: np.ndarray
    n_components: int | None = None
    files: str | Path | None = None
    max_tokens: int = MAX_TOKENS
    device: torch.device | str = "cpu"
    precision: str = "fp32"
    random_state: int = 0
    progress: bool = False


@dataclass(frozen=True)
class TeacherRow:
    """A teacher of the registry.

    Parameters
    ----------
    make
        Function that makes the teacher.
    fitted
        Whether it is fitted on the training spots. A frozen teacher embeds each spot from its own counts alone.
    counts
        Whether it needs raw counts; else log-normalised expression.
    files
        Names of the official files that it needs in its folder.
    require
        Function that raises ImportError if a package is missing.
    """

    make: Callable[[Source], TeacherModel]
    fitted: bool
    counts: bool
    files: tuple[str, ...] = ()
    require: Callable[[], Any] | None = None


def _pca(source: Source) -> TeacherModel:
    assert source.expression is not None  # for the type checker: the row needs it
    return PcaTeacher(source.expression[:, source.expressed], source.n_components, source.random_state)


def _scvi(source: Source) -> TeacherModel:
    assert source.counts is not None  # for the type checker: the row needs them
    return ScviTeacher(
        source.counts[:, source.expressed],
        source.n_components,
        device=source.device,
        random_state=source.random_state,
        progress=source.progress,
    )


def _scfoundation(source: Source) -> TeacherModel:
    assert source.counts is not None and source.files is not None  # for the type checker: the row needs them
    return ScFoundationTeacher(
        source.counts,
        list(source.genes),
        source.files,
        max_tokens=source.max_tokens,
        device=source.device,
        precision=source.precision,
        progress=source.progress,
    )


TEACHERS: Registry[TeacherRow] = Registry(
    "teacher",
    {
        "pca": TeacherRow(_pca, fitted=True, counts=False),
        "scvi": TeacherRow(_scvi, fitted=True, counts=True, require=require_scvi),
        "scfoundation": TeacherRow(_scfoundation, fitted=False, counts=True, files=(CHECKPOINT, GENE_INDEX)),
    },
)


def check_files(teacher: Teacher) -> None:
    """Check that `files` is given for a teacher that needs files, and only then.

    Raises
    ------
    ValueError
        If not, or if there is no such teacher.
    """
    files = TEACHERS.find("teacher", teacher.name).files
    if files and teacher.files is None:
        raise ValueError(
            f"`teacher={teacher.name!r}` needs its official files, {', '.join(files)}: give "
            f'`teacher=pekasc.models.Teacher("{teacher.name}", files=FOLDER)`.'
        )
    if not files and teacher.max_tokens is not None:
        raise ValueError(f"`teacher={teacher.name!r}` reads no tokens: leave `max_tokens=` out.")
    if not files and teacher.files is not None:
        readers = [name for name, row in TEACHERS.items() if row.files]
        raise ValueError(f"`teacher={teacher.name!r}` reads no files: leave `files=` out (it is for {readers}).")
