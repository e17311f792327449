"""Tissue that training never showed: how much of it any distance of features finds, and a classifier with labels.

    python benchmarks/tissue_novelty.py --vits PATH --out FOLDER
    python benchmarks/tissue_novelty.py --out FOLDER --only table

Eight synthetic patients, tiles of 112 px at 1.0 um per pixel, ViT-S/14. Two patients at a time are tested, the other
six train, without tiles of which a tenth or more is the state left out (tumour, stroma, immune cells, glands, fat).
Scores: the share of test tiles that are mostly that state above the 95 % quantile of the test tiles with less than a
tenth of it, and the area under the curve, means of four draws. The threshold is the test patients' own, and of each
kind of reading the best of its depths and settings is chosen on the test, both of which no user could do: these are
upper bounds.

Distances (training tiles without the state): squared Mahalanobis distance in 16 and 64 principal components with what
is beside them, the fifth nearest neighbour (cosine; whitened components), a mixture with one covariance (6 and 12
parts). Patches: distance of single tokens, Mahalanobis and third nearest neighbour, mean, 90 % quantile or largest of a
tile. With labels: logistic regression on the training patients' tiles with the state, which are not left out for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pekasc as pk
from _her2st import KeptRows, parsed, quick_parser, vits
from _machine import machine
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.trust import distance_to

BLOCKS = (2, 4, 6, 9, 12)
DEPTHS = ((4,), (6,), (9,), (12,), (2, 4, 6), (6, 9, 12))
TRAINED, MOSTLY = 0.1, 0.5  # shares of the state: of training tiles and other test tiles at most, of its own at least


def tokens_of(tiles: np.ndarray, encoder: pk.models.Encoder) -> dict[int, np.ndarray]:
    """Return by block the tokens of tiles, (n, 1 + patches, d) float16, the class token first."""
    network = EncoderNetwork(encoder, tiles.shape[1])
    model: Any = next(m for m in network.modules() if hasattr(m, "forward_intermediates")).eval()
    found: dict[int, list[np.ndarray]] = {block: [] for block in BLOCKS}
    with torch.inference_mode():
        for start in range(0, len(tiles), 32):
            x = network.normalise(torch.from_numpy(tiles[start : start + 32]))
            blocks = [block - 1 for block in BLOCKS]
            parts = model.forward_intermediates(
                x, indices=blocks, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
            )
            for block, (patches, first) in zip(BLOCKS, parts, strict=True):
                found[block].append(torch.cat([first[:, :1], patches], dim=1).half().numpy())
    return {block: np.concatenate(parts) for block, parts in found.items()}


def neighbour(x: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Return the distance to the k-th nearest of some rows."""
    known = x[rows]
    squared = np.square(x).sum(axis=1)[:, None] + np.square(known).sum(axis=1) - 2 * x @ known.T
    return np.sqrt(np.maximum(np.partition(squared, k - 1, axis=1)[:, k - 1], 0))


def mixture(x: np.ndarray, rows: np.ndarray, parts: int) -> np.ndarray:
    z = PCA(32, random_state=0).fit(x[rows]).transform(x)
    clusters = KMeans(parts, n_init=4, random_state=0).fit(z[rows])
    inverse = LedoitWolf().fit(z[rows] - clusters.cluster_centers_[clusters.labels_]).precision_
    apart = [z - centre for centre in clusters.cluster_centers_]
    return np.min([np.einsum("ij,jk,ik->i", d, inverse, d) for d in apart], axis=0)


def distances(x: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the distance of every tile to the training tiles, by reading."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    white = PCA(32, whiten=True, random_state=0).fit(x[rows]).transform(x)
    return {
        **{f"Mahalanobis, {k}": distance_to(x[rows], k)(x) for k in (16, 64)},
        "neighbour, cosine": neighbour(unit, rows, 5),
        "neighbour, whitened": neighbour(white, rows, 5),
        **{f"mixture of {k}": mixture(x, rows, k) for k in (6, 12)},
    }


def patches(x: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the distance of the patches of every tile, (n, patches, d), to those of the training tiles, by reading."""
    known = x[rows].reshape(-1, x.shape[2]).astype(np.float32)
    known = known[np.random.default_rng(0).permutation(len(known))[:6000]]
    flat = x.reshape(-1, x.shape[2]).astype(np.float32)
    centre, sd = known.mean(axis=0), known.std(axis=0)
    both = np.concatenate([(known - centre) / sd, (flat - centre) / sd])
    first = np.arange(len(known))
    nearest = np.concatenate([neighbour(np.concatenate([both[first], part]), first, 3)[len(known) :]
                              for part in np.array_split(both[len(known) :], 16)])  # fmt: skip
    found = {}
    for name, each in (("Mahalanobis", distance_to(known, 64)(flat)), ("neighbour", nearest)):
        of = each.reshape(len(x), -1)
        found |= {f"{name}, mean": of.mean(1), f"{name}, 90 %": np.quantile(of, 0.9, 1), f"{name}, largest": of.max(1)}
    return found


def labelled(x: np.ndarray, share: np.ndarray, train: np.ndarray) -> np.ndarray:
    rows = train & ((share < TRAINED) | (share > MOSTLY))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    return model.fit(x[rows], share[rows] > MOSTLY).decision_function(x)


def scored(kept: KeptRows, arguments: Any) -> None:
    sdata = pk.datasets.phantom(8, size_um=1200.0, mpp=0.5)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    table = sdata["table"]
    tiles = np.asarray(pk.get.tiles(sdata).sel(tile=table.obs_names).compute())
    region, states = table.obs["region"].astype(str).to_numpy(), table.obsm["phantom_states"]
    regions = list(dict.fromkeys(region))
    tokens = tokens_of(tiles, vits(arguments.vits))
    pooled = {b: np.concatenate([t[:, 0], t[:, 1:].mean(axis=1)], axis=1) for b, t in tokens.items()}
    for state in states.columns:
        if any(row["state"] == state for row in kept.rows):
            continue
        share, rows = states[state].to_numpy(), list[dict[str, Any]]()
        for draw in range(0, len(regions), 2):
            test = np.isin(region, regions[draw : draw + 2])
            own, other = test & (share > MOSTLY), test & (share < TRAINED)
            if own.sum() < 3:
                continue
            train = np.flatnonzero(~test & (share < TRAINED))
            found = {}
            for depth in DEPTHS:
                x = np.concatenate([pooled[block] for block in depth], axis=1).astype(np.float32)
                found |= {("tiles", depth, name): d for name, d in distances(x, train).items()}
                found["labels", depth, "logistic"] = labelled(x, share, ~test)
            for block in BLOCKS:
                found |= {("patches", (block,), name): d for name, d in patches(tokens[block][:, 1:], train).items()}
            for (kind, depth, name), d in found.items():
                above = d[own] > np.quantile(d[other], 0.95)
                auc = roc_auc_score(own[own | other], d[own | other])
                rows.append(
                    {"state": state, "draw": draw, "kind": kind, "depth": "+".join(map(str, depth)), "reading": name,
                     "found": float(above.mean()), "auc": float(auc), "n": int(own.sum())}
                )  # fmt: skip
        kept.add(rows)
        print(state, len(rows), flush=True)


def main() -> None:
    arguments = parsed(quick_parser(__doc__), needs=())
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = KeptRows(arguments.out / "tissue_novelty.jsonl")
    if arguments.only != "table":
        scored(kept, arguments)
    frame = pd.DataFrame(kept.rows)
    means = frame.groupby(["state", "kind", "depth", "reading"], sort=False)[["found", "auc"]].mean().reset_index()
    best = means.loc[means.groupby(["state", "kind"], sort=False)["found"].idxmax()]
    print(best.round(2).to_string(index=False))
    # one reading for all states: the best mean
    across = means.groupby(["kind", "depth", "reading"])["found"].agg(["mean", "min"])
    print(across.sort_values("mean").groupby("kind").tail(2).round(2).to_string())
    print(machine())


if __name__ == "__main__":
    main()
