"""Maps between spots and in gaps: the plain prediction, the measured spots interpolated, and both by kriging.

    python benchmarks/super_resolution.py --out FOLDER --part phantom
    python benchmarks/super_resolution.py --her2st PATH --vits PATH --out FOLDER --part her2st
    python benchmarks/super_resolution.py --out FOLDER --only table

``phantom``: an adapter (encoder `tiny`, `method=None`) trained on three synthetic patients, the map of the fourth at
25 um, from spots 100 um apart (Visium) or 200 um (ST), of the phantom's own counts and of a tenth of them. The truth is
known at every tile; Pearson correlation over the tiles, mean of genes that depend on the tissue.

``her2st``: an adapter (ViT-S/14, `method=None`) trained on other sections; blocks of 1, 3 x 3 and 5 x 5 spots are held
out, a fifth of the spots at a time, such that every spot is held out once. Pearson correlation of the held-out spots
with what was measured there, per gene over the section, mean of 50 spatially and 50 highly variable genes that the
training sections choose. Nothing that is fitted or chosen sees the held-out spots.

The measured spots alone are interpolated by the same kriging, with the same choice of range and noise, around the mean
of the spots that are not held out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import pekasc as pk
from _her2st import FOLDS, KeptRows, load_split, parsed, quick_parser, vits
from _machine import machine
from pekasc._expression import dense, log1p_cp10k
from pekasc.models.kriging import fit_kriging
from pekasc.models.selection import pearson

QUIET: dict[str, Any] = {"progress": False, "compute": {"device": "cpu"}}
BLOCKS = (1, 3, 5)
ARRAYS = {"visium": 1400.0, "st": 2000.0}
SEEDS = (0, 1, 2)
NAMES = {"plain": "plain prediction", "alone": "measured spots alone", "pulled": "prediction pulled to spots"}


def interpolated(table: AnnData, spots_um: np.ndarray, genes: list[str], places_um: np.ndarray) -> np.ndarray:
    """Return the kriging of what spots measured, without any prediction, at other places."""
    values = dense(log1p_cp10k(table))[:, table.var_names.get_indexer(genes)]
    totals = np.asarray(table.X.sum(axis=1)).ravel()
    mean = values.mean(axis=0)
    return fit_kriging(spots_um, values - mean, np.median(totals) / totals).at(places_um)[0] + mean


def thinned(counts: Any, share: float, seed: int) -> Any:
    """Return binomial draws of counts."""
    out = sparse.csr_matrix(counts)
    out.data = np.random.default_rng(seed).binomial(out.data.astype(int), share).astype(np.float32)
    out.eliminate_zeros()
    return out


def phantom(kept: KeptRows) -> None:
    for seed in SEEDS:
        for array, size in ARRAYS.items():
            if any((row["array"], row["seed"]) == (array, seed) for row in kept.rows):
                continue
            kept.add(phantom_rows(array, size, seed))


def phantom_rows(array: str, size: float, seed: int) -> Iterator[dict[str, Any]]:
    sdata = pk.datasets.phantom(4, size_um=size, mpp=1.0, n_genes=100, array=array, random_state=seed)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    train = [f"P{i}S1_spots" for i in (1, 2, 3)]
    adapter = pk.tl.fit_adapter(sdata, method=None, train=train, **QUIET)
    table = sdata["table"]
    pk.pp.tile_grid(sdata, "P4S1_he", stride_um=25, tile_px=56, mpp=2.0, min_sharpness=None, max_pen=None)
    own = (table.obs["region"] == "P4S1_spots").to_numpy()
    for depth, share in (("as sequenced", 1.0), ("a tenth", 0.1)):
        spots = table[own].copy()
        spots.X = spots.X if share == 1 else thinned(spots.X, share, seed)
        spots = spots[np.asarray(spots.X.sum(axis=1)).ravel() > 0].copy()
        spots.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": ["P4S1_spots"]}
        sdata.tables["spots"] = spots
        with tempfile.TemporaryDirectory() as store:
            maps = {}
            for name, how in (("plain", {}), ("pulled", {"measured": "kriging", "measured_table": "spots"})):
                pk.tl.predict_expression(sdata, adapter, table_name="grid", store=store, **how, **QUIET)
                maps[name] = pk.get.expression(sdata, table_name="grid")
            sd = np.asarray(sdata["grid"].layers["peka_kriging_sd"])
        genes = list(maps["plain"].var_names)
        places = maps["plain"].obsm["spatial"]
        truth = pk.datasets.phantom_truth(sdata, "P4S1_he", coords_um=places)[genes].to_numpy()
        spots_um = np.asarray(spots.obsm["spatial"])  # 1 um per pixel
        found = {name: np.asarray(of.X) for name, of in maps.items()}
        found["alone"] = interpolated(spots, spots_um, genes, places)
        kinds = table.var.loc[genes, "phantom_depends_on"].to_numpy()
        moved = (found["pulled"] != found["plain"]).any(axis=0)
        covered = (np.abs(found["pulled"] - truth) <= 1.96 * sd).mean(axis=0)
        for name, values in found.items():  # a constant map, of a gene without structure, scores 0
            r, rmse = np.nan_to_num(pearson(values, truth)), np.sqrt(np.square(values - truth).mean(axis=0))
            yield {
                "array": array, "seed": seed, "depth": depth, "map": name,
                "n_spots": spots.n_obs, "n_tiles": len(truth),
                **{kind: float(np.mean(r[kinds == kind])) for kind in ("state", "density")},
                "rmse": float(rmse[kinds != "nothing"].mean()),
                "rmse_nothing": float(rmse[kinds == "nothing"].mean()),
                "pulled": float(moved[kinds != "nothing"].mean()),
                "pulled_nothing": float(moved[kinds == "nothing"].mean()),
                "covered": float(covered[moved].mean()),
            }  # fmt: skip


def her2st(arguments: argparse.Namespace, kept: KeptRows) -> None:
    for name in FOLDS:
        if any(row["split"] == name for row in kept.rows):
            continue
        split = load_split(arguments.her2st, name)
        adapter = pk.tl.fit_adapter(split.training, encoder=vits(arguments.vits), method=None, **QUIET)
        rows = []
        with tempfile.TemporaryDirectory() as store:
            for side in BLOCKS:
                rows += her2st_rows(split.test, adapter, side, split.genes, split.sets, store, name)
                print(name, side, flush=True)
        kept.add(rows)


def her2st_rows(
    sdata: SpatialData, adapter: pk.Adapter, side: int, genes: list[str], sets: dict[str, np.ndarray], store: str,
    split: str,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    table = sdata["table"]
    genes_here = [gene for gene in genes if gene in set(adapter.genes) & set(table.var_names)]
    columns = table.var_names.get_indexer(genes_here)
    mpp = next(iter(table.uns["pekasc"]["image_mpp"].values()))
    places = np.asarray(table.obsm["spatial"]) * mpp
    measured = dense(log1p_cp10k(table))[:, columns]
    pk.tl.predict_expression(sdata, adapter, genes=genes_here, store=store, **QUIET)
    found = {name: np.full(measured.shape, np.nan, np.float32) for name in NAMES}
    found["plain"][:] = np.asarray(table.layers["peka"])[:, columns]
    col, row = (
        np.round(table.obs[name].to_numpy(dtype=float)).astype(int) // side for name in ("array_col", "array_row")
    )
    fold = (col + 2 * row) % 5  # no two neighbouring blocks at once
    pulled = []
    for number in range(5):
        out = fold == number
        visible = table[~out].copy()
        if "visible" in sdata.tables:
            del sdata.tables["visible"]
        sdata.tables["visible"] = visible
        pk.tl.predict_expression(
            sdata,
            adapter,
            genes=genes_here,
            table_added="fine",
            measured="kriging",
            measured_table="visible",
            store=store,
            **QUIET,
        )
        fine = sdata["fine"]
        at = fine.var_names.get_indexer(genes_here)
        found["pulled"][out] = np.asarray(fine.layers["peka"])[np.ix_(out, at)]
        found["alone"][out] = interpolated(visible, places[~out], genes_here, places[out])
        own = found["plain"][out]
        pulled.append(float((found["pulled"][out] != own).any(axis=0).mean()))
        del sdata.tables["fine"]
    for name, values in found.items():
        r = np.nan_to_num(pearson(values, measured))
        of_gene = dict(zip(genes_here, r, strict=True))
        scores = {of: float(np.mean([of_gene.get(genes[i], 0.0) for i in at])) for of, at in sets.items()}
        rmse = float(np.sqrt(np.square(values - measured).mean(axis=0)).mean())
        yield {"split": split, "side": side, "map": name, **scores, "rmse": rmse, "pulled": float(np.mean(pulled))}


def tables(phantoms: list[dict[str, Any]], sections: list[dict[str, Any]]) -> None:
    if phantoms:
        frame = pd.DataFrame(phantoms)
        print(
            "| spots | counts | map | state | density | RMSE | RMSE, genes of nothing |\n|---|---|---|---|---|---|---|"
        )
        for (array, depth), of in frame.groupby(["array", "depth"], sort=False):
            for name, label in NAMES.items():
                own = of[of["map"] == name]
                cells = []
                for metric in ("state", "density", "rmse", "rmse_nothing"):
                    cells.append(f"{own[metric].mean():.3f} ({own[metric].min():.3f}-{own[metric].max():.3f})")
                print(f"| {array} | {depth} | {label} | {' | '.join(cells)} |")
        columns = ["pulled", "pulled_nothing", "covered", "n_spots", "n_tiles"]
        print(frame[frame["map"] == "pulled"].groupby(["array", "depth"], sort=False)[columns].mean().round(3))
    if sections:
        frame = pd.DataFrame(sections)
        print("\n| section | held out | map | svg | hvg | RMSE |\n|---|---|---|---|---|---|")
        for (split, side), of in frame.groupby(["split", "side"], sort=False):
            for name, label in NAMES.items():
                own = of[of["map"] == name].iloc[0]
                size = "1 spot" if side == 1 else f"{side} x {side}"
                print(f"| {split} | {size} | {label} | {own['svg']:.3f} | {own['hvg']:.3f} | {own['rmse']:.3f} |")
        print(frame[frame["map"] == "pulled"][["split", "side", "pulled"]].round(2).to_string(index=False))


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=["phantom", "her2st"])
    arguments = parsed(parser, needs=())
    kept = {part: KeptRows(Path(arguments.out) / f"{part}.jsonl") for part in ("phantom", "her2st")}
    if arguments.only != "table":
        if arguments.part == "phantom":
            phantom(kept["phantom"])
        elif arguments.part == "her2st" and arguments.her2st and arguments.vits:
            her2st(arguments, kept["her2st"])
        else:
            parser.error("give `--part phantom`, or `--part her2st` with --her2st and --vits")
    tables(kept["phantom"].rows, kept["her2st"].rows)
    print(machine())


if __name__ == "__main__":
    main()
