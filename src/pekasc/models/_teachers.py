"""Teachers: embeddings of spots' expression, fitted on the training spots of the fold at hand."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from sklearn.decomposition import PCA

from pekasc._expression import Matrix
from pekasc.models._heads import n_components_for


class Teacher(Protocol):
    """What training asks of a teacher."""

    name: str
    licence: str | None  # of what it learned elsewhere

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Return the embedding of training spots `rows`, (len(rows), D) float32; fitted on nothing but them."""
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

    def __init__(self, expression: Matrix, n_components: int | None = None, random_state: int = 0) -> None:
        self.expression, self.n_components, self.random_state = expression, n_components, random_state

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Return PCA scores of `rows`, fitted on them."""
        return pca_scores(self.expression[rows], self.n_components, self.random_state)


class StoredTeacher:
    """An embedding that somebody computed before, such as a single-cell foundation model's.

    Parameters
    ----------
    embedding
        Training spots x D.
    name
        Where it came from.
    licence
        Of the model that made it.
    """

    def __init__(self, embedding: np.ndarray, name: str, licence: str | None = None) -> None:
        self.embedding, self.name, self.licence = np.asarray(embedding, dtype=np.float32), name, licence

    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Return the stored embedding of `rows`."""
        return self.embedding[rows]


def pca_scores(expression: Matrix, n_components: int | None, random_state: int) -> np.ndarray:
    """Return principal component scores (n, k), float32, of spots x genes."""
    n, d = expression.shape
    k = n_components_for(n, d, n_components)
    # arpack keeps sparse data sparse; it cannot give all components, and small data are better dense
    large = n * d > 2e7
    if large and k < min(n, d):
        return PCA(k, svd_solver="arpack", random_state=random_state).fit_transform(expression).astype(np.float32)
    dense = expression if isinstance(expression, np.ndarray) else expression.toarray()
    return PCA(k, svd_solver="full").fit_transform(dense.astype(np.float64)).astype(np.float32)
