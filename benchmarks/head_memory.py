"""Peak memory of the expression head of 206,123 tiles and 18,000 genes, with everything that is chosen.

    python benchmarks/head_memory.py [--tiles 206123] [--genes 18000] [--features 256] [--density 0.08] [--threads 2]

Counts are drawn, sparse (CSR, float32), in 50 sections; what is measured is the process: the counts themselves,
choice of the penalty over three folds, correlations of every gene on held-out sections, the last fit. As dense float32,
expression alone would take 14.8 GB.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy import sparse

from _machine import machine
from pekasc.models.heads import FoldData, check_head, fit_rows
from pekasc.models.runtime import peak_memory
from pekasc.models.selection import InnerFold, correlations_of

SECTIONS, FOLDS = 50, 3
CPU = torch.device("cpu")


def drawn(n: int, genes: int, density: float, features: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Return expression whose rate depends on the features a little, row by row."""
    per_row = int(genes * density)
    data = np.empty(n * per_row, dtype=np.float32)
    indices = np.empty(n * per_row, dtype=np.int32)
    step = 4096
    for start in range(0, n, step):
        rows = min(step, n - start)
        first = rng.integers(0, genes - 1, (rows, 1))
        columns = np.sort((first + np.arange(per_row) * (genes // per_row)) % genes, axis=1).astype(np.int32)
        at = slice(start * per_row, (start + rows) * per_row)
        indices[at] = columns.ravel()
        level = 1 + 0.3 * features[start : start + rows, columns[0] % features.shape[1]]
        data[at] = (level + rng.normal(0, 0.3, level.shape)).astype(np.float32).ravel()
    indptr = np.arange(0, n * per_row + 1, per_row, dtype=np.int64)
    return sparse.csr_matrix((data, indices, indptr), shape=(n, genes))


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=206_123)
    parser.add_argument("--genes", type=int, default=18_000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.08)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(a.tiles, a.features)).astype(np.float32)
    y = drawn(a.tiles, a.genes, a.density, x, rng)
    stored = (y.data.nbytes + y.indices.nbytes + y.indptr.nbytes + x.nbytes) / 1e9
    before = peak_memory(CPU) / 1e9
    section = np.arange(a.tiles) * SECTIONS // a.tiles
    start = time.perf_counter()
    folds = [
        InnerFold(np.flatnonzero(section % FOLDS != i), np.flatnonzero(section % FOLDS == i), str(i))
        for i in range(FOLDS)
    ]
    parts = [FoldData(x, y, fold) for fold in folds]
    alpha = check_head("ridge").choose(parts, None, 0)
    chosen = time.perf_counter() - start
    scores = []
    for part in parts:
        head = fit_rows("ridge", part, None, alpha, 0)
        for one in np.unique(section[part.fold.held_out]):
            rows = np.flatnonzero(section == one)
            scores.append(correlations_of(head, x[rows], y[rows]))
    scored = time.perf_counter() - start - chosen
    check_head("ridge").fit(x, y, None, alpha, 0)
    seconds = time.perf_counter() - start
    peak = peak_memory(CPU) / 1e9
    print(
        f"{a.tiles} tiles x {a.genes} genes x {a.features} features, {a.density:.0%} of counts above 0: peak "
        f"{peak:.2f} GB, of it {stored:.2f} GB counts and features ({before:.2f} GB with the packages). "
        f"{seconds:.0f} s: penalty "
        f"{chosen:.0f} s (alpha {alpha:.3g}), correlations {scored:.0f} s (mean {np.nanmean(scores):.3f}). "
        f"{a.threads} threads. {machine()}"
    )


if __name__ == "__main__":
    main()
