"""Teachers: embeddings of spots' expression, behind one interface, and the registry of those that are known by name."""

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
    """What a teacher is made from: everything about the same spots, in one order.

    Parameters
    ----------
    expression
        Log-normalised expression, spots x genes; for teachers that read it.
    counts
        Raw counts, spots x genes; for teachers that read those.
    genes
        Names of the genes.
    expressed
        Positions of those genes that are seen often enough to learn from.
    n_components
        Dimensions of the embedding; None leaves it to the teacher.
    files
        Folder with the teacher's official files.
    max_tokens
        Most tokens in a batch.
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
    """A teacher that is known by its name.

    Parameters
    ----------
    make
        Makes it.
    fitted
        Whether it learns from the spots at hand. A frozen one knows a spot by its own counts alone.
    counts
        Whether it reads raw counts, else log-normalised expression.
    files
        What the folder of its files has to hold; none for a teacher without official files.
    require
        Raises ImportError where a package that it needs is missing.
    """

    make: Callable[[Source], TeacherModel]
    fitted: bool
    counts: bool
    files: tuple[str, ...] = ()
    require: Callable[[], Any] | None = None


def _pca(source: Source) -> TeacherModel:
    assert source.expression is not None  # for the type checker: the row asks for it
    return PcaTeacher(source.expression[:, source.expressed], source.n_components, source.random_state)


def _scvi(source: Source) -> TeacherModel:
    assert source.counts is not None  # for the type checker: the row asks for them
    return ScviTeacher(
        source.counts[:, source.expressed],
        source.n_components,
        device=source.device,
        random_state=source.random_state,
        progress=source.progress,
    )


def _scfoundation(source: Source) -> TeacherModel:
    assert source.counts is not None and source.files is not None  # for the type checker: the row asks for them
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
    """Check that a teacher of the registry gets the folder that it needs, and none that it does not.

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
    if not files and teacher.files is not None:
        readers = [name for name, row in TEACHERS.items() if row.files]
        raise ValueError(f"`teacher={teacher.name!r}` reads no files: leave `files=` out (it is for {readers}).")
