"""PCA of log-normalised expression as a teacher."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA

from pekasc._expression import Matrix, dense
from pekasc.models.heads import n_components_for

# above this many values, PCA keeps the matrix sparse
DENSE_VALUES = 2e7


class PcaTeacher:
    """PCA of log-normalised expression.

    Parameters
    ----------
    expression
        Training spots x genes.
    n_components
        See :func:`pekasc.models.heads.n_components_for`.
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
        """Return the scores of `rows` on the principal components of `train`."""
        rows = np.asarray(train if rows is None else rows)
        x = self.expression[np.unique(train)]  # sorted, since rounding depends on the order of rows
        n, d = x.shape
        k = n_components_for(n, d, self.n_components, "teacher_components")
        # arpack keeps sparse data sparse, but cannot return all components; small data are faster dense
        if n * d > DENSE_VALUES and k < min(n, d):
            pca = PCA(k, svd_solver="arpack", random_state=self.random_state).fit(x)
            return pca.transform(self.expression[rows]).astype(np.float32)
        pca = PCA(k, svd_solver="full").fit(dense(x).astype(np.float64))
        return pca.transform(dense(self.expression[rows]).astype(np.float64)).astype(np.float32)
