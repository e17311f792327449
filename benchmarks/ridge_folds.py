"""Ridge with a penalty tuned on held-out groups: closed form from moments, against scikit-learn on the same criterion.

    python benchmarks/ridge_folds.py

5,000 spots in 5 groups, 256 features, 10,000 genes, 16 penalties. Both standardise in the fold, and hold out each group
in turn; the penalty is the one with the smallest squared error, summed over genes, over that of the mean predictor.
scikit-learn: one ``Ridge`` (all genes at once, its Cholesky solver) per fold and penalty under ``GroupKFold``. One run,
taking turns, medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from _ridge import predict
from pekasc.models.heads import ALPHAS, fit_folds, fit_ridge
from pekasc.models.selection import InnerFold


def data(n: int, d: int, genes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 32)) @ rng.normal(size=(32, d)) + rng.normal(size=(n, d))).astype(np.float32)
    weights = rng.normal(size=(d, genes)) * (rng.random((1, genes)) < 0.3)
    y = (x @ weights * 0.02 + rng.normal(size=(n, genes))).astype(np.float32)
    return x, y, np.repeat(np.arange(5), n // 5)


def ours(x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: list[InnerFold]) -> tuple[float, np.ndarray]:
    errors = np.array([fit.relative_errors(ALPHAS) for fit in fit_folds(x, y, folds)])
    alpha = float(ALPHAS[errors.mean(axis=0).argmin()])
    return alpha, predict(fit_ridge(x, y), alpha, x)


def sklearn(x: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: list[InnerFold]) -> tuple[float, np.ndarray]:
    errors = np.zeros((len(folds), len(ALPHAS)))

    def prepare(train: np.ndarray) -> tuple[np.ndarray, np.ndarray, PCA]:
        mean, scale = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
        pca = PCA(min(256, train.shape[1]), svd_solver="full").fit((train - mean) / scale)
        return mean, scale, pca

    for i, (train, test) in enumerate(GroupKFold(len(folds)).split(x, groups=groups)):
        mean, scale, pca = prepare(x[train])
        a, b = pca.transform((x[train] - mean) / scale), pca.transform((x[test] - mean) / scale)
        base = np.square(y[test] - y[train].mean(axis=0, dtype=np.float64)).sum()
        for j, alpha in enumerate(ALPHAS):
            # our penalty is per training spot
            model = Ridge(alpha=alpha * len(train)).fit(a, y[train])
            errors[i, j] = np.square(model.predict(b) - y[test]).sum() / base
    alpha = float(ALPHAS[errors.mean(axis=0).argmin()])
    mean, scale, pca = prepare(x)
    z = pca.transform((x - mean) / scale)
    return alpha, Ridge(alpha=alpha * len(x)).fit(z, y).predict(z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spots", type=int, default=5000)
    parser.add_argument("--genes", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    x, y, groups = data(arguments.spots, 256, arguments.genes, 0)
    folds = [InnerFold(np.flatnonzero(groups != g), np.flatnonzero(groups == g), str(g)) for g in range(5)]
    seconds: dict[str, list[float]] = {"pekasc": [], "scikit-learn": []}
    results = {}
    with threadpool_limits(arguments.threads):
        for _ in range(arguments.rounds):
            for name, call in (("pekasc", ours), ("scikit-learn", sklearn)):
                start = time.perf_counter()
                results[name] = call(x, y, groups, folds)
                seconds[name].append(time.perf_counter() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s, alpha {results[name][0]:.4g}", flush=True)
    apart = np.abs(results["pekasc"][1] - results["scikit-learn"][1]).max()
    one, two = (statistics.median(seconds[name]) for name in ("pekasc", "scikit-learn"))
    same = results["pekasc"][0] == results["scikit-learn"][0]
    print(f"median {one:.1f} s against {two:.1f} s: ratio {two / one:.1f}; same penalty: {same}; apart by {apart:.1e}")
    print(
        f"{os.cpu_count()} {platform.machine()} cores, {arguments.threads} threads, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
