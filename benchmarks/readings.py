"""What reads the features: every head, average, field of view and blend on five splits of her2st.

Ten columns: five splits (sections of one patient, and from patient to patient both ways), 50 spatially variable and 50
highly variable genes, chosen on the training sections. Everything is chosen on training sections; the baseline is the
frozen encoder at its best depth under plain ridge. Finished fits are kept in ``--out``, so that a run that was
interrupted goes on.

    python benchmarks/readings.py --her2st PATH --vits PATH --out results/readings
    python benchmarks/readings.py --out results/readings --only table
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import pekasc as pk
from _her2st import ALL_FOLDS, parsed, quick_parser

RIDGE = pk.Readout.preset("ridge")
LOW_RANK = pk.Readout(head="low-rank", context_um=None, fields_um=None)
# name, methods, readout
FROZEN: dict[str, tuple[str, pk.Readout]] = {
    "what anyone would do: last block, RidgeCV over spots": ("lazy", RIDGE),
    "frozen, best depth, ridge": ("frozen-best", RIDGE),
    "frozen, ridge, averaged": ("frozen-best", RIDGE.replace(depth="all", selection="average", n_depths=None)),
    "frozen, low-rank, best setting": ("frozen-best", LOW_RANK.replace(selection="best")),
    "frozen, low-rank, averaged": ("frozen-best", LOW_RANK),
    "+ context": ("frozen-best", LOW_RANK.replace(context_um="auto")),
    "+ field of view, no context": ("frozen-best", LOW_RANK.replace(fields_um="auto")),
    "+ context and field of view (method=None)": ("frozen-best", pk.Readout(head="low-rank")),
    "+ smoothing": ("frozen-best", pk.Readout(head="low-rank", smooth_um="auto")),
}
TRAINED: dict[str, tuple[str, pk.Readout]] = {
    "adapter, ridge, context": ("bone", pk.Readout(head="ridge", selection="best")),
    "adapter, low-rank, context": ("bone", pk.Readout(head="low-rank")),
    "default blend": ("bone", pk.Readout()),
    "default blend, adapted half replaced by frozen": ("frozen-best", pk.Readout()),
    "frozen half and adapted low-rank": ("bone", pk.Readout(members=("frozen:low-rank", "adapted:low-rank"))),
    "frozen half and adapted ridge": ("bone", pk.Readout(members=("frozen:low-rank", "adapted:ridge"))),
}
BASE = "frozen, best depth, ridge"


def compare(sdata: Any, wanted: dict[str, tuple[str, pk.Readout]], arguments: Any, seeds: list[int]) -> pd.DataFrame:
    """Return the scores of some methods and readouts on every split, the mean over test sections."""
    encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    folds = {
        name: ([f"{s}_spots" for s in ALL_FOLDS[name][0]], [f"{s}_spots" for s in ALL_FOLDS[name][1]])
        for name in arguments.splits
    }
    out = []
    common: dict[str, Any] = {
        "encoders": encoder, "folds": folds, "seeds": seeds, "n_bootstrap": 10, "store": arguments.out / "store",
        "compute": {"cache": arguments.out / "cache"}, "progress": False,
    }  # fmt: skip
    trained = [readout for method, readout in wanted.values() if method == "bone"]
    if trained:  # in one call, since they share the training
        pk.tl.cross_validate(sdata, methods=["bone"], readout=trained, **common)
    for label, (method, readout) in wanted.items():
        frame = pk.tl.cross_validate(sdata, methods=[method], readout=readout, **common)
        frame = frame[frame["section"] != "pooled"]
        frame = frame.groupby(["fold", "genes", "seed"], as_index=False)[["pearson", "seconds"]].mean()
        out.append(frame.assign(reading=label))
        table = pd.concat(out)
        table.to_csv(arguments.out / f"{'trained' if wanted is TRAINED else 'frozen'}.csv", index=False)
        print(label, flush=True)
    return pd.concat(out)


def show(arguments: Any) -> None:
    """Print the table: ten columns and the mean of their changes."""
    files = [arguments.out / f"{part}.csv" for part in ("frozen", "trained")]
    frame = pd.concat([pd.read_csv(file) for file in files if file.exists()])
    columns = [(split, genes) for split in ALL_FOLDS for genes in ("svg", "hvg")]
    print("| reading | seed | " + " | ".join(f"{split} {genes}" for split, genes in columns) + " | mean | worst |")
    print("|---" * (len(columns) + 4) + "|")
    scores = frame.set_index(["reading", "seed", "fold", "genes"])["pearson"]
    # without the part "frozen" there is nothing to compare with, and changes are NaN
    base = np.array([scores.get((BASE, 0, split, genes), np.nan) for split, genes in columns])
    for label in [*FROZEN, *TRAINED]:
        for seed in sorted(frame.loc[frame["reading"] == label, "seed"].unique()):
            values = np.array([scores.get((label, seed, split, genes), np.nan) for split, genes in columns])
            change = 100 * (values / base - 1)
            cells = " | ".join(f"{value:.3f}" for value in values)
            known = change[np.isfinite(change)]
            of_base = f"{known.mean():+.1f} % | {known.min():+.0f} %" if known.size else " | "
            print(f"| {label} | {seed} | {cells} | {of_base} |")


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=["frozen", "trained"])
    parser.add_argument("--splits", nargs="+", choices=list(ALL_FOLDS), default=list(ALL_FOLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parsed(parser)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "table":
        sdata = pk.datasets.her2st(tuple(sorted({s for pair in ALL_FOLDS.values() for side in pair for s in side})),
                                   path=arguments.her2st)  # fmt: skip
        pk.pp.tile(sdata, tile_px=112, mpp=1.0)
        if arguments.part != "trained":
            compare(sdata, FROZEN, arguments, [0])
        if arguments.part != "frozen":
            compare(sdata, TRAINED, arguments, arguments.seeds)
    show(arguments)


if __name__ == "__main__":
    main()
