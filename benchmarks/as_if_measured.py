"""Can one go on with predictions as if they had been measured? Clusters, spatial statistics and markers.

For C2 + C3 to C4 (one patient) and C2-C4 to B4 (another): genes expressed in every training section, log1p(counts per
10,000). Leiden clusters (50 principal components, resolution chosen so that there are as many clusters as the authors
found) of each kind of values are compared with those of the measured values and with the authors' own labels by the
adjusted Rand index; Moran's I of every gene by Spearman's rank correlation with that of the measured values, and its
median share; neighbourhood enrichment by Pearson's correlation of z-scores; the top 20 marker genes of every measured
cluster (t-test) by the share that is found again with the same spots. Five kinds of values: the default call, the
frozen encoder under the default readout (method=None), plain ridge at its best depth, measured values smoothed over the
nearest spots, and a random half of the counts (what the assay might say if run again).

    python benchmarks/as_if_measured.py --her2st PATH --vits PATH --out results/measured
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import squidpy as sq
from anndata import AnnData
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score

import pekasc as pk
from _her2st import FOLDS, KeptRows, Split, load_split, parsed, quick_parser
from pekasc._expression import count_totals, dense, log1p_of_totals
from pekasc.models.heads import neighbour_means

SEED = 0
# those that train nothing first
FITS: dict[str, dict[str, Any]] = {
    "frozen, best depth, ridge": {"method": None, "readout": "ridge"},
    "frozen, default readout": {"method": None},
    "default": {},
}
ONCE = ("measured, smoothed over 300 um", "a random half of the counts")


def clusters(values: np.ndarray, n: int) -> np.ndarray:
    """Return Leiden clusters, of a resolution that gives about n of them."""
    adata = AnnData(values.astype(np.float32))
    sc.pp.pca(adata, n_comps=min(50, min(values.shape) - 1), random_state=SEED)
    sc.pp.neighbors(adata, random_state=SEED)
    best, gap = np.zeros(len(values)), np.inf
    for resolution in np.linspace(0.2, 2.0, 19):
        sc.tl.leiden(adata, resolution=float(resolution), flavor="igraph", n_iterations=2, random_state=SEED)
        found = adata.obs["leiden"].cat.codes.to_numpy()
        if abs(found.max() + 1 - n) < gap:
            best, gap = found, abs(found.max() + 1 - n)
    return best


def morans(values: np.ndarray, adata: AnnData) -> np.ndarray:
    other = AnnData(values, obsp=dict(adata.obsp))
    return np.asarray(sc.metrics.morans_i(other.obsp["spatial_connectivities"], values.T))


def enrichment(labels: np.ndarray, adata: AnnData) -> np.ndarray:
    other = adata.copy()
    other.obs["cluster"] = pd.Categorical([f"{label:03d}" for label in labels])  # as the labels are sorted
    sq.gr.nhood_enrichment(other, cluster_key="cluster", seed=SEED, show_progress_bar=False)
    return other.uns["cluster_nhood_enrichment"]["zscore"]


def markers(values: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, set[str]]:
    adata = AnnData(values.astype(np.float32), var=pd.DataFrame(index=names))
    adata.obs["cluster"] = pd.Categorical(labels.astype(str))
    adata.uns["log1p"] = {"base": None}
    kept = adata.obs["cluster"].value_counts()
    groups = [name for name, count in kept.items() if count >= 3]
    sc.tl.rank_genes_groups(adata, "cluster", groups=groups, method="t-test", n_genes=20)
    return {name: set(adata.uns["rank_genes_groups"]["names"][name]) for name in groups}


def compared(kind: str, values: np.ndarray, measured: np.ndarray, adata: AnnData, names: list[str]) -> dict[str, Any]:
    """Return every comparison of some values with the measured ones."""
    known = adata.obs["label"].notna().to_numpy()
    authors = adata.obs["label"].astype(str).to_numpy()
    n = len(np.unique(authors[known]))
    own, truth = clusters(values, n), clusters(measured, n)
    i_own, i_truth = morans(values, adata), morans(measured, adata)
    some = np.isfinite(i_own) & np.isfinite(i_truth)
    spatial = some & (i_truth > 0.1)
    near, near_truth = enrichment(own, adata), enrichment(truth, adata)
    # clusters of two clusterings have no common names: each measured cluster is matched to the one it shares most with
    match = np.array([np.bincount(own[truth == c]).argmax() for c in range(truth.max() + 1)])
    upper = np.triu_indices(len(match))
    pairs = near[np.ix_(match, match)][upper], near_truth[upper]
    fine = np.isfinite(pairs[0]) & np.isfinite(pairs[1])
    found, wanted = markers(values, truth, names), markers(measured, truth, names)
    return {
        "kind": kind,
        "ari_measured": float(adjusted_rand_score(truth, own)),
        "ari_authors": float(adjusted_rand_score(authors[known], own[known])),
        "morans_spearman": float(spearmanr(i_own[some], i_truth[some])[0]),
        "morans_share": float(np.median(i_own[spatial] / i_truth[spatial])),
        "enrichment": float(np.corrcoef(pairs[0][fine], pairs[1][fine])[0, 1]),
        "markers": float(np.mean([len(found[c] & wanted[c]) / 20 for c in wanted if c in found])),
    }


def halves(table: AnnData, columns: np.ndarray) -> np.ndarray:
    """Return log expression of a random half of the counts."""
    raw = dense(table.X).astype(np.int64)
    half = np.random.default_rng(SEED).binomial(raw, 0.5).astype(np.float64)
    return dense(log1p_of_totals(half, np.maximum(half.sum(axis=1), 1)))[:, columns]


def predicted(split: Split, kind: str, arguments: Any) -> AnnData:
    """Return the predictions of one kind for the test section; a fit is kept in the folder ``--out``."""
    file = arguments.out / f"{split.name}-{kind.replace(' ', '_').replace(',', '')}"
    if not file.exists():
        encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
        pk.tl.fit_adapter(split.training, encoder=encoder, progress=False, **FITS[kind]).save(file)
    pk.tl.predict_expression(split.test, pk.Adapter.load(file), progress=False)
    return pk.get.expression(split.test, layer="peka")


def main() -> None:
    arguments = parsed(quick_parser(__doc__))
    kept = KeptRows(arguments.out / "measured.jsonl")
    done = {(row["split"], row["kind"]) for row in kept.rows}

    def add(kind: str, values: np.ndarray) -> None:
        if (name, kind) not in done:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kept.add([{"split": name, **compared(kind, values, measured, adata, names)}])
            print(name, kind, flush=True)

    for name in FOLDS if arguments.only != "table" else ():
        split = load_split(arguments.her2st, name)
        table = split.test["table"]
        for kind in FITS:
            wanted = {kind} if kind != next(iter(FITS)) else {kind, *ONCE}
            if all((name, one) in done for one in wanted):
                continue
            adata = predicted(split, kind, arguments)
            names = list(adata.var_names)
            columns = table.var_names.get_indexer(names)
            measured = dense(log1p_of_totals(table.X, count_totals(table.X, np.arange(table.n_vars))))[:, columns]
            sq.gr.spatial_neighbors(adata, n_neighs=6, coord_type="generic")
            add(kind, np.asarray(adata.X))
            if kind == next(iter(FITS)):  # once: all fits have the same genes
                coords = adata.obsm["spatial"]
                near = neighbour_means(coords, np.zeros(len(coords)), 300.0)
                n = np.diff(near.indptr)[:, None]
                smooth = (n * (near @ measured) + measured) / (n + 1)  # the spot itself is one of them
                for one, values in zip(ONCE, (smooth, halves(table, columns)), strict=True):
                    add(one, values)
    print(pd.DataFrame(kept.rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
