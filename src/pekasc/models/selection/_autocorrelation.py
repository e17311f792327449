"""Moran's I of many genes with squidpy, on a graph of nearest neighbours."""

from __future__ import annotations

import warnings

import numpy as np
from anndata import AnnData
from sklearn.neighbors import kneighbors_graph

from pekasc.models.runtime import torch_threads_kept

N_NEIGHBOURS = 6
MIN_SPOTS = 10
_SIGNIFICANT = 0.05


@torch_threads_kept()
def morans_i(values: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Moran's I of every gene, NaN if it is constant, and whether its p value is below 5 %.

    Parameters
    ----------
    values
        Expression of the spots of one section, (n, genes).
    positions
        Positions of the spots, (n, 2); the graph connects each to its six nearest neighbours.
    """
    import squidpy as sq

    graph = kneighbors_graph(positions, N_NEIGHBOURS)
    adata = AnnData(X=np.ascontiguousarray(values, dtype=np.float64), obsp={"spatial_connectivities": graph})
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # a constant gene has no autocorrelation: squidpy divides by 0 and gives NaN, which is what we report
        warnings.simplefilter("ignore", RuntimeWarning)
        frame = sq.gr.spatial_autocorr(
            adata, mode="moran", genes=list(adata.var_names), n_perms=None, copy=True, show_progress_bar=False
        )
    frame = frame.reindex(adata.var_names)
    return frame["I"].to_numpy(dtype=np.float64), frame["pval_norm"].to_numpy(dtype=np.float64) < _SIGNIFICANT
