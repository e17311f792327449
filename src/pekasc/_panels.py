"""Genes that only some sections measured: which spot measured which gene. Pure arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

LEAST_SPOTS = 10  # that measured a gene, to learn it on the training spots of an inner fold


@dataclass(frozen=True)
class Panels:
    """Which spots measured which genes. Sections with the same genes have one panel.

    Parameters
    ----------
    panel
        Number of the panel of every spot, (n,).
    genes
        Genes of every panel, (panels, genes) bool.
    """

    panel: np.ndarray
    genes: np.ndarray

    @property
    def shared(self) -> np.ndarray:
        """Whether every panel has the gene, (genes,)."""
        return np.asarray(self.genes.all(axis=0))

    def take(self, rows: np.ndarray) -> Panels:
        """Return the panels of some of the spots."""
        return Panels(self.panel[rows], self.genes)

    def columns(self, genes: np.ndarray) -> Panels:
        """Return the panels restricted to some genes; panels that are now alike become one."""
        unique, number = np.unique(self.genes[:, genes], axis=0, return_inverse=True)
        return Panels(np.asarray(number).ravel()[self.panel], unique)

    def patterns(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return sets of genes that the same panels have, as indices, with the spots that measured them."""
        unique, number = np.unique(self.genes, axis=1, return_inverse=True)
        number = np.asarray(number).ravel()
        return [(np.flatnonzero(number == i), np.flatnonzero(unique[self.panel, i])) for i in range(unique.shape[1])]

    def n_spots(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return how many of the spots `rows` measured each gene, (genes,)."""
        return np.bincount(self.panel[rows], minlength=len(self.genes)) @ self.genes.astype(np.int64)

    def learned(self, rows: np.ndarray) -> np.ndarray:
        """Return which genes can be learned on the training spots `rows` of an inner fold, (genes,)."""
        return self.n_spots(rows) >= LEAST_SPOTS

    def of(self, rows: np.ndarray, genes: Any = slice(None)) -> np.ndarray:
        """Return whether spots measured genes, (rows, genes) bool."""
        return self.genes[:, genes][self.panel[rows]]

    def masked(self, matrix: Any) -> Any:
        """Return expression (n, genes), dense or CSR, with 0 where it was not measured."""
        if not sparse.issparse(matrix):
            return np.where(self.genes[self.panel], matrix, 0)
        out = matrix.tocsr(copy=True)
        out.data[~self.genes[np.repeat(self.panel, np.diff(out.indptr)), out.indices]] = 0
        out.eliminate_zeros()
        return out


def same_panel(n: int, n_genes: int) -> Panels:
    """Return the panels of spots that all measured all genes."""
    return Panels(np.zeros(n, dtype=np.int64), np.ones((1, n_genes), dtype=bool))
