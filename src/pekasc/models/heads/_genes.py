"""Principal components of gene expression: the space that a low-rank head predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, sparse

from pekasc._expression import Matrix
from pekasc._panels import LEAST_SPOTS, Panels

RANKS = (1, 2, 3, 5, 8, 12, 20, 40)
_LEAST_VARIANCE = 1e-10  # of that of the largest component
_EXACT = 4096  # spots or genes up to which the decomposition is exact
_MORE, _BLOCKS = 10, 12  # axes of a block beyond those asked for, and blocks
_ROUNDING = 1e-6  # of float32, in which spots are multiplied
_ROWS = 8192  # of spots, multiplied at once


@dataclass(frozen=True)
class GeneSpace:
    """Principal components of the centred expression of some spots.

    Parameters
    ----------
    mean
        Shape (genes,).
    axes
        Shape (genes, r), the first with the largest variance.
    """

    mean: np.ndarray
    axes: np.ndarray

    def scores(self, y: Matrix) -> np.ndarray:
        """Return the components of spots, (n, r) float64."""
        return np.asarray(y @ self.axes) - self.mean @ self.axes


def gene_space(y: Matrix, rank: int, weights: np.ndarray | None = None) -> GeneSpace:
    """Return the first principal components of expression, without copying it.

    Parameters
    ----------
    y
        Expression, (n, genes), dense or CSR.
    rank
        Number of components, below the number of spots and at most that of genes.
    weights
        Weight of every spot, (n,); 1 by default.
    """
    n, n_genes = y.shape
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = np.asarray(y.T @ w, dtype=np.float64).ravel() / w.sum()
    if min(n, n_genes) > max(_EXACT, _BLOCKS * (rank + _MORE)):
        return GeneSpace(mean, _largest(y, mean, w, rank))
    if n <= n_genes:
        root = np.sqrt(w)
        # the spots' inner products, centred
        inner = y @ y.T
        inner = np.asarray(inner.toarray() if sparse.issparse(inner) else inner, dtype=np.float64)
        along = np.asarray(y @ mean, dtype=np.float64).ravel()
        inner += mean @ mean - along[:, None] - along
        vectors = _first(inner * np.outer(root, root), rank)
        axes = np.asarray(y.T @ (root[:, None] * vectors), dtype=np.float64) - np.outer(mean, root @ vectors)
        # where spots vary along fewer axes than asked for, the others are rounding noise: made orthogonal to the first,
        # so that spots do not vary along them
        return GeneSpace(mean, np.linalg.qr(axes)[0])
    weighted = y.multiply(w[:, None]).tocsr() if sparse.issparse(y) else y * w[:, None]
    second = y.T @ weighted
    second = np.asarray(second.toarray() if sparse.issparse(second) else second, dtype=np.float64)
    return GeneSpace(mean, _first(second - w.sum() * np.outer(mean, mean), rank))


def _first(symmetric: np.ndarray, rank: int) -> np.ndarray:
    n = len(symmetric)
    return linalg.eigh(symmetric, subset_by_index=[n - rank, n - 1])[1][:, ::-1]


def _largest(y: Matrix, mean: np.ndarray, weights: np.ndarray, rank: int) -> np.ndarray:
    """Return the axes by a block Lanczos method, which centres a sparse matrix without making it dense.

    Every block is made orthogonal to all before it. ARPACK multiplies by one vector at a time, which takes longer.

    Source: Musco, Musco. Randomized block Krylov methods for stronger and faster approximate singular value
    decomposition. NeurIPS 2015.
    """

    def times(v: np.ndarray) -> np.ndarray:
        """Return the covariance of genes times `v`, a stretch of spots after the other."""
        out, single = np.zeros(v.shape), v.astype(np.float32)
        for start in range(0, y.shape[0], _ROWS):
            part, w = y[start : start + _ROWS], weights[start : start + _ROWS]
            u = w[:, None] * (np.asarray(part @ single) - mean @ v)
            out += np.asarray(part.T @ u.astype(np.float32)) - np.outer(mean, u.sum(axis=0))
        return out

    blocks = [np.linalg.qr(np.random.default_rng(0).normal(size=(y.shape[1], rank + _MORE)))[0]]
    products = [times(blocks[0])]
    for _ in range(_BLOCKS - 1):
        known = np.concatenate(blocks, axis=1)
        left, sizes, _ = np.linalg.svd(products[-1] - known @ (known.T @ products[-1]), full_matrices=False)
        block = left[:, sizes > _ROUNDING * np.linalg.norm(products[0])]
        if not block.shape[1]:  # the blocks span all that varies
            break
        blocks.append(np.linalg.qr(block - known @ (known.T @ block))[0])  # what rounding left of the others
        products.append(times(blocks[-1]))
    space = np.concatenate(blocks, axis=1)
    # within the space that was found, the axes along which spots vary most
    inner = space.T @ np.concatenate(products, axis=1)
    return space @ _first((inner + inner.T) / 2, rank)


def loadings(scores: np.ndarray, y: Matrix, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of every gene, (genes,), and its regression on the components of the same spots, (r, genes).

    Components have mean 0 over these spots and are uncorrelated. Those without variance have no part in it.
    """
    w = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = np.asarray(y.T @ w, dtype=np.float64).ravel() / w.sum()
    weighted = scores * w[:, None]
    size = np.einsum("nr,nr->r", weighted, scores)
    cross = np.asarray(y.T @ weighted, dtype=np.float64).T - np.outer(weighted.sum(axis=0), mean)
    # what redundant columns leave of a component is rounding noise, which nothing must be predicted from
    varies = (size > _LEAST_VARIANCE * size.max(initial=0.0))[:, None]
    return mean, np.divide(cross, size[:, None], out=np.zeros_like(cross), where=varies)


def panel_loadings(
    scores: np.ndarray, y: Matrix, panels: Panels, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return :func:`loadings` where some spots did not measure some genes.

    A gene that all spots measured is as there. The mean of another is its expression where all components are 0, since
    those are not the mean components of the spots that measured it, and its loadings are from the regression on these
    spots alone. Those of a gene that fewer than `LEAST_SPOTS` measured are 0.
    """
    mean, out = np.zeros(y.shape[1]), np.zeros((scores.shape[1], y.shape[1]))
    for genes, rows in panels.patterns():
        if len(rows) == len(scores):
            # no copy where all spots measured all genes
            own = y if len(genes) == y.shape[1] else y[:, genes]
            mean[genes], out[:, genes] = loadings(scores, own, weights)
        elif len(rows) >= LEAST_SPOTS:
            w = None if weights is None else weights[rows]
            mean[genes], out[:, genes] = _regression(scores[rows], y[rows][:, genes], w)
    return mean, out


def _regression(scores: np.ndarray, y: Matrix, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    w = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    centre = w @ scores / w.sum()
    mean = np.asarray(y.T @ w, dtype=np.float64).ravel() / w.sum()
    weighted = (scores - centre) * w[:, None]
    cross = np.asarray(y.T @ weighted, dtype=np.float64).T  # of centred components: the mean of y drops out
    # components may be as many as spots
    loading = np.linalg.lstsq(weighted.T @ (scores - centre), cross, rcond=1e-10)[0]
    return mean - centre @ loading, loading
