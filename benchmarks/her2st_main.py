"""Frozen encoder and adapter on real breast tissue, and what is left of the scores when expression is shuffled.

    python benchmarks/her2st_main.py --her2st PATH --vits PATH --out results/her2st

Sections C2 and C3 train and C4 tests (same patient), or C2, C3, C4 train and B4 tests (another patient). ViT-S/14 on
tiles of 112 px at 1.0 um/px, float32. Everything is chosen on training sections: genes here, depth, epochs and penalty
inside ``tl.fit_adapter``. The score is the mean over genes of Pearson's correlation over the spots of the test section;
a gene whose correlation is not defined counts as 0.

Every finished piece is one line of ``results.jsonl`` in the folder ``--out``, with predictions per spot beside it, and
is skipped when it is there; ``--only tables`` prints the tables of what is there. Two runs may share the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from scipy import sparse
from sklearn.neighbors import kneighbors_graph
from spatialdata import SpatialData

import pekasc as pk
from _machine import machine
from _ridge import predict
from pekasc.models.encoders import Depth, candidate_depths
from pekasc.models.heads import fit_ridge
from pekasc.models.selection import choose, inner_folds

SPLITS = {"C4": ("C2", "C3"), "B4": ("C2", "C3", "C4")}
TILE_PX, MPP = 112, 1.0
N_BLOCKS = 12
N_GENES, SEEN_IN, N_NEIGHBOURS = 50, 0.1, 6
SETS = {"svg": "50 SVG", "hvg": "50 HVG"}
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
METHODS: dict[str, dict[str, Any]] = {
    "frozen last": {"method": None, "readout": RIDGE.replace(depth=-1)},
    "frozen chosen": {"method": None, "readout": RIDGE},
    "adapter": {"method": "bone", "readout": RIDGE},
}
COMPUTE = {"device": "cpu", "precision": "fp32"}
CONTROL_TEST, HEAD_REPEATS, WHOLE_REPEATS = "C4", 100, 5
BLOCK_UM, N_BOOTSTRAP = 1000.0, 1000

logger = logging.getLogger("her2st_main")


@dataclass
class Split:
    """Tiled sections of one split, log-normalised expression, and the genes chosen on the training sections."""

    test: str
    sdata: SpatialData
    log: sparse.csr_matrix
    sets: dict[str, list[str]]

    @property
    def train(self) -> tuple[str, ...]:
        return SPLITS[self.test]

    @property
    def table(self) -> ad.AnnData:
        return self.sdata["table"]

    @property
    def genes(self) -> list[str]:
        """Union of the gene sets, in the table's order."""
        wanted = {gene for genes in self.sets.values() for gene in genes}
        return [gene for gene in self.table.var_names if gene in wanted]

    def rows(self, *sections: str) -> np.ndarray:
        return np.flatnonzero(self.table.obs["section"].astype(str).isin(sections))

    def expression(self, rows: np.ndarray) -> np.ndarray:
        """log1p(1e4 * count / total), spots x ``genes``."""
        return self.log[rows][:, self.table.var_names.get_indexer(self.genes)].toarray()

    def positions_um(self, rows: np.ndarray) -> np.ndarray:
        mpp = self.table.uns["pekasc"]["image_mpp"][f"{self.test}_he"]
        return np.asarray(self.table.obsm["spatial"])[rows] * mpp


def load_split(path: Path, test: str) -> Split:
    """Load and tile the sections of one split; choose genes on the training sections."""
    sdata = pk.datasets.her2st((*SPLITS[test], test), path=path)
    pk.pp.tile(sdata, tile_px=TILE_PX, mpp=MPP)
    counts = sdata["table"].X
    total = np.asarray(counts.sum(axis=1)).ravel()
    log = sparse.csr_matrix(counts.multiply(1e4 / np.maximum(total, 1)[:, None])).log1p()
    split = Split(test, sdata, log, {})
    split.sets = choose_genes(split)
    return split


def morans_i(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Moran's I of each column on the graph of the nearest neighbours."""
    w = kneighbors_graph(positions, N_NEIGHBOURS)
    z = values - values.mean(axis=0)
    return (z * (w @ z)).sum(axis=0) / np.maximum((z * z).sum(axis=0), 1e-12) * len(z) / w.sum()


def choose_genes(split: Split) -> dict[str, list[str]]:
    """Genes of highest mean Moran's I, and scanpy's highly variable genes, on the training sections."""
    parts = {s: split.rows(s) for s in split.train}
    seen = [split.log[rows].getnnz(axis=0) >= SEEN_IN * len(rows) for rows in parts.values()]
    keep = np.flatnonzero(np.all(seen, axis=0))
    names = split.table.var_names[keep]
    y = {s: split.log[rows][:, keep].toarray() for s, rows in parts.items()}
    moran = np.mean([morans_i(y[s], split.positions_um(rows)) for s, rows in parts.items()], axis=0)
    stacked = ad.AnnData(sparse.csr_matrix(np.concatenate(list(y.values()))), var=pd.DataFrame(index=names))
    stacked.uns["log1p"] = {}
    sc.pp.highly_variable_genes(stacked, n_top_genes=N_GENES)
    return {
        "svg": [str(names[i]) for i in np.argsort(-moran, kind="stable")[:N_GENES]],
        "hvg": [str(name) for name in stacked.var_names[stacked.var["highly_variable"]]],
    }


def pearson(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Pearson's correlation of every column; 0 where it is not defined."""
    a = predicted.astype(np.float64) - predicted.mean(axis=0, dtype=np.float64)
    b = measured.astype(np.float64) - measured.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    known = (np.ptp(predicted, axis=0) > 0) & (np.ptp(measured, axis=0) > 0) & (scale > 0)
    return np.divide((a * b).sum(axis=0), scale, out=np.zeros(a.shape[1]), where=known)


@dataclass
class Store:
    """The folder of results: one line of JSON per split, method, seed and gene set."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> pd.DataFrame:
        path = self.folder / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        columns = ["split", "method", "seed", "genes", "pearson", "rmse", "depth", "epochs", "alpha", "seconds"]
        return pd.DataFrame([json.loads(line) for line in lines], columns=columns)

    def has(self, split: str, method: str, seed: int) -> bool:
        done = self.read()
        found = done[(done["split"] == split) & (done["method"] == method) & (done["seed"] == seed)]
        return set(SETS) <= set(found["genes"])

    def add(self, split: Split, method: str, seed: int, predicted: np.ndarray, **about: Any) -> None:
        """Score predictions for ``split.genes`` on the test section, and keep them (controls: scores only)."""
        rows = split.rows(split.test)
        measured = split.expression(rows)
        if not method.startswith("shuffled"):
            np.savez_compressed(
                self.predictions(split.test, method, seed),
                predicted=predicted, measured=measured, genes=np.array(split.genes),
                xy_um=split.positions_um(rows), **{name: np.array(genes) for name, genes in split.sets.items()},
            )  # fmt: skip
        lines = []
        for name, genes in split.sets.items():
            at = [split.genes.index(gene) for gene in genes]
            error = predicted[:, at].astype(np.float64) - measured[:, at]
            line = {
                "split": split.test, "method": method, "seed": seed, "genes": name,
                "pearson": float(pearson(predicted[:, at], measured[:, at]).mean()),
                "rmse": float(np.sqrt(np.square(error).mean())), **about,
            }  # fmt: skip
            logger.info("%s", line)
            lines.append(json.dumps(line) + "\n")
        with (self.folder / "results.jsonl").open("a") as f:
            f.write("".join(lines))

    def predictions(self, split: str, method: str, seed: int) -> Path:
        return self.folder / f"{split}_{method.replace(' ', '_')}_{seed}.npz"


def whole_fit(split: Split, encoder: pk.models.Encoder, seed: int, **how: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit on the training sections; return predictions for the test section, and what was chosen."""
    start = time.perf_counter()
    adapter = pk.tl.fit_adapter(
        split.sdata, encoder=encoder, train=[f"{s}_spots" for s in split.train], genes=split.genes, compute=COMPUTE,
        random_state=seed, progress=False, **how,
    )  # fmt: skip
    pk.tl.predict_expression(split.sdata, adapter, compute=COMPUTE, progress=False)
    rows = split.rows(split.test)
    if split.table.obs["peka_train"].to_numpy()[rows].any():
        raise RuntimeError("A test spot was trained on.")
    columns = split.table.var_names.get_indexer(split.genes)
    predicted = np.asarray(split.table.layers["peka"])[np.ix_(rows, columns)]
    if how["method"] is not None and adapter.info["epochs"] == 0:
        logger.warning("%s, seed %d: 0 epochs chosen, the adapter is the frozen encoder.", split.test, seed)
    about = {name: adapter.info[name] for name in ("depth", "epochs", "alpha")}
    return predicted, {**about, "seconds": round(time.perf_counter() - start, 1)}


def run_main(path: Path, encoder: pk.models.Encoder, store: Store, seeds: Sequence[int]) -> None:
    """All methods on both splits, seed after seed; what has no random numbers runs once."""
    splits: dict[str, Split] = {}
    for i, seed in enumerate(seeds):
        for test in SPLITS:
            methods = ["mean predictor", *METHODS] if i == 0 else ["adapter"]
            todo = [(m, seed if m == "adapter" else 0) for m in methods]
            todo = [(m, s) for m, s in todo if not store.has(test, m, s)]
            if todo and test not in splits:
                splits[test] = load_split(path, test)
            for method, number in todo:
                split = splits[test]
                if method == "mean predictor":
                    mean = split.expression(split.rows(*split.train)).mean(axis=0)
                    store.add(split, method, number, np.tile(mean, (len(split.rows(test)), 1)))
                    continue
                predicted, about = whole_fit(split, encoder, number, **METHODS[method])
                store.add(split, method, number, predicted, **about)


def shuffled(split: Split, seed: int) -> np.ndarray:
    """Training rows, section by section, and as the second row which training row's expression each is given."""
    rng = np.random.default_rng(seed)
    parts = [split.rows(s) for s in split.train]
    return np.stack([np.concatenate(parts), np.concatenate([rng.permutation(rows) for rows in parts])])


def frozen_features(split: Split, encoder: pk.models.Encoder, store: Store) -> dict[Depth, np.ndarray]:
    """Features of all spots after every block, from one pass, computed once."""
    blocks = tuple(depth[0] for depth in candidate_depths(N_BLOCKS) if depth)
    path = store.folder / f"{split.test}_frozen_features.npy"
    if not path.exists():
        pk.tl.embed_tiles(
            split.sdata, encoder, readout={"depth": blocks}, compute=COMPUTE, key_added="frozen", progress=False
        )
        np.save(path, split.table.obsm["frozen"])
    parts = np.split(np.load(path), len(blocks), axis=1)
    return {(block,): part for block, part in zip(blocks, parts, strict=True)}


def head_on(split: Split, features: dict[Depth, np.ndarray], rows: np.ndarray, given: np.ndarray) -> tuple[Any, ...]:
    """Choose depth and penalty, fit the head as the package does; return predictions for the test section."""
    y = split.expression(given)
    sections = split.table.obs["section"].astype(str).to_numpy(dtype=object)[rows]
    folds = inner_folds(sections, split.positions_um(rows), sections, margin_um=TILE_PX * MPP)
    chosen = choose({depth: x[rows] for depth, x in features.items()}, y, folds, None)
    x = features[chosen.depth]
    fit = fit_ridge(x[rows], y)
    return predict(fit, chosen.alpha, x[split.rows(split.test)]), chosen


def run_control(path: Path, encoder: pk.models.Encoder, store: Store) -> None:
    """Give training spots the expression of other spots of their section; score against what was measured."""
    todo = [i for i in range(HEAD_REPEATS) if not store.has(CONTROL_TEST, "shuffled head", i)]
    whole = [i for i in range(WHOLE_REPEATS) if not store.has(CONTROL_TEST, "shuffled whole", i)]
    if not todo and not whole:
        return
    split = load_split(path, CONTROL_TEST)
    if todo:
        features = frozen_features(split, encoder, store)
        if not store.has(CONTROL_TEST, "true head", 0):
            rows = shuffled(split, 0)[0]
            predicted, chosen = head_on(split, features, rows, rows)
            store.add(split, "true head", 0, predicted, depth=str(chosen.depth[0]), alpha=chosen.alpha)
        for i in todo:
            predicted, chosen = head_on(split, features, *shuffled(split, i))
            store.add(split, "shuffled head", i, predicted, depth=str(chosen.depth[0]), alpha=chosen.alpha)
    counts = split.table.X.copy()
    for i in whole:
        rows, given = shuffled(split, 1000 + i)
        order = np.arange(split.table.n_obs)
        order[rows] = given
        split.table.X = counts[order]
        predicted, about = whole_fit(split, encoder, i, **METHODS["adapter"])
        split.table.X = counts
        store.add(split, "shuffled whole", i, predicted, **about)


def load_predictions(store: Store, split: str, method: str) -> list[dict[str, np.ndarray]]:
    done = store.read()
    seeds = sorted(set(done.loc[(done["split"] == split) & (done["method"] == method), "seed"]))
    out = []
    for seed in seeds:
        with np.load(store.predictions(split, method, seed)) as stored:
            out.append(dict(stored))
    return out


def bootstrap(store: Store, split: str, one: str, other: str, genes: str) -> dict[str, float]:
    """Difference of scores, mean over seeds, and how it varies over resampled blocks of the test section."""
    first, second = load_predictions(store, split, one), load_predictions(store, split, other)
    at = np.isin(first[0]["genes"], first[0][genes])
    measured = first[0]["measured"][:, at]
    corner = np.floor(first[0]["xy_um"] / BLOCK_UM).astype(int)
    _, block = np.unique(corner, axis=0, return_inverse=True)
    members = [np.flatnonzero(block.ravel() == b) for b in range(block.max() + 1)]

    def difference(rows: np.ndarray) -> float:
        a, b = (
            np.mean([pearson(p["predicted"][np.ix_(rows, np.flatnonzero(at))], measured[rows]).mean() for p in side])
            for side in (first, second)
        )
        return float(a - b)

    rng = np.random.default_rng(0)
    drawn = [
        difference(np.concatenate([members[b] for b in rng.integers(len(members), size=len(members))]))
        for _ in range(N_BOOTSTRAP)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "difference": difference(np.arange(len(measured))), "sd": float(np.std(drawn, ddof=1)),
        "low": float(low), "high": float(high), "blocks": len(members),
    }  # fmt: skip


def markdown(rows: list[list[str]], header: list[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def score_table(done: pd.DataFrame, value: str) -> str:
    """Methods x (split, gene set): mean over seeds, and each seed's value where there are several."""
    rows = []
    for method in ("mean predictor", *METHODS):
        row = [method]
        for split in SPLITS:
            for genes in SETS:
                at = (done["split"] == split) & (done["method"] == method) & (done["genes"] == genes)
                values = done[at].sort_values("seed")[value].to_list()
                each = " (" + ", ".join(f"{v:.3f}" for v in values) + ")" if len(values) > 1 else ""
                row.append(f"{np.mean(values):.3f}{each}" if values else "")
        rows.append(row)
    return markdown(rows, [value, *(f"{split} {name}" for split in SPLITS for name in SETS.values())])


def choice_table(done: pd.DataFrame) -> str:
    part = done[(done["genes"] == "svg") & done["method"].isin(METHODS)].sort_values(["split", "method", "seed"])
    rows = [
        [r["split"], r["method"], str(r["seed"]), str(r["depth"]), str(int(r["epochs"])), f"{r['alpha']:.3g}",
         f"{r['seconds']:.0f}"] for _, r in part.iterrows()
    ]  # fmt: skip
    return markdown(rows, ["split", "method", "seed", "depth", "epochs", "alpha", "seconds"])


def difference_table(done: pd.DataFrame, store: Store) -> str:
    rows = []
    for split in SPLITS:
        for other in ("frozen last", "frozen chosen"):
            for genes, name in SETS.items():
                part = done[(done["split"] == split) & (done["genes"] == genes)]
                if not {"adapter", other} <= set(part["method"]):
                    continue
                found = bootstrap(store, split, "adapter", other, genes)
                base = part.loc[part["method"] == other, "pearson"].mean()
                rows.append([
                    f"{split} {name}", f"adapter - {other}", f"{found['difference']:+.3f}",
                    f"{100 * found['difference'] / base:+.0f} %", f"{found['sd']:.3f}",
                    f"{found['low']:+.3f} to {found['high']:+.3f}", str(found["blocks"]),
                ])  # fmt: skip
    return markdown(rows, ["test", "difference", "mean", "relative", "sd", "95 % interval", "blocks"])


def control_table(done: pd.DataFrame) -> str:
    rows = []
    part = done[done["split"] == CONTROL_TEST]
    for control, true in (("shuffled head", "true head"), ("shuffled whole", "adapter")):
        for genes, name in SETS.items():
            found = part[part["genes"] == genes]
            values = found.loc[found["method"] == control, "pearson"].to_numpy()
            score = found.loc[found["method"] == true, "pearson"].mean()
            if len(values) < 2 or np.isnan(score):
                continue
            error = values.std(ddof=1) / np.sqrt(len(values))
            rows.append([
                control, name, str(len(values)), f"{values.mean():+.4f}", f"{values.std(ddof=1):.4f}", f"{error:.4f}",
                f"{values.mean() / error:+.1f}", f"{np.percentile(values, 99):.3f}", f"{values.max():.3f}",
                f"{score:.3f}",
            ])  # fmt: skip
    header = [
        "control",
        "genes",
        "repeats",
        "mean",
        "sd",
        "se",
        "mean / se",
        "99th percentile",
        "largest",
        "true score",
    ]
    return markdown(rows, header)


def tables(store: Store) -> str:
    done = store.read().drop_duplicates(["split", "method", "seed", "genes"], keep="last")
    parts = [score_table(done, "pearson"), score_table(done, "rmse"), choice_table(done)]
    parts += [difference_table(done, store), control_table(done)]
    parts.append(f"{machine()}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, help="folder with B4, C2, C3, C4")
    parser.add_argument("--vits", type=Path, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True, help="folder for results and predictions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["main", "control", "tables"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    torch.set_num_threads(args.threads)
    store = Store(args.out)
    if args.only != "tables":
        if args.her2st is None or args.vits is None:
            parser.error("--her2st and --vits are needed, except with --only tables")
        # the size that the weights' position table was made for
        encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=args.vits, model_kwargs={"img_size": 518})
        if args.only != "control":
            run_main(args.her2st, encoder, store, args.seeds)
        if args.only != "main":
            run_control(args.her2st, encoder, store)
    print(tables(store))


if __name__ == "__main__":
    main()
