"""Peak memory of the expression head of 206,123 tiles and 18,000 genes, with everything that is chosen.

    python benchmarks/head_memory.py [--tiles 206123] [--genes 18000] [--features 256] [--density 0.08] [--threads 2]
    python benchmarks/head_memory.py --head low-rank --features 768 --depths 12

Counts are drawn, sparse (CSR, float32), in 50 sections; what is measured is the process: the counts themselves,
choice of the penalty over three folds, correlations of every gene on held-out sections, the last fit. As dense float32,
expression alone would take 14.8 GB.

``--head low-rank`` is the readout that trains nothing: features of several depths lie in files in half precision, with
300 um of spatial context; depths, ranks and penalties are averaged over three folds of sections.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from scipy import sparse

from _machine import machine
from pekasc._options import Readout
from pekasc.models.encoders import Depth
from pekasc.models.features import FeatureFiles
from pekasc.models.runtime import peak_memory
from pekasc.models.selection import Data, Features, HeadSpec, InnerFold, Reader
from pekasc.tiling import ArrayTiles

SECTIONS, FOLDS, STEP = 50, 3, 8192
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
    parser.add_argument("--head", choices=["ridge", "low-rank"], default="ridge")
    parser.add_argument("--depths", type=int, default=1)
    parser.add_argument("--density", type=float, default=0.08)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(a.tiles, a.features)).astype(np.float32)
    y = drawn(a.tiles, a.genes, a.density, x, rng)
    counts = (y.data.nbytes + y.indices.nbytes + y.indptr.nbytes) / 1e9
    depths: list[Depth] = [(i + 1,) for i in range(a.depths)]
    files = FeatureFiles(a.tiles, depths)
    for depth in depths:
        for start in range(0, a.tiles, STEP):
            part = x[start : start + STEP]
            noisy = part + rng.normal(0, 0.1 * depth[0], part.shape) if depth is not None else part
            files.put(depth, 0, np.arange(start, start + len(part)), noisy)
    del x, part, noisy
    before = peak_memory(CPU) / 1e9
    start_time = time.perf_counter()
    reading = fit(a, y, files, depths)
    seconds = time.perf_counter() - start_time
    peak = peak_memory(CPU) / 1e9
    print(
        f"{a.head}: {a.tiles} tiles x {a.genes} genes, {a.density:.0%} of counts above 0, {a.depths} depths of "
        f"{a.features} features: peak {peak:.2f} GB, of it {counts:.2f} GB counts: {peak - counts:.2f} GB beyond them "
        f"({before:.2f} GB with data and packages, before anything is fitted). {seconds:.0f} s, "
        f"{len(reading.members)} heads. {a.threads} threads. {machine()}"
    )


def fit(a: Any, y: sparse.csr_matrix, files: FeatureFiles, depths: list[Depth]) -> Any:
    """Fit the reading."""
    section = np.arange(a.tiles) * SECTIONS // a.tiles
    folds = [
        InnerFold(np.flatnonzero(section % FOLDS != i), np.flatnonzero(section % FOLDS == i), str(i))
        for i in range(FOLDS)
    ]
    within = np.concatenate([np.arange(n) for n in np.bincount(section)])
    coords = 100.0 * np.column_stack(np.divmod(within, 64))
    names = [f"g{i}" for i in range(a.genes)]
    tiles = ArrayTiles(np.zeros((1, 1, 1, 3), np.uint8))  # none is read
    data = Data(tiles, y, names, section, section, coords, totals=np.asarray(y.sum(axis=1)).ravel())
    context = 300.0 if a.head == "low-rank" else None
    readout = Readout(head=a.head, context_um=context, fields_um=None)
    return Reader(data, folds, Features(files, depths[-1])).fit(HeadSpec(readout), depths).reading


if __name__ == "__main__":
    main()
