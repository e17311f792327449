"""Teachers: embeddings of spots' expression, behind one interface, and the registry of those that are known by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.decomposition import PCA

from pekasc._expression import Matrix, dense
from pekasc.models._registry import Registry
from pekasc.models.heads._ridge import n_components_for
from pekasc.models.teachers._scfoundation import CHECKPOINT, GENE_INDEX, MAX_TOKENS, ScFoundationTeacher
from pekasc.models.teachers._scvi import ScviTeacher, require_scvi
from pekasc.models.teachers._teacher import Teacher

# a PCA of more values than that keeps them sparse
DENSE_VALUES = 2e7


class TeacherModel(Protocol):
    """What training asks of a teacher."""

    name: str
    licence: str | None  # of what it learned elsewhere
    digest: str | None  # of the weights that it learned elsewhere
    n_spots: int  # that it knows
    n_genes: int | None  # that it reads, where that is known

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the embedding of spots `rows`, (len(rows), D) float32, by what was fitted on spots `train` alone.

        Parameters
        ----------
        train
            Positions of the spots that may be learned from; a frozen teacher learns from none.
        rows
            Positions of the spots to embed, `train` by default. A spot that cannot be embedded is NaN.
        """
        ...


class PcaTeacher:
    """PCA of log-normalised expression.

    Parameters
    ----------
    expression
        Training spots x genes.
    n_components
        See :func:`pekasc.models._heads.n_components_for`.
    random_state
        Seed of the solver for sparse data.
    """

    name = "pca"
    licence: str | None = "none needed: fitted on the training spots"
    digest: str | None = None

    def __init__(self, expression: Matrix, n_components: int | None = None, random_state: int = 0) -> None:
        self.expression, self.n_components, self.random_state = expression, n_components, random_state
        self.n_spots = int(expression.shape[0])
        self.n_genes: int | None = int(expression.shape[1])

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return scores of `rows` on components of `train`."""
        rows = np.asarray(train if rows is None else rows)
        x = self.expression[np.unique(train)]  # in one order, whatever the caller's: sums depend on it in the last bit
        n, d = x.shape
        k = n_components_for(n, d, self.n_components, "teacher_components")
        # arpack keeps sparse data sparse; it cannot give all components, and small data are better dense
        if n * d > DENSE_VALUES and k < min(n, d):
            pca = PCA(k, svd_solver="arpack", random_state=self.random_state).fit(x)
            return pca.transform(self.expression[rows]).astype(np.float32)
        pca = PCA(k, svd_solver="full").fit(dense(x).astype(np.float64))
        return pca.transform(dense(self.expression[rows]).astype(np.float64)).astype(np.float32)


class StoredTeacher:
    """An embedding that is there already: computed before, or by a frozen model.

    Parameters
    ----------
    embedding
        Training spots x D.
    name
        Where it came from.
    licence, digest
        Of the model that made it.

    Raises
    ------
    ValueError
        If the embedding is no matrix of finite numbers.
    """

    def __init__(self, embedding: np.ndarray, name: str, licence: str | None = None, digest: str | None = None) -> None:
        self.embedding, self.name, self.licence, self.digest = np.asarray(embedding), name, licence, digest
        if self.embedding.ndim != 2 or not self.embedding.shape[1] or self.embedding.dtype.kind not in "biuf":
            raise ValueError(
                f"The teacher's embedding {name!r} must be a matrix of numbers, spots x dimensions: it has shape "
                f"{self.embedding.shape} and dtype {self.embedding.dtype}."
            )
        self.embedding = check_finite(self.embedding.astype(np.float32), name)
        self.n_spots = len(self.embedding)
        self.n_genes: int | None = None

    def embed(self, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the stored embedding of `rows`."""
        return self.embedding[train if rows is None else rows]


def asked_once(teacher: TeacherModel) -> StoredTeacher:
    """Return what a frozen teacher says of all its spots, which is the same in every fold."""
    embedding = teacher.embed(np.arange(teacher.n_spots))
    return StoredTeacher(embedding, teacher.name, teacher.licence, teacher.digest)


def check_finite(embedding: np.ndarray, name: str) -> np.ndarray:
    """Return `embedding` if all of it is finite.

    Raises
    ------
    ValueError
        If it is not.
    """
    bad = ~np.isfinite(embedding).all(axis=1)
    if bad.any():
        raise ValueError(
            f"The teacher's embedding {name!r} has NaN or infinite values in {int(bad.sum())} of {len(bad)} spots: "
            "embed them, or leave them out (`train=` of `fit_adapter`, or a subset of the object)."
        )
    return embedding


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
