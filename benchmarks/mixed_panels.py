"""Genes that two of three training sections lack: what they score when they are learned from the third.

    python benchmarks/mixed_panels.py --her2st PATH --vits PATH --out results/panels
    python benchmarks/mixed_panels.py --out results/panels --only table
    python benchmarks/mixed_panels.py --out FOLDER --small    # the phantom and `tiny`, to see that it runs

A random half of all genes is dropped from two of three training sections (``panels=``), each section keeping all genes
in turn. Scored are 50 spatially variable and 50 highly variable genes of the training sections; scores are the mean
Pearson correlation within the test section, against log1p of counts over the totals of all genes in every row. Rows:

``full``: all sections have all genes; ``mixed``: the half is learned from one section, with totals and components of
the shared genes; ``one section``: the adapter is fitted on that section alone; ``imputed``: the shared panel alone, an
adapter of the shared genes, from whose predictions a ridge regression that was fitted on that section's measured
expression gives the dropped ones. ViT-S/14, 112 px at 1.0 um/px. Finished runs stay in ``--out``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from spatialdata import SpatialData

import pekasc as pk
from _her2st import KeptRows, Split, load_split, parsed, quick_parser, split_of, vits
from _machine import machine
from pekasc._expression import dense, expressed_genes, log1p_cp10k
from pekasc.models.selection import pearson

SPLITS = {"C2-C4 to B4": (["C2", "C3", "C4"], ["B4"]), "B4, C2, C3 to C4": (["B4", "C2", "C3"], ["C4"])}
ALPHAS = np.logspace(0, 5, 11)


def predicted(adapter: pk.Adapter, test: SpatialData) -> pd.DataFrame:
    """Return predictions of the test spots by gene; 0 where the adapter has none."""
    pk.tl.predict_expression(test, adapter, progress=False)
    table = test["table"]
    return pd.DataFrame(np.nan_to_num(np.asarray(table.layers["peka"])), columns=table.var_names)


def correlations(split: Split, values: np.ndarray) -> np.ndarray:
    """Return the correlation of every gene of the split, (genes,), mean over test sections; 0 where it has none."""
    table = split.test["table"]
    at = table.var_names.get_indexer(split.genes)
    measured = np.where(at >= 0, dense(log1p_cp10k(table))[:, at], 0)
    sections = table.obs["section"].astype(str).to_numpy()
    found = [pearson(values[sections == s], measured[sections == s]) for s in np.unique(sections)]
    return np.nan_to_num(np.mean(found, axis=0))


def imputed(
    split: Split, region: str, panel_genes: list[str], shared: list[str], of_shared: pd.DataFrame
) -> np.ndarray:
    """Return the split's genes from predictions of the shared ones, by ridge on the measured spots of one region."""
    table = split.training["table"]
    rows = (table.obs["region"] == region).to_numpy()
    # on the scale of the predictions: totals over the shared panel
    panel = np.flatnonzero(table.var_names.isin(panel_genes))
    log = pd.DataFrame(dense(log1p_cp10k(table, total_columns=panel))[rows], columns=table.var_names)
    model = RidgeCV(alphas=ALPHAS).fit(log[shared], log[split.genes])
    return model.predict(of_shared.reindex(columns=shared, fill_value=0.0))


def run(split: Split, keeper: str, seed: int, encoder: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the scores of every row for the genes that were dropped and those that were not."""
    table = split.training["table"]
    names, regions = np.array(table.var_names), sorted(table.obs["region"].astype(str).unique())
    dropped = np.random.default_rng(seed).random(names.size) < 0.5
    panels = {region: list(names if region == keeper else names[~dropped]) for region in regions}
    options = {**options, "encoder": encoder, "groups": None, "progress": False}
    kept = [gene for gene in split.genes if gene in set(names[~dropped])]
    log, labels = dense(log1p_cp10k(table))[:, ~dropped], table.obs["region"].astype(str).to_numpy()
    shared = [str(gene) for gene in names[~dropped][expressed_genes(log, labels)]]
    fits = {
        "full": {"genes": split.genes},
        "mixed": {"genes": split.genes, "panels": panels},
        "one section": {"genes": split.genes, "train": [keeper]},
        "imputed": {"genes": sorted({*shared, *kept}), "panels": {region: list(names[~dropped]) for region in regions}},
    }
    rows = []
    of_split = np.isin(split.genes, names[dropped])
    for row, arguments in fits.items():
        found = predicted(pk.tl.fit_adapter(split.training, **arguments, **options), split.test)
        values = found.reindex(columns=split.genes, fill_value=0.0).to_numpy()
        if row == "imputed":
            values = np.where(of_split, imputed(split, keeper, list(names[~dropped]), shared, found), values)
        r = correlations(split, values)
        for genes, at in split.sets.items():
            rows += [
                {
                    "split": split.name, "keeper": keeper, "seed": seed, "row": row, "genes": genes, "which": which,
                    "n": int(own.sum()), "pearson": float(r[at][own].mean()) if own.any() else float("nan"),
                }
                for which, own in (("dropped", of_split[at]), ("shared", ~of_split[at]))
            ]  # fmt: skip
    return rows


def summary(frame: pd.DataFrame) -> str:
    """Return the mean over sections that keep all genes and seeds, and the change to the full panel."""
    columns = ["split", "which", "genes"]
    wide = frame.groupby(["row", *columns], sort=False)["pearson"].mean().unstack("row")
    lines = ["| test | genes | " + " | ".join(wide) + " |", "| --- " * (2 + len(wide.columns)) + "|"]
    for (split, which, genes), row in wide.iterrows():
        cells = " | ".join(f"{value:.3f} ({100 * (value / row['full'] - 1):+.0f} %)" for value in row)
        lines.append(f"| {split} | {genes}, {which} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default=None, help="such as bone; by default the frozen encoder")
    parser.add_argument("--readout", default="default", help="preset of the readout, such as quick: one field of view")
    parser.add_argument("--small", action="store_true")
    arguments = parsed(parser)
    kind = f"{arguments.method or 'frozen'}-{arguments.readout}{'-small' * arguments.small}"
    lines = KeptRows(arguments.out / f"panels-{kind}.jsonl")
    options: dict[str, Any] = {"method": arguments.method, "readout": arguments.readout}
    done = {(line["split"], line["keeper"], line["seed"]) for line in lines.rows}
    for name, sides in SPLITS.items() if arguments.only is None else ():
        keepers = ["P1S1_spots"] if arguments.small else [f"{section}_spots" for section in sides[0]]
        wanted = [(k, s) for k in keepers for s in range(arguments.seeds) if (name, k, s) not in done]
        if not wanted:
            continue
        if arguments.small:
            # three patients to train on and one to test
            sdata = [pk.datasets.phantom(n_patients=n, size_um=1100, mpp=1.0, random_state=n) for n in (3, 1)]
            for side in sdata:
                pk.pp.tile(side, tile_px=28, mpp=4.0)
            split = split_of(name, *sdata)
        else:
            split = load_split(arguments.her2st, name, folds=SPLITS)
        for keeper, seed in wanted:
            lines.add(run(split, keeper, seed, "tiny" if arguments.small else vits(arguments.vits), options))
            print(name, keeper, seed, flush=True)
    print(summary(pd.DataFrame(lines.rows)))
    print(machine())


if __name__ == "__main__":
    main()
