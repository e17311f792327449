"""Held-out score and time of an adapter by the blocks it is in, the views it is trained on, and patience.

    python benchmarks/blocks_and_views.py --her2st PATH --vits PATH --out FOLDER
    python benchmarks/blocks_and_views.py --out FOLDER --only table

What the defaults of ``tl.fit_adapter`` were chosen by: five splits of her2st (see ``_her2st.py``), ViT-S/14 at 112 px,
depth and epochs chosen on training sections, one seed. Seconds are those of the whole call, tiles read from disk.
Every fit is one line of ``rows.jsonl``; what is there is not done again.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, load_split, parsed, quick_parser, vits

CONFIGS: dict[str, dict[str, Any]] = {
    "frozen": {"method": None},
    "all blocks, 8 views": {"recipe": {"blocks": "all"}},
    "last 4, 8 views": {"recipe": {"blocks": 4}},
    "last 4, 8 views, patience 2": {"recipe": {"blocks": 4, "patience": 2}},
    "last 4, 2 views, patience 2": {"recipe": {"blocks": 4, "n_views": 2, "patience": 2}},
    "last 2, 8 views, patience 2": {"recipe": {"blocks": 2, "patience": 2}},
}


def main() -> None:
    """Fit what is missing, and print the table."""
    parser = quick_parser(__doc__)
    parser.add_argument("--splits", nargs="+", default=["C3", "C2", "B to C", "C4", "B4"])
    arguments = parsed(parser)
    kept = KeptRows(arguments.out / "rows.jsonl")
    if arguments.only != "table":
        for name in arguments.splits:
            split = load_split(arguments.her2st, name)
            for label, options in CONFIGS.items():
                if any(row["split"] == name and row["config"] == label for row in kept.rows):
                    continue
                start = time.perf_counter()
                adapter = pk.tl.fit_adapter(
                    split.training,
                    encoder=vits(arguments.vits),
                    genes=split.genes,
                    progress=False,
                    readout="ridge",
                    **options,
                )
                seconds = time.perf_counter() - start
                row = {"split": name, "config": label, "seconds": seconds, "depth": adapter.info["depth"]}
                row |= {"epochs": adapter.info["epochs"], **split.score(adapter), **adapter.info["profile"]["seconds"]}
                kept.add([row])
                print(row, flush=True)
    print(table(pd.DataFrame(kept.rows)))


def table(rows: pd.DataFrame) -> str:
    """Return per configuration the mean gain over the frozen encoder, and seconds."""
    rows["score"] = rows[["svg", "hvg"]].mean(axis=1)
    frozen = rows[rows["config"] == "frozen"].set_index("split")["score"]
    rows["gain"] = 100 * (rows["score"] / rows["split"].map(frozen) - 1)
    lines = ["| adapter | " + " | ".join(ALL_FOLDS) + " | mean gain | seconds | chosen epochs |"]
    lines.append("|" + " --- |" * (len(ALL_FOLDS) + 4))
    for label in CONFIGS:
        of = rows[rows["config"] == label].set_index("split").reindex(ALL_FOLDS)
        cells = [f"{s:.4f} ({g:+.1f} %)" for s, g in zip(of["score"], of["gain"], strict=True)]
        epochs = ", ".join("" if np.isnan(e) else f"{e:.0f}" for e in of["epochs"])
        lines.append(
            f"| {label} | "
            + " | ".join(cells)
            + f" | {of['gain'].mean():+.1f} % | {of['seconds'].mean():.0f} | {epochs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
