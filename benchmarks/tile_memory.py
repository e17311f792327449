"""Peak memory of reading 2,000 and 20,000 tiles from a slide of 50,000 x 50,000 px.

    python benchmarks/tile_memory.py

The slide is a phantom that is drawn where it is read, in chunks of 1024 px, so nothing of it lies on a disk or in
memory. Tiles of 224 px at 0.5 um per pixel in a square grid, in batches of 64, as an encoder gets them, read ahead in a
thread. Each run is a process of its own; the peak is that of the whole process (`ru_maxrss`), all imports within.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import warnings

import numpy as np

SIDE_PX = 50_000


def run(n: int) -> None:
    import spatialdata as sd

    import pekasc as pk
    from pekasc.tiling import ImagePyramid, TileGeometry, TileReader, TileSpec, batches

    sdata = pk.datasets.phantom(1, size_um=SIDE_PX / 2, n_spots=50, n_genes=8)
    levels = [level.data for level in sd.get_pyramid_levels(sdata["P1S1_he"])]
    per_row = int(np.ceil(np.sqrt(n)))
    start = (SIDE_PX - per_row * 224) / 2
    at = start + 224 * (np.arange(per_row) + 0.5)
    centres = np.column_stack([axis.ravel() for axis in np.meshgrid(at, at)])[:n]
    scales = [(levels[0].shape[2] / level.shape[2], levels[0].shape[1] / level.shape[1]) for level in levels]
    geometry = TileGeometry(centres, np.eye(2) / 0.5, TileSpec(224, 0.5))
    reader = TileReader(ImagePyramid(levels, scales), geometry)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began, seen = time.perf_counter(), 0
    for positions, _ in batches(reader, 64):
        seen += len(positions)
    assert seen == n
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {n} | {imports:.3f} | {peak:.3f} | {time.perf_counter() - began:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, help="one run, in this process")
    n = parser.parse_args().n
    warnings.filterwarnings("ignore")
    if n is not None:
        run(n)
        return
    print("| tiles | GB before reading | GB peak | seconds |\n|---|---|---|---|", flush=True)
    for each in (2_000, 20_000):
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--n", str(each)], check=True)
    from _machine import machine

    print(machine())


if __name__ == "__main__":
    main()
