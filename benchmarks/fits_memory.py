"""Thirty fits, one after the other in one process: what does each leave in memory and in the temporary folder?

    python benchmarks/fits_memory.py

Two phantom sections, the encoder `tiny` at 56 px, one epoch in the last block. The result of a fit is dropped before
the next begins. Resident memory after every fit; what is left in the temporary folder at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import torch

import pekasc as pk

N_FITS, FIRST = 30, 5  # the first fits fill what packages keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=N_FITS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    recipe = pk.Recipe(epochs=1, n_views=1, rank=4, blocks=1)
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, n_genes=40, mpp=2.0)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    process, after, begin = psutil.Process(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        for _ in range(arguments.fits):
            # little memory, so that tiles, features and activations go to temporary files
            pk.tl.fit_adapter(sdata, recipe=recipe, compute={"device": "cpu", "max_memory": 1}, progress=False)
            after.append(process.memory_info().rss / 1e6)
        left = [str(path.relative_to(folder)) for path in Path(folder).rglob("*")]
    print("MB after each fit:", " ".join(f"{mb:.0f}" for mb in after))
    later = np.array(after[FIRST - 1 :])
    slope = float(np.polyfit(np.arange(len(later)), later, 1)[0])
    print(json.dumps({
        "fits": arguments.fits, f"MB after {FIRST}": round(later[0]), "MB at the end": round(later[-1]),
        "MB a fit": round(slope, 2), "left in the temporary folder": left,
        "seconds a fit": round((time.perf_counter() - begin) / arguments.fits, 2),
    }))  # fmt: skip
    from _machine import machine

    print(machine())


if __name__ == "__main__":
    main()
