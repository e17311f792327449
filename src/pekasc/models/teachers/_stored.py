"""A stored embedding as teacher: computed before, or by a frozen model."""

from __future__ import annotations

import numpy as np

from pekasc.models.teachers._teacher import TeacherModel


class StoredTeacher:
    """A stored embedding as teacher: computed before, or by a frozen model.

    Parameters
    ----------
    embedding
        Embedding of the training spots, (n, D).
    name
        Name of the teacher.
    licence, digest
        Licence and digest of the model that made it.

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


def precomputed(teacher: TeacherModel) -> StoredTeacher:
    """Return a frozen teacher with the embeddings of all its spots computed, which are the same in every fold."""
    embedding = teacher.embed(np.arange(teacher.n_spots))
    return StoredTeacher(embedding, teacher.name, teacher.licence, teacher.digest)


def check_finite(embedding: np.ndarray, name: str) -> np.ndarray:
    """Check that an embedding has no NaN or infinite values, and return it.

    Raises
    ------
    ValueError
        If it has.
    """
    bad = ~np.isfinite(embedding).all(axis=1)
    if bad.any():
        raise ValueError(
            f"The teacher's embedding {name!r} has NaN or infinite values in {int(bad.sum())} of {len(bad)} spots: "
            "embed them, or leave them out (`train=` of `fit_adapter`, or a subset of the object)."
        )
    return embedding
