"""The published recipe and features beside the default ones, cross-validated on the phantom.

    python benchmarks/paper_recipe.py --out results/paper_recipe

Three patients with a section each (2 mm, 400 genes), tiles of 56 px at 2.0 um/px, the encoder that comes with the
package (`tiny`), float32, seed 0. Each patient of ``--held-out`` (all three) is held out; genes, depth, epochs and
penalty come from the other two.
``recipe="paper"``: rank 256 in all blocks, 100 clusters, 50 epochs, features of the encoder's own output, 256 principal
components; the penalty of the head is chosen on held-out groups, as for every method here. Finished pieces are kept in
the folder ``--out``: a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pandas as pd
import torch

import pekasc as pk
from _machine import machine

METHODS = ("frozen", "frozen-best", "bone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", nargs="*", default=["P1", "P2", "P3"])
    parser.add_argument("--recipes", nargs="*", default=["default", "paper"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    sdata = pk.datasets.phantom(n_patients=3, size_um=2000, n_genes=400)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    patient = sdata["table"].obs["patient"].astype(str).to_numpy()
    folds = {name: (patient != name, patient == name) for name in arguments.held_out}
    rows = []
    for recipe in arguments.recipes:
        start = time.perf_counter()
        # of the published features, or of one ridge regression, as for every other recipe
        readout = "paper" if recipe == "paper" else "ridge"
        frame = pk.tl.cross_validate(
            sdata, methods=METHODS, folds=folds, recipe=recipe, readout=readout, store=arguments.out,
            compute={"cache": arguments.out, "device": "cpu"}, progress=False,
        )  # fmt: skip
        mean = pk.get.comparison(frame)["pearson"].droplevel(["encoder", "context_um"]).unstack("genes")
        epochs = frame.groupby("method")["epochs"].unique().get("bone")
        rows.append(mean.assign(recipe=recipe, epochs=str(epochs), seconds=round(time.perf_counter() - start)))
    table = pd.concat(rows).reset_index().set_index(["recipe", "method"])
    print(machine())
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
