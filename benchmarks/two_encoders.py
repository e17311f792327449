"""Do two frozen encoders, each read as by default, predict better together? The ViT-S/14 and the embedded `tiny`.

For five splits of her2st: nothing is trained (``method=None``); mean Pearson within test sections over 50 spatially
variable and 50 highly variable genes that the training sections choose, for each encoder and for the mean of their
predictions, which has no weight to choose.

    python benchmarks/two_encoders.py --her2st PATH --vits PATH --out FOLDER --threads 1
"""

from __future__ import annotations

import numpy as np
import pandas as pd

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, load_split, parsed, quick_parser, vits
from _machine import machine


def main() -> None:
    arguments = parsed(quick_parser(__doc__))
    kept = KeptRows(arguments.out / "two-encoders.jsonl")
    for name in ALL_FOLDS if arguments.only != "table" else ():
        if any(row["split"] == name for row in kept.rows):
            continue
        split = load_split(arguments.her2st, name)
        predicted = {}
        for encoder in (vits(arguments.vits), pk.models.get_encoder("tiny")):
            adapter = pk.tl.fit_adapter(split.training, encoder=encoder, method=None, progress=False)
            pk.tl.predict_expression(split.test, adapter, progress=False)
            table = pk.get.expression(split.test, layer="peka")
            at = table.var_names.get_indexer(split.genes)
            predicted[encoder.short] = np.where(at >= 0, np.asarray(table.X)[:, at], 0)
        predicted["mean of both"] = np.mean(list(predicted.values()), axis=0)
        kept.add([{"split": name, "encoder": one, **split.score_of(of)} for one, of in predicted.items()])
        print(name, flush=True)
    frame = pd.DataFrame(kept.rows)
    if len(frame):
        wide = (
            frame.set_index(["encoder", "split"])[["svg", "hvg"]].unstack("split").swaplevel(axis=1).sort_index(axis=1)
        )
        change = 100 * (wide / wide.loc["vits14"] - 1)
        print(wide.round(3).to_string(), change.mean(axis=1).round(1).to_string(), sep="\n\n")
    print(machine())


if __name__ == "__main__":
    main()
