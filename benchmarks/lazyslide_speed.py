"""Tiles and features of a slide, pekasc against LazySlide: same file, same tiles, same model.

    pip install lazyslide tiffslide
    python benchmarks/lazyslide_speed.py --her2st PATH --vits PATH --out FOLDER

Section C2 of her2st is written as a tiled pyramidal TIFF (JPEG, tiles of 256 px). LazySlide cuts it into tiles of
112 px at 1.0 um per pixel; some of those, one after the other, are read by both. `null`: the tiles go nowhere;
LazySlide's tile dataset in a DataLoader, without and with workers. `features`: `zs.tl.feature_extraction` with the
ViT-S/14, against pekasc's embedding. Both take turns in every round, LazySlide with two of its readers.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lazyslide as zs
import numpy as np
import torch
from torch.utils.data import DataLoader
from wsidata import open_wsi

import pekasc as pk
from _machine import PACKAGES, machine
from _slide import her2st_slide
from pekasc._sections._images import image_pyramid
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import BatchEncoder, embed_chunks
from pekasc.tiling import TileGeometry, TileReader, TileSpec, batches

PX, MPP, BATCH = 112, 1.0, 64
READERS = ("openslide", "tiffslide")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with C2")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True, help="where the slide goes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=1500)
    parser.add_argument("--heavy-tiles", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    file = her2st_slide(arguments.her2st, arguments.out)
    encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    run = BatchEncoder(EncoderNetwork(encoder, PX), [(12,)], 1, torch.device("cpu"), "fp32")
    frozen = run.encoder

    def tensor(tile: Any) -> torch.Tensor:
        return frozen.normalise(torch.from_numpy(np.ascontiguousarray(tile))[None])[0]

    def features(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return frozen(x, [12])[0]

    def opened(reader: str, n: int) -> Any:
        wsi = open_wsi(file, store=None, reader=reader)
        zs.pp.tile_tissues(wsi, PX, mpp=MPP, tissue_key=None, background_filter=False)
        tiles = wsi.shapes["tiles"]
        middle = len(tiles) // 4
        wsi.shapes["tiles"] = tiles.iloc[middle : middle + n].reset_index(drop=True)
        return wsi

    first = opened(READERS[0], arguments.tiles)
    bounds = first.shapes["tiles"].geometry.bounds.to_numpy()
    centres = (bounds[:, :2] + bounds[:, 2:]) / 2
    image = pk.io.read_slide(file)["C2"]
    mpp = float(first.properties.mpp)

    def reader(n: int) -> TileReader:
        geometry = TileGeometry(centres[:n], np.eye(2) / mpp, TileSpec(PX, MPP))
        return TileReader(image_pyramid("C2", image), geometry)

    def read(n: int) -> None:
        for _ in batches(reader(n), BATCH):
            pass

    def embed(n: int) -> None:
        order = reader(n).reading_order
        for _ in embed_chunks(run, reader(n), [order[i : i + 256] for i in range(0, n, 256)], BATCH):
            pass

    def lazy_read(wsi: Any, workers: int) -> None:
        for _ in DataLoader(wsi.ds.tile_images("tiles"), batch_size=BATCH, num_workers=workers):
            pass

    def lazy_embed(wsi: Any, workers: int) -> None:
        zs.tl.feature_extraction(
            wsi, features, model_name="vits", transform=tensor, batch_size=BATCH, num_workers=workers, device="cpu",
            pbar=False, return_features=True,
        )  # fmt: skip

    n, heavy = len(centres), min(arguments.heavy_tiles, len(centres))
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "null: pekasc": (lambda: read(n), n),
        "features: pekasc": (lambda: embed(heavy), heavy),
    }
    for name in READERS:
        light, dark = opened(name, n), opened(name, heavy)
        for workers in (0, 2):
            way = f"LazySlide, {name}, {workers} workers"
            ways[f"null: {way}"] = (lambda light=light, workers=workers: lazy_read(light, workers), n)
            ways[f"features: {way}"] = (lambda dark=dark, workers=workers: lazy_embed(dark, workers), heavy)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(arguments.rounds + 1):
        for name, (work, of) in ways.items():
            start = time.perf_counter()
            work()
            if i:
                seconds[name].append((time.perf_counter() - start) / of)
    print("| what | tiles | ms per tile | over pekasc |\n|---|---|---|---|")
    for name, values in seconds.items():
        own = np.median(seconds[f"{name.split(':')[0]}: pekasc"])
        print(f"| {name} | {ways[name][1]} | {1e3 * np.median(values):.2f} | {np.median(values) / own:.2f} |")
    print(f"\nMedians of {arguments.rounds} rounds. {machine((*PACKAGES, 'lazyslide', 'wsidata', 'openslide-python'))}")


if __name__ == "__main__":
    main()
