"""The main job: train on some sections, predict others, score the predictions and plot them.

    python tutorials/quickstart.py                       # synthetic tissue: train on one patient, predict the other
    python tutorials/quickstart.py --her2st PATH         # real tissue: train on C2 and C3, predict C4 and B4

Writes figures and a SpatialData store to the folder `quickstart_output` (or --out).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from spatialdata import SpatialData

import pekasc as pk


def load(her2st: Path | None) -> tuple[SpatialData, list[str], str]:
    """Return sections, those to train on, and a gene to look at."""
    if her2st is None:
        return pk.datasets.phantom(n_patients=2), ["P1S1"], ""
    return pk.datasets.her2st(("C2", "C3", "C4", "B4"), path=her2st), ["C2", "C3"], "GNAS"


def table_of_scores(sdata: SpatialData, adapter: pk.Adapter, train: list[str]) -> pd.DataFrame:
    """Return mean Pearson and RMSE over genes, per section that was not trained on, for three predictors."""
    table = sdata["table"]
    rows = []
    for method, layer in (("frozen encoder", "frozen"), ("adapter", "peka")):
        scores = pk.tl.evaluate(sdata, layer=layer)
        for section, part in scores.groupby("group"):
            rows.append((method, section, part["pearson"].mean(), part["rmse"].mean()))
    # predicting every gene's training mean: no correlation, and the RMSE to beat
    log = sc.pp.log1p(sc.pp.normalize_total(table, target_sum=1e4, copy=True), copy=True)
    measured = log.X.toarray() if hasattr(log.X, "toarray") else log.X
    trained = table.obs["section"].isin(train).to_numpy()
    genes = table.var_names.get_indexer(adapter.genes)
    mean = measured[trained][:, genes].mean(axis=0)
    for section in table.obs["region"][~trained].unique():
        here = measured[(table.obs["region"] == section).to_numpy()][:, genes]
        rows.append(("mean predictor", section, 0.0, float(np.sqrt(np.square(here - mean).mean(axis=0)).mean())))
    frame = pd.DataFrame(rows, columns=["method", "section", "mean Pearson", "mean RMSE"])
    return frame.pivot(index="section", columns="method", values=["mean Pearson", "mean RMSE"]).round(3)


def main() -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, help="folder with her2st sections; synthetic tissue without it")
    parser.add_argument("--out", type=Path, default=Path("quickstart_output"))
    arguments = parser.parse_args()
    # anndata warns at every array that it writes of another layout in its next release: choose the present one
    if getattr(ad.settings, "auto_shard_zarr_v3", True) is None:
        ad.settings.auto_shard_zarr_v3 = False
    start = time.perf_counter()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    sdata, train, gene = load(arguments.her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    frozen = pk.tl.fit_adapter(sdata, method=None, train=train, progress=False)
    adapter = pk.tl.fit_adapter(sdata, train=train)
    print(f"\n{adapter}\n")
    pk.tl.predict_expression(sdata, frozen, key_added="frozen", progress=False)
    pk.tl.predict_expression(sdata, adapter, progress=False)
    print(table_of_scores(sdata, adapter, train).to_string(), "\n")

    gene = gene or str(sdata["table"].var["peka_pearson"].idxmax())
    figures = {
        "tiles": pk.pl.tiles(sdata, n=12),
        "expression": pk.pl.expression(sdata, gene),
        "gene_scores": pk.pl.gene_scores(sdata).figure,
        "history": np.ravel(pk.pl.history(adapter))[0].figure,
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120, bbox_inches="tight")

    adapter.save(out / "adapter")
    store = out / "sections.zarr"
    if store.exists():
        shutil.rmtree(store)
    sdata.write(store)
    print(f"Figures, adapter and SpatialData are in {out}/ ({time.perf_counter() - start:.0f} s).")


if __name__ == "__main__":
    main()
