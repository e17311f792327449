"""Noise ceilings against the true ones of synthetic tissue, and the shares of them that are reached on her2st.

    python benchmarks/ceilings.py --out FOLDER --part phantom
    python benchmarks/ceilings.py --her2st PATH --vits PATH --out FOLDER --part her2st
    python benchmarks/ceilings.py --out FOLDER --only table

``phantom``: counts drawn Poisson from the phantom's truth at several depths (library sizes lognormal, sd 0.4), three
sections of two sizes, three draws of each; then the phantom's own counts, which are overdispersed, with dropout. The
true ceiling is the correlation of the values with their own expectation at the spot's rate and library size, from 100
draws; beside it, that with the truth itself, log1p of the rate, which knows no library size. ``half``: the
Spearman-Brown formula on the same halves, which the ceiling does without.

``her2st``: the frozen ViT-S/14 (`method=None`, nothing is trained but the head) under plain ridge and under the default
reading, five splits; 50 spatially and 50 highly variable genes that training sections choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csc_matrix

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, parsed, quick_parser
from _machine import machine
from pekasc._ceiling import _correlation_of_halves, noise_ceiling
from pekasc.models.selection import pearson

DEPTHS = (200, 650, 2000, 5000, 10_000)
SIZES_UM = (1500.0, 3000.0)
LIBRARY_SD = 0.4
N_TRUTH = 100
READOUTS = {"plain ridge": pk.Readout.preset("ridge"), "default reading": pk.Readout(head="low-rank")}


def normalised(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log1p(1e4 * count / total), and the totals."""
    total = np.maximum(counts.sum(axis=1), 1).astype(np.float64)
    return np.log1p(1e4 * counts / total[:, None]), total


def true_ceilings(rates: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return, for Poisson counts with these rates, the largest correlation, and that with log1p of the shares."""
    shares = np.log1p(1e4 * rates / rates.sum(axis=1, keepdims=True))
    sums, squares = np.zeros((2, *rates.shape))
    with_truth = []
    for _ in range(N_TRUTH):
        values, _ = normalised(rng.poisson(rates))
        sums += values
        squares += values**2
        with_truth.append(pearson(shares, values))
    mean = sums / N_TRUTH
    noise = ((squares / N_TRUTH - mean**2) * N_TRUTH / (N_TRUTH - 1)).mean(axis=0)
    signal = np.maximum(mean.var(axis=0, ddof=1) - noise / N_TRUTH, 0)
    return np.sqrt(signal / (signal + noise)), np.mean(with_truth, axis=0)


def sections(size_um: float, n: int = 3) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Return tables of synthetic patients of their own, the shares of transcripts, and which genes vary with tissue."""
    for seed in range(n):
        sdata = pk.datasets.phantom(n_patients=1, size_um=size_um, lazy=True, random_state=seed)
        table = sdata["table"]
        shares = np.expm1(np.asarray(table.layers["truth"], dtype=np.float64)) / 1e4
        yield table, shares, (table.var["phantom_depends_on"] != "nothing").to_numpy()


def poisson_rows(size_um: float, n_draws: int = 3) -> Iterator[dict[str, Any]]:
    """Return a row for every gene of every draw."""
    for seed, (table, shares, varies) in enumerate(sections(size_um)):
        for depth in DEPTHS:
            rng = np.random.default_rng([seed, depth])
            rates = shares * rng.lognormal(np.log(depth), LIBRARY_SD, (len(shares), 1))
            largest, with_truth = true_ceilings(rates, rng)
            for draw in range(n_draws):
                counts = rng.poisson(rates)
                _, total = normalised(counts)
                r = np.clip(_correlation_of_halves(csc_matrix(counts, dtype=np.float64), total), 0, 1)
                found = {"ceiling": noise_ceiling(counts, total), "half": np.sqrt(2 * r / (1 + r))}
                for i in range(table.n_vars):
                    yield {
                        "part": "poisson", "size_um": size_um, "n_spots": len(shares), "depth": depth, "seed": seed,
                        "draw": draw, "varies": bool(varies[i]), "true": float(largest[i]),
                        "with_truth": float(with_truth[i]), **{name: float(x[i]) for name, x in found.items()},
                    }  # fmt: skip


def own_rows(size_um: float) -> Iterator[dict[str, Any]]:
    """Return a row for every gene of the phantom's own counts."""
    for seed, (table, shares, varies) in enumerate(sections(size_um)):
        values, total = normalised(table.X.toarray())
        found, with_truth = noise_ceiling(table.X, total), pearson(np.log1p(1e4 * shares), values)
        for i in range(table.n_vars):
            yield {
                "part": "own", "size_um": size_um, "n_spots": len(shares), "depth": int(np.median(total)), "seed": seed,
                "varies": bool(varies[i]), "with_truth": float(with_truth[i]), "ceiling": float(found[i]),
            }  # fmt: skip


def her2st_rows(arguments: Any) -> Iterator[dict[str, Any]]:
    """Return a row for every split, readout, test section and gene set."""
    names = tuple(sorted({s for pair in ALL_FOLDS.values() for side in pair for s in side}))
    sdata = pk.datasets.her2st(names, path=arguments.her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    folds = {name: tuple([f"{s}_spots" for s in side] for side in pair) for name, pair in ALL_FOLDS.items()}
    table = sdata["table"]
    depth = pd.Series(table.X.sum(axis=1).A1).groupby(table.obs["region"].astype(str).to_numpy()).median()
    for readout, how in READOUTS.items():
        frame = pk.tl.cross_validate(
            sdata, methods=["frozen-best"], readout=how, folds=folds, n_bootstrap=1, progress=False,
            encoders=pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits),
            compute={"cache": arguments.out / "cache"}, store=arguments.out / "store",
        )  # fmt: skip
        for row in frame[frame["section"] != "pooled"].itertuples():
            yield {
                "part": "her2st", "fold": row.fold, "section": row.section, "genes": row.genes, "readout": readout,
                "depth": float(depth[row.section]), "n_spots": row.n_test, "pearson": row.pearson,
                "ceiling": row.ceiling, "reached": row.reached,
            }  # fmt: skip


def print_poisson(rows: pd.DataFrame) -> None:
    """Print the mean differences of Poisson counts by size and depth."""
    print("| spots | counts a spot | true | estimated - true | mean absolute | of flat genes, estimated - true | "
          "estimated - with truth | Spearman-Brown - true |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for (_, depth), part in rows.groupby(["size_um", "depth"]):
        varying, flat = part[part["varies"]], part[~part["varies"]]
        difference = varying["ceiling"] - varying["true"]
        spots = "-".join(str(n) for n in sorted({part["n_spots"].min(), part["n_spots"].max()}))
        print(
            f"| {spots} | {depth:,} | {varying['true'].mean():.3f} | {difference.mean():+.3f} | "
            f"{difference.abs().mean():.3f} | {(flat['ceiling'] - flat['true']).mean():+.3f} | "
            f"{(varying['ceiling'] - varying['with_truth']).mean():+.3f} | "
            f"{(varying['half'] - varying['true']).mean():+.3f} |"
        )
    every = rows.assign(difference=rows["ceiling"] - rows["true"]).groupby(["size_um", "depth"])["difference"].mean()
    print(f"\nAll genes, the flat ones too: {every.min():+.3f} to {every.max():+.3f}, mean {every.mean():+.3f}.\n")


def print_own(rows: pd.DataFrame) -> None:
    """Print the mean ceilings of the phantom's own counts."""
    print("| spots | counts a spot | correlation with the truth | ceiling | difference |\n|---|---|---|---|---|")
    for _, part in rows[rows["varies"]].groupby("size_um"):
        a, b = part["with_truth"].mean(), part["ceiling"].mean()
        spots = "-".join(str(n) for n in sorted({part["n_spots"].min(), part["n_spots"].max()}))
        print(f"| {spots} | {part['depth'].median():,.0f} | {a:.3f} | {b:.3f} | {b - a:+.3f} |")
    print()


def print_her2st(rows: pd.DataFrame) -> None:
    """Print scores, ceilings and shares; a split of several test sections has the mean of theirs."""
    print(
        "| readout | split | counts a spot | spots | svg: score | ceiling | reached | hvg: score | ceiling | reached |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (readout, fold), part in rows.groupby(["readout", "fold"], sort=False):
        cells = []
        for name in ("svg", "hvg"):
            mean = part[part["genes"] == name][["pearson", "ceiling"]].mean()
            share = mean["pearson"] / mean["ceiling"]
            cells.append(f"{mean['pearson']:.3f} | {mean['ceiling']:.3f} | {100 * share:.0f} %")
        once = part[part["genes"] == "svg"]
        print(f"| {readout} | {fold} | {once['depth'].mean():,.0f} | {once['n_spots'].sum()} | {' | '.join(cells)} |")
    print()


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=["phantom", "her2st"], default="phantom")
    arguments = parsed(parser, needs=())
    if arguments.part == "her2st" and arguments.only != "table" and not (arguments.her2st and arguments.vits):
        parser.error("--her2st and --vits are needed")
    kept = KeptRows(arguments.out / "ceilings.jsonl")
    if arguments.only != "table":
        there = {row["part"] for row in kept.rows}
        if arguments.part == "her2st" and "her2st" not in there:
            kept.add(her2st_rows(arguments))
        if arguments.part == "phantom" and "own" not in there:
            for size_um in SIZES_UM:
                kept.add([*poisson_rows(size_um), *own_rows(size_um)])
    for part, show in (("poisson", print_poisson), ("own", print_own), ("her2st", print_her2st)):
        rows = [row for row in kept.rows if row["part"] == part]
        if rows:
            show(pd.DataFrame(rows))
    print(machine())


if __name__ == "__main__":
    main()
