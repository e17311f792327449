"""The main figures on real tissue: frozen last block, frozen best depth, adapter; and the shuffled control.

    python benchmarks/her2st_main.py --her2st PATH --vits PATH --out FOLDER
    python benchmarks/her2st_main.py --her2st PATH --vits PATH --out FOLDER --control
    python benchmarks/her2st_main.py --out FOLDER --report

Splits: train C2 + C3, test C4 (the same patient); train C2 + C3 + C4, test B4 (another patient). Tiles of 112 px at
1.0 um/px. 50 spatially variable genes and 50 highly variable genes, chosen on the training sections; one head predicts
their union. Finished fits are kept in FOLDER and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData
from sklearn.neighbors import kneighbors_graph
from spatialdata import SpatialData

import pekasc as pk
from pekasc._expression import log1p_cp10k
from pekasc._sections import tiled_sections
from pekasc.models._choose import candidate_depths, choose
from pekasc.models._embed import embed
from pekasc.models._encoders import FrozenEncoder
from pekasc.models._fit import pearson
from pekasc.models._folds import inner_folds
from pekasc.models._heads import fit_ridge
from pekasc.tl._inputs import tile_stream

log = logging.getLogger("her2st_main")
SPLITS = {"C2+C3>C4": (["C2", "C3"], "C4"), "C2+C3+C4>B4": (["C2", "C3", "C4"], "B4")}
METHODS: dict[str, dict[str, Any]] = {
    "frozen last": {"method": None, "depth": -1},
    "frozen best": {"method": None},
    "adapter": {"method": "bone"},
}
BLOCK_UM = 1000.0


def gene_sets(sdata: SpatialData, train: list[str]) -> dict[str, list[str]]:
    """Return 50 spatially variable and 50 highly variable genes, from the training sections alone."""
    table = sdata["table"]
    parts = [table[(table.obs["section"] == section).to_numpy()] for section in train]
    logs = [np.asarray(log1p_cp10k(part).todense()) for part in parts]
    seen = np.all([(values > 0).mean(axis=0) >= 0.1 for values in logs], axis=0)
    names = table.var_names.to_numpy()[seen]
    morans = []
    for part, values in zip(parts, logs, strict=True):
        graph = kneighbors_graph(part.obsm["spatial"], 6).toarray() / 6
        z = values[:, seen] - values[:, seen].mean(axis=0)
        morans.append((z * (graph @ z)).sum(axis=0) / np.maximum((z * z).sum(axis=0), 1e-9))
    svg = names[np.argsort(-np.mean(morans, axis=0))[:50]]
    pooled = AnnData(np.concatenate(logs)[:, seen], var=pd.DataFrame(index=names))
    sc.pp.highly_variable_genes(pooled, n_top_genes=50)
    return {"svg": list(svg), "hvg": list(names[pooled.var["highly_variable"].to_numpy()])}


def load(path: Path, train: list[str], test: str) -> SpatialData:
    """Return the tiled sections of a split."""
    sdata = pk.datasets.her2st((*train, test), path=path)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    return sdata


def run(path: Path, encoder: pk.models.Encoder, out: Path, seeds: list[int]) -> None:
    """Fit every method on every split and keep the predictions of the test section."""
    for seed in seeds:
        for name, (train, test) in SPLITS.items():
            todo = [
                m for m in METHODS if (m == "adapter" or seed == seeds[0]) and not file(out, name, m, seed).exists()
            ]
            if not todo:
                continue
            sdata = load(path, train, test)
            sets = gene_sets(sdata, train)
            union = sorted({*sets["svg"], *sets["hvg"]})
            table = sdata["table"]
            here = (table.obs["section"] == test).to_numpy()
            measured = np.asarray(log1p_cp10k(table[here])[:, table.var_names.get_indexer(union)].todense())
            for method in todo:
                start = time.perf_counter()
                adapter = pk.tl.fit_adapter(
                    sdata,
                    encoder=encoder,
                    train=train,
                    genes=union,
                    random_state=seed,
                    progress=False,
                    **METHODS[method],
                )
                pk.tl.predict_expression(sdata, adapter, progress=False)
                predicted = sdata["table"].layers["peka"][here][:, table.var_names.get_indexer(adapter.genes)]
                order = [list(adapter.genes).index(gene) for gene in union]
                facts = {"depth": adapter.info["depth"], "epochs": adapter.info["epochs"], "alpha": adapter.head.alpha}
                facts["seconds"] = round(time.perf_counter() - start)
                np.savez(
                    file(out, name, method, seed),
                    predicted=predicted[:, order], measured=measured, um=table.obsm["spatial"][here] * 0.688,
                    genes=union, svg=np.isin(union, sets["svg"]), hvg=np.isin(union, sets["hvg"]),
                    facts=json.dumps(facts),
                )  # fmt: skip
                log.info("%s %s seed %d: %s", name, method, seed, facts)


def file(out: Path, split: str, method: str, seed: int) -> Path:
    """Return where one fit's predictions are kept."""
    return out / f"{split.replace('>', '-to-')}_{method.replace(' ', '-')}_{seed}.npz"


def control(path: Path, encoder: pk.models.Encoder, out: Path, heads: int, fits: int) -> None:
    """Permute expression over spots within the training sections of C2 + C3 and score on C4."""
    name = "C2+C3>C4"
    train, test = SPLITS[name]
    sdata = load(path, train, test)
    sets = gene_sets(sdata, train)
    union = sorted({*sets["svg"], *sets["hvg"]})
    table = sdata["table"]
    columns = table.var_names.get_indexer(union)
    y = np.asarray(log1p_cp10k(table)[:, columns].todense())
    sections, spec = tiled_sections(sdata)
    stream, rows = tile_stream(sections, spec)
    model = FrozenEncoder(encoder, spec.tile_px)
    features = embed(model, stream, candidate_depths(model.n_blocks), batch_size=64, device=torch.device("cpu"))
    label = table.obs["section"].astype(str).to_numpy()[rows]
    um = np.concatenate([s.centres_um for s in sections])
    fit_rows, test_rows = np.flatnonzero(np.isin(label, train)), np.flatnonzero(label == test)
    folds = inner_folds(label[fit_rows], um[fit_rows], label[fit_rows], spec.side_um)
    y, svg = y[rows], np.isin(union, sets["svg"])
    result: list[dict[str, float]] = []
    for repetition in range(-1, heads):
        rng = np.random.default_rng(repetition + 1)
        target = y.copy()
        if repetition >= 0:
            for section in train:
                at = np.flatnonzero(label == section)
                target[at] = target[rng.permutation(at)]
        train_features = {depth: x[fit_rows] for depth, x in features.items()}
        chosen = choose(train_features, target[fit_rows], folds, None)
        head = fit_ridge(train_features[chosen.depth], target[fit_rows]).head(chosen.alpha)
        r = np.nan_to_num(pearson(head.predict(features[chosen.depth][test_rows]), y[test_rows]))
        result.append({"repetition": repetition, "svg": float(r[svg].mean()), "hvg": float(r[~svg].mean())})
    (out / "control_heads.json").write_text(json.dumps(result))
    whole = []
    counts = table.X.copy()
    for repetition in range(fits):
        rng = np.random.default_rng(1000 + repetition)
        order = np.arange(table.n_obs)
        for section in train:
            at = np.flatnonzero((table.obs["section"] == section).to_numpy())
            order[at] = rng.permutation(at)
        table.X = counts[order]
        adapter = pk.tl.fit_adapter(sdata, encoder=encoder, train=train, genes=union, random_state=0, progress=False)
        table.X = counts
        pk.tl.predict_expression(sdata, adapter, progress=False)
        here = (table.obs["section"] == test).to_numpy()
        measured = np.asarray(log1p_cp10k(table[here])[:, columns].todense())
        r = np.nan_to_num(pearson(table.layers["peka"][here][:, columns], measured))
        whole.append({"repetition": repetition, "svg": float(r[svg].mean()), "hvg": float(r[~svg].mean())})
        (out / "control_fits.json").write_text(json.dumps(whole))
        log.info("whole fit %d: %s", repetition, whole[-1])


def scores(predicted: np.ndarray, measured: np.ndarray, genes: np.ndarray) -> float:
    """Return the mean Pearson correlation over genes; a gene that is constant counts as 0."""
    return float(np.nan_to_num(pearson(predicted[:, genes], measured[:, genes])).mean())


def report(out: Path) -> str:
    """Return tables of scores and paired differences as Markdown."""
    files = {tuple(p.stem.rsplit("_", 2)): dict(np.load(p)) for p in sorted(out.glob("*.npz"))}
    lines = [
        "| split | genes | mean predictor | frozen last | frozen best | adapter, per seed | mean |",
        "|---|---|---|---|---|---|---|",
    ]
    pairs = []
    for split in SPLITS:
        key = split.replace(">", "-to-")
        for genes in ("svg", "hvg"):
            value: dict[str, list[float]] = {}
            for method in METHODS:
                found = [f for (s, m, _), f in files.items() if s == key and m == method.replace(" ", "-")]
                value[method] = [scores(f["predicted"], f["measured"], f[genes]) for f in found]
            adapter = value["adapter"]
            if not adapter or not value["frozen last"]:
                continue
            each = ", ".join(f"{v:.3f}" for v in adapter)
            lines.append(
                f"| {split} | 50 {genes.upper()} | 0 | {value['frozen last'][0]:.3f} "
                f"| {value['frozen best'][0]:.3f} | {each} | {np.mean(adapter):.3f} |"
            )
            for rival in ("frozen last", "frozen best"):
                pairs.append(f"| {split} | 50 {genes.upper()} | {rival} | {paired(files, key, rival, genes)} |")
    head = ["", "| split | genes | adapter minus | difference, sd, 95 % interval |", "|---|---|---|---|"]
    facts = [f"- {' '.join(k)}: {json.loads(str(f['facts']))}" for k, f in files.items()]
    return "\n".join([*lines, *head, *pairs, "", *facts, *report_control(out)])


def paired(files: dict[Any, Any], key: str, rival: str, genes: str, n: int = 1000) -> str:
    """Return the paired difference with a bootstrap over squares of 1 mm of the test section."""
    (base,) = [f for (s, m, _), f in files.items() if s == key and m == rival.replace(" ", "-")]
    seeds = [f for (s, m, _), f in files.items() if s == key and m == "adapter"]
    square = np.floor(base["um"] / BLOCK_UM).astype(int)
    _, block = np.unique(square, axis=0, return_inverse=True)
    block = block.ravel()
    members = [np.flatnonzero(block == b) for b in range(block.max() + 1)]

    def difference(rows: np.ndarray) -> float:
        ours = np.mean([scores(f["predicted"][rows], f["measured"][rows], f[genes]) for f in seeds])
        return float(ours - scores(base["predicted"][rows], base["measured"][rows], base[genes]))

    rng = np.random.default_rng(0)
    drawn = [
        difference(np.concatenate([members[b] for b in rng.integers(len(members), size=len(members))]))
        for _ in range(n)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    whole = difference(np.arange(len(block)))
    return f"{whole:+.3f}, {np.std(drawn):.3f}, [{low:+.3f}, {high:+.3f}]"


def report_control(out: Path) -> list[str]:
    """Return what the shuffled control showed."""
    lines = []
    if (out / "control_heads.json").exists():
        rows = pd.DataFrame(json.loads((out / "control_heads.json").read_text()))
        true, null = rows[rows["repetition"] < 0].iloc[0], rows[rows["repetition"] >= 0]
        for genes in ("svg", "hvg"):
            error = null[genes].std() / np.sqrt(len(null))
            lines.append(
                f"- head alone, {len(null)} permutations, {genes.upper()}: mean {null[genes].mean():+.4f} "
                f"(standard error {error:.4f}), "
                f"99th percentile {null[genes].quantile(0.99):.3f}, true {true[genes]:.3f}"
            )
    if (out / "control_fits.json").exists():
        whole = pd.DataFrame(json.loads((out / "control_fits.json").read_text()))
        for genes in ("svg", "hvg"):
            each = ", ".join(f"{v:+.3f}" for v in whole[genes])
            error = whole[genes].std() / np.sqrt(len(whole))
            lines.append(
                f"- whole fits, {genes.upper()}: {each}; mean {whole[genes].mean():+.4f}, standard error {error:.4f}"
            )
    return ["", *lines]


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, help="folder with B4, C2, C3, C4")
    parser.add_argument("--vits", type=Path, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True, help="folder for predictions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--heads", type=int, default=100)
    parser.add_argument("--fits", type=int, default=5)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        print(report(arguments.out))
        return
    torch.set_num_threads(arguments.threads)
    encoder = pk.models.Encoder(
        "vit_small_patch14_dinov2", weights=str(arguments.vits), model_kwargs={"img_size": 518}, key="vits"
    )
    if arguments.control:
        control(arguments.her2st, encoder, arguments.out, arguments.heads, arguments.fits)
    else:
        run(arguments.her2st, encoder, arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
