"""One adapter on one slide, in LazySlide and in pekasc: largest differences of features and predictions, and seconds.

    pip install "pekasc[lazyslide]"
    python benchmarks/lazyslide_round_trip.py --her2st PATH --vits PATH --out FOLDER

The frozen ViT-S/14 with a ridge, with and without spatial context, is fitted on section C3 of her2st; the slide is C2,
a tiled pyramidal TIFF. LazySlide cuts it into tiles of 112 px, once at the slide's own pixel size, where nothing is
resampled, and once at 1.0 um per pixel. pekasc reads the same squares, from the same object. Both take turns.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lazyslide as zs
import numpy as np
import torch
from wsidata import open_wsi

import pekasc as pk
from _machine import PACKAGES, machine
from _slide import her2st_slide

PX = 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with C2 and C3")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True, help="where the slide goes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=200)
    parser.add_argument("--readers", nargs="+", default=["openslide", "tiffslide"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pk.settings.verbosity = "warning"
    torch.set_num_threads(arguments.threads)
    file = her2st_slide(arguments.her2st, arguments.out)
    encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    own = float(open_wsi(file, store=None, reader="openslide").properties.mpp)
    print("| um/px | context | reader | tiles | features | expression | standard deviation | LazySlide | pekasc |")
    print("|---|---|---|---|---|---|---|---|---|")
    for mpp in (own, 1.0):
        sections = pk.datasets.her2st(("C3",), path=arguments.her2st)
        pk.pp.tile(sections, tile_px=PX, mpp=mpp)
        for context in (None, 300.0):
            adapter = pk.tl.fit_adapter(
                sections, encoder=encoder, method=None, progress=False, compute={"device": "cpu"},
                readout=pk.Readout.preset("ridge").replace(context_um=context, fields_um=None),
            )  # fmt: skip
            for reader in arguments.readers:
                print(_row(file, adapter, mpp, reader, arguments.tiles, arguments.rounds), flush=True)
    versions = machine((*PACKAGES, "lazyslide", "wsidata", "tiffslide", "openslide-python"))
    print(f"\nMedians of {arguments.rounds} rounds. {versions}")


def _row(file: Path, adapter: pk.Adapter, mpp: float, reader: str, n: int, rounds: int) -> str:
    wsi = open_wsi(file, store=None, reader=reader)
    zs.pp.tile_tissues(wsi, PX, mpp=mpp, tissue_key=None, background_filter=False)
    tiles = wsi.shapes["tiles"]
    middle = max(0, len(tiles) // 2 - n // 2)
    wsi.shapes["tiles"] = tiles.iloc[middle : middle + n].reset_index(drop=True)
    image, feature = adapter.as_lazyslide(mpp=mpp, slide_mpp=wsi.properties.mpp)
    how: dict[str, Any] = {"device": "cpu", "pbar": False}
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(rounds):
        start = time.perf_counter()
        zs.tl.feature_extraction(wsi, image, **how)
        zs.tl.feature_prediction(wsi, feature, **how)
        seconds["theirs"].append(time.perf_counter() - start)
        pk.pp.tile_grid(
            wsi, "wsi", shapes="tiles", tile_px=PX, mpp=mpp, tissue=False, min_sharpness=None, max_pen=None
        )  # fmt: skip
        start = time.perf_counter()
        pk.tl.predict_expression(wsi, adapter, table_name="grid", progress=False, compute={"device": "cpu"})
        seconds["ours"].append(time.perf_counter() - start)
    table, predicted = wsi["grid"], wsi["peka_expression_tiles"].X
    features = np.abs(wsi["peka_tiles"].X[:, : image.n_features] - table.obsm["X_peka"]).max()
    expression = np.abs(predicted - table.layers["peka"]).max()
    spread = np.median(table.layers["peka"].std(axis=0))
    theirs, ours = (np.median(seconds[name]) for name in ("theirs", "ours"))
    context = "none" if adapter.context_um is None else f"{adapter.context_um:g} um"
    return (
        f"| {mpp:.3g} | {context} | {reader} | {table.n_obs} | {features:.1e} | {expression:.1e} | {spread:.2f} | "
        f"{theirs:.1f} s | {ours:.1f} s |"
    )


if __name__ == "__main__":
    main()
