"""Which adapters predict: the last one, those of the inner folds, or all, on splits of her2st.

One fit a split has all of them (``refit="both"``), so that only what predicts differs. Scores are the mean Pearson
correlation within each test section, of 50 spatially variable and 50 highly variable genes that the training sections
choose. Also tried: heads of the inner folds' adapters that are fitted on the spots that these were trained on alone.
Seconds are those of a prediction of the test sections, tiles and wider field, the best of three.

    python benchmarks/refit.py --her2st PATH --vits PATH --out results/refit
    python benchmarks/refit.py --out results/refit --only table
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, Split, load_split, parsed, quick_parser, vits
from pekasc.models.heads import Member, Reading
from pekasc.models.selection import _readout

# label, and which adapters: 0 is the last one
WHICH: dict[str, slice] = {"last": slice(0, 1), "ensemble": slice(1, None), "both": slice(0, None)}


class Fits:
    """Keep what the readings of a fit are on its inner folds."""

    def __init__(self) -> None:
        self.folds: Sequence[Reading] = ()
        fit = _readout.Reader.fit

        def kept(reader: _readout.Reader, *args: Any, **kwargs: Any) -> _readout.Fitted:
            fitted = fit(reader, *args, **kwargs)
            self.folds = fitted.folds
            return fitted

        _readout.Reader.fit = kept  # type: ignore[method-assign]


def numbered(member: Member, old: int, new: int, weight: float) -> Member:
    """Return a member of one adapter as that of another number."""
    blocks = tuple(
        replace(b, maps={s._replace(adapter=new) if s.network == "adapted" else s: m for s, m in b.maps.items()})
        for b in member.head.blocks
    )
    assert {s.adapter for s in member.head.sources if s.network == "adapted"} <= {old}
    return replace(member, weight=weight, head=replace(member.head, blocks=blocks))


def some(adapter: pk.Adapter, which: slice, folds: Sequence[Reading] = ()) -> pk.Adapter:
    """Return the adapter with some of its adapters; with `folds`, heads of those are fitted on their own spots."""
    states = [(adapter.config, adapter.weights["adapter"]), *adapter.others]
    numbers = list(range(len(states)))[which]
    used = adapter.reading.use()
    members = [member for member in used.members if member.name.startswith("frozen:")]
    for new, old in enumerate(numbers):
        own = [m for m in used.members if m.name.startswith("adapted:") and m.head.sources[0].adapter == old]
        share = len(states) / len(numbers)
        if folds:
            own, old, share = [m for m in folds[old - 1].members if m.name.startswith("adapted:")], 0, 1 / len(numbers)
        members += [numbered(m, old, new, share * m.weight) for m in own]
    config, weights = states[numbers[0]]
    reading = Reading(tuple(members), adapter.reading.smooth_um, adapter.reading.smooth_weight)
    others = tuple((c, w) for c, w in (states[number] for number in numbers[1:]) if c is not None)
    return replace(adapter, config=config, weights={"adapter": weights}, others=others, reading=reading)


def seconds_of(split: Split, adapter: pk.Adapter) -> float:
    """Return the seconds of a prediction of the test sections, the best of three."""
    adapter.network()
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        pk.tl.predict_expression(split.test, adapter, progress=False)
        best = min(best, time.perf_counter() - start)
    return best


def run(split: Split, arguments: Any, seed: int) -> list[dict[str, Any]]:
    """Return the rows of one split."""
    fits = Fits()
    start = time.perf_counter()
    adapter = pk.tl.fit_adapter(
        split.training, encoder=vits(arguments.vits), genes=split.genes, recipe={"refit": "both"}, random_state=seed,
        progress=False,
    )  # fmt: skip
    about = {"split": split.name, "seed": seed, "epochs": adapter.info["epochs"], "fit": time.perf_counter() - start}
    print(split.name, seed, about, flush=True)
    frozen = replace(some(adapter, slice(0, 1)), config=None, weights={})
    only = tuple(m for m in frozen.reading.members if m.name.startswith("frozen:"))
    variants = {"frozen members alone": replace(frozen, reading=replace(frozen.reading, members=only).use())}
    if adapter.n_adapters > 1:
        variants |= {label: some(adapter, which) for label, which in WHICH.items()}
        variants["ensemble, heads on own spots"] = some(adapter, WHICH["ensemble"], fits.folds)
    else:
        variants["last"] = adapter
    rows = []
    for label, made in variants.items():
        row = {**about, "adapters": label, "n": made.n_adapters, **split.score(made)}
        rows.append({**row, "seconds": seconds_of(split, made), "tiles": len(split.test["table"])})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=list(ALL_FOLDS), default=["C4", "B4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parsed(parser)
    kept = KeptRows(arguments.out / "refit.jsonl")
    for name in arguments.splits if arguments.only != "table" else ():
        for seed in arguments.seeds:
            if not any((row["split"], row["seed"]) == (name, seed) for row in kept.rows):
                kept.add(run(load_split(arguments.her2st, name), arguments, seed))
    frame = pd.DataFrame(kept.rows)
    print("| split | seed | epochs | adapters | number | svg | hvg | seconds of a prediction | tiles |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in frame.itertuples():
        print(
            f"| {row.split} | {row.seed} | {row.epochs} | {row.adapters} | {row.n} | {row.svg:.3f} | {row.hvg:.3f} | "
            f"{row.seconds:.1f} | {row.tiles} |"
        )


if __name__ == "__main__":
    main()
