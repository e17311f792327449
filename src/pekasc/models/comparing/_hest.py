"""The protocol of HEST-Bench, as documented, for comparison with its published scores. Pure arrays.

It selects genes on test samples as well and has a small, fixed penalty: its scores are not those on a new patient.

Source: Jaume et al., "HEST-1k: A Dataset for Spatial Transcriptomics and Histology Image Analysis", NeurIPS 2024.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from pekasc._expression import Matrix
from pekasc.models.runtime import torch_threads_kept

N_GENES = 50
_N_COMPONENTS = 256
STRENGTHS = np.logspace(0, 6, 13)  # of the penalty, which is far too small between patients


@torch_threads_kept()
def highly_variable(expression: Matrix, n_genes: int) -> np.ndarray:
    """Return which genes are scanpy's highly variable ones (default flavour), boolean (genes,)."""
    import scanpy as sc

    names = pd.Index([str(i) for i in range(expression.shape[1])])
    adata = AnnData(sparse.csr_matrix(expression), var=pd.DataFrame(index=names))
    adata.uns["log1p"] = {"base": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        sc.pp.highly_variable_genes(adata, n_top_genes=n_genes)
    return adata.var["highly_variable"].to_numpy()


def hest_genes(counts: Matrix, names: Sequence[str], samples: np.ndarray, n_genes: int = N_GENES) -> np.ndarray:
    """Return the indices of the genes of HEST-Bench, in the order of the table.

    Genes detected in fewer than ``ceil(0.1 n)`` spots of any sample are dropped, as are names with BLANK or Control; of
    the rest, it takes scanpy's highly variable genes (default flavour) on log1p of the raw counts of all samples.

    Parameters
    ----------
    counts
        Raw counts, spots x genes.
    names
        Names of the genes.
    samples
        Sample (section) of every spot, (n,).
    n_genes
        Number of genes to select.
    """
    keep = np.array(["BLANK" not in str(name) and "Control" not in str(name) for name in names])
    for sample in np.unique(samples):
        part = counts[samples == sample]
        expressed = np.asarray((part > 0).sum(axis=0)).ravel()
        keep &= expressed >= np.ceil(0.1 * part.shape[0])
    at = np.flatnonzero(keep)
    log = sparse.csr_matrix(counts[:, at]).astype(np.float32).log1p()
    return at[highly_variable(log, min(n_genes, len(at)))]


def hest_predict(train: np.ndarray, y_train: np.ndarray, test: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Predict expression, (n_test, genes), with the regression of HEST-Bench: StandardScaler, PCA(256), ridge.

    Parameters
    ----------
    train, test
        Features, (n, d).
    y_train
        log1p of the raw counts, (n_train, genes).
    strength
        Factor of the penalty; HEST-Bench has 1.
    """
    scaler = StandardScaler().fit(train)
    pca = PCA(min(_N_COMPONENTS, *train.shape), random_state=1).fit(scaler.transform(train))
    x = pca.transform(scaler.transform(train))
    ridge = Ridge(
        alpha=strength * 100 / (x.shape[1] * y_train.shape[1]),
        fit_intercept=False,
        solver="lsqr",
        max_iter=1000,
        random_state=0,
    )
    ridge.fit(x, y_train)
    return ridge.predict(pca.transform(scaler.transform(test)))


def tuned_strength(train: np.ndarray, y_train: np.ndarray, groups: np.ndarray) -> float:
    """Return the factor of HEST-Bench's penalty with the smallest error on training groups held out in turn.

    With one group, which leaves nothing to hold out, it is 1.
    """
    names = np.unique(groups)
    if len(names) < 2:
        return 1.0
    errors = np.zeros(len(STRENGTHS))
    for name in names:
        out = groups == name
        for i, strength in enumerate(STRENGTHS):
            predicted = hest_predict(train[~out], y_train[~out], train[out], strength)
            errors[i] += np.square(predicted - y_train[out]).sum()
    return float(STRENGTHS[errors.argmin()])
