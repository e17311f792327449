"""Tiles of `pp.tile_grid` at the spots of a section: the same predictions as the spots' own?

    python benchmarks/grid_at_spots.py --her2st PATH --vits PATH --out FOLDER

Section C2 of her2st, ViT-S/14 at 112 px of 1.0 um, frozen, ridge head without context, trained on C3. The spots are
predicted as `pp.tile` tiles them; then `pp.tile_grid(shapes="C2_spots")` makes a tile for each, which are predicted
into a table of their own.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import numpy as np
import torch

import pekasc as pk
from _machine import machine
from slide_speed import MPP, PX, adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with C2 and C3")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pekasc").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    of = adapter(arguments)
    sdata = pk.datasets.her2st(("C2",), path=arguments.her2st)
    pk.pp.tile(sdata, tile_px=PX, mpp=MPP)
    pk.tl.predict_expression(sdata, of, table_added="spots", progress=False)
    tiled = {name: element for name, element in sdata.shapes.items() if name != "C2_spots"}
    for name in tiled:  # the squares of the spots' tiles have the name that those of the grid get
        del sdata.shapes[name]
    pk.pp.tile_grid(
        sdata, "C2_he", tile_px=PX, mpp=MPP, shapes="C2_spots", tissue=False, min_sharpness=None, max_pen=None
    )
    pk.tl.predict_expression(sdata, of, table_name="grid", progress=False)
    spots, grid = sdata["spots"], sdata["grid"]
    assert list(spots.var_names) == list(grid.var_names)
    at = {spot: i for i, spot in enumerate(grid.obs["tile_id"])}
    rows = np.array([at[spot] for spot in spots.obs["spot_id"]])
    own, found = np.asarray(spots.layers["peka"]), np.asarray(grid.layers["peka"])[rows]
    there = np.isfinite(own)
    assert (there == np.isfinite(found)).all()
    off = np.abs(own[there] - found[there])
    print(
        f"{spots.n_obs} spots of C2 among {grid.n_obs} shapes x {spots.n_vars} genes: largest difference "
        f"{off.max():.2g}, predictions from {own[there].min():.2f} to {own[there].max():.2f}. {machine()}"
    )


if __name__ == "__main__":
    main()
