"""Predict a slide: wall time over that of one batch in memory, and beside LazySlide's features with a ridge.

    pip install lazyslide tiffslide
    python benchmarks/slide_speed.py batch --her2st PATH --vits PATH --out FOLDER
    python benchmarks/slide_speed.py lazyslide --her2st PATH --vits PATH --out FOLDER

Section C2 of her2st is written once as a tiled pyramidal TIFF (JPEG, tiles of 256 px) and cut into tiles of 112 px at
1.0 um, neighbours 100 um apart. The adapter is the frozen ViT-S/14 after its last block with a ridge head, trained on
C3.

batch: `tl.predict_expression` of 4,000 tiles into a store, from the call to its return. After every fourth batch one
batch that is in memory runs through the same network, and its time is taken out of the call's: so both see the same
load of the machine. To the median time of that batch, times the number of batches, the head's time is added, on the
same features in memory. CPU seconds of the process, all threads, stand beside the wall time: they depend less on what
else the machine does.

lazyslide: the same tiles as `tl.predict_expression` into a store, and as LazySlide's `feature_extraction` with the same
network (the loader without and with workers) followed by scikit-learn's ridge, in memory. `features`: every round has a
part of the tiles of its own, of the same number. `null`: the network is replaced by zeros, and every round has all
tiles. Start-up is taken out: time(n tiles) - time(8 tiles), over n - 8, where time(8 tiles) is the median of the
rounds; of pekasc also the look for training tissue, which is done once a slide.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pekasc as pk
from _machine import PACKAGES, machine
from _slide import her2st_slide
from pekasc.models.features import BatchEncoder

PX, MPP, STRIDE_UM, DEPTH, FEW = 112, 1.0, 100, 12, 8
BATCH = pk.Compute().embed_batch_size


def adapter(arguments: argparse.Namespace) -> pk.Adapter:
    folder = arguments.out / "adapter"
    encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    if not folder.exists():
        sdata = pk.datasets.her2st(("C3",), path=arguments.her2st)
        pk.pp.tile(sdata, tile_px=PX, mpp=MPP)
        made = pk.tl.fit_adapter(
            sdata, encoder=encoder, method=None, readout={"depth": DEPTH}, progress=False, random_state=0
        )
        made.save(folder)
    return pk.Adapter.load(folder, encoder=encoder)


def grid(file: Path, n: int) -> Any:
    """Return the slide with the `n` middle tiles of a grid of all of it, row by row."""
    sdata = pk.io.read_slide(file, name="C2")
    pk.pp.tile_grid(
        sdata, "C2", tile_px=PX, mpp=MPP, stride_um=STRIDE_UM, tissue=False, min_sharpness=None, max_pen=None
    )
    return part(sdata, slice((sdata["grid"].n_obs - n) // 2, (sdata["grid"].n_obs + n) // 2))


def part(sdata: Any, rows: slice) -> Any:
    """Return the object with some rows of its grid."""
    some = sdata.subset([*sdata.images, *sdata.shapes])
    some.tables["grid"] = sdata["grid"][rows].copy()
    return some


@contextmanager
def replaced(method: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let `method` stand for the pass of a batch through the network."""
    original = BatchEncoder._features
    BatchEncoder._features = method  # type: ignore[method-assign]
    try:
        yield original
    finally:
        BatchEncoder._features = original  # type: ignore[method-assign]


def batch(arguments: argparse.Namespace) -> None:
    of, sdata = adapter(arguments), grid(arguments.slide, arguments.tiles)
    rng = np.random.default_rng(0)
    in_memory = rng.integers(0, 256, (BATCH, PX, PX, 3), dtype=np.uint8)
    forward = BatchEncoder._features
    paused: list[tuple[float, float]] = []
    kept: list[np.ndarray] = []

    def timed(run: BatchEncoder, tiles: np.ndarray) -> list[torch.Tensor]:
        found = forward(run, tiles)
        if len(tiles) == BATCH:
            kept.append(found[0].numpy())
            if len(kept) % 4 == 0:
                start = clocks()
                forward(run, in_memory)
                paused.append(since(start))
        return found

    for i in range(arguments.rounds):
        paused.clear()
        kept.clear()
        store = arguments.out / "batch.zarr"
        shutil.rmtree(store, ignore_errors=True)
        again = part(sdata, slice(None))
        with replaced(timed):
            start = clocks()
            pk.tl.predict_expression(again, of, table_name="grid", store=store, progress=False)
            took = since(start)
        features = np.concatenate(kept)
        start = clocks()
        of.head.predict(features)
        head = np.array(since(start)) * sdata["grid"].n_obs / len(features)
        n_batches = sdata["grid"].n_obs / BATCH
        whole = np.array(took) - np.sum(paused, axis=0)
        bare = np.median(paused, axis=0) * n_batches
        print(f"round {i + 1}: {sdata['grid'].n_obs} tiles x {len(of.genes)} genes; load {os.getloadavg()[0]:.1f}")
        for j, clock in enumerate(("wall", "CPU")):
            mean = np.mean(paused, axis=0)[j] * n_batches
            print(
                f"  {clock}: {whole[j]:.1f} s; {n_batches:.1f} batches of {BATCH} at the median of {len(paused)} in "
                f"memory {bare[j]:.1f} s (at their mean {mean:.1f}), head {head[j]:.2f} s: "
                f"{whole[j] / (bare[j] + head[j]):.3f} (at the mean {whole[j] / (mean + head[j]):.3f})",
                flush=True,
            )


def clocks() -> tuple[float, float]:
    """Return the time, and the CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    now = clocks()
    return now[0] - start[0], now[1] - start[1]


def zeros(run: BatchEncoder, tiles: np.ndarray) -> list[torch.Tensor]:
    return [torch.zeros(len(tiles), 768)]


class Lazy:
    """LazySlide's features of tiles of a grid, and a ridge of scikit-learn."""

    def __init__(self, file: Path, of: pk.Adapter, sdata: Any) -> None:
        import lazyslide as zs
        from sklearn.linear_model import Ridge
        from wsidata import open_wsi

        self._zs, self._model = zs, of.network().eval()
        self._wsi = open_wsi(file, store=None, reader="openslide")
        # its own tiles first, for their specification; then those of the grid, corners rounded to pixels as it does
        zs.pp.tile_tissues(self._wsi, PX, mpp=MPP, tissue_key=None, background_filter=False)
        tiles = self._wsi.shapes["tiles"]
        side = float(np.diff(tiles.geometry.iloc[0].bounds[::2])[0])
        self._corners = np.rint(sdata["grid"].obsm["spatial"] - side / 2).astype(int)
        self._side, self._tiles = side, tiles
        rng = np.random.default_rng(0)
        genes = rng.random((340, len(of.genes)), dtype=np.float32)
        self._ridge = Ridge(alpha=100.0).fit(rng.random((340, 768), dtype=np.float32), genes)

    def run(self, rows: slice, workers: int, *, null: bool) -> np.ndarray:
        import shapely

        corners = self._corners[rows]
        tiles = self._tiles.iloc[: len(corners)].copy()
        tiles.geometry = shapely.box(*corners.T, *(corners + self._side).T)
        self._wsi.shapes["tiles"] = tiles
        found = self._zs.tl.feature_extraction(
            self._wsi, self._zeros if null else self._features, model_name="vits", device="cpu", pbar=False,
            transform=torch.from_numpy if null else self._tensor, batch_size=BATCH, num_workers=workers,
            return_features=True,
        )  # fmt: skip
        return self._ridge.predict(found)

    def _zeros(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 768)

    def _tensor(self, tile: Any) -> torch.Tensor:
        return self._model.normalise(torch.from_numpy(np.ascontiguousarray(tile))[None])[0]

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._model(x, [DEPTH])[0]


def lazyslide(arguments: argparse.Namespace) -> None:
    of = replace(adapter(arguments), trained_on={})  # nothing to look for
    sdata = grid(arguments.slide, arguments.tiles)
    lazy, store, rounds = Lazy(arguments.slide, of, sdata), arguments.out / "rounds.zarr", arguments.rounds

    def predict(rows: slice) -> Callable[[], None]:
        some = part(sdata, rows)

        def call() -> None:
            shutil.rmtree(store, ignore_errors=True)
            pk.tl.predict_expression(some, of, table_name="grid", store=store, progress=False)

        return call

    def ways(rows: slice, null: bool, workers: list[int]) -> dict[str, Callable[[], Any]]:
        return {
            "pekasc": predict(rows),
            **{f"LazySlide, {w} workers": lambda w=w: lazy.run(rows, w, null=null) for w in workers},
        }

    n = sdata["grid"].n_obs
    print("| what | tiles | start-up, s | ms per tile | over pekasc | CPU ms per tile | over pekasc |")
    print("|---|---|---|---|---|---|---|")
    for what, workers in (("null", [0, 2]), ("features", [0])):
        null = what == "null"
        each = n if null else arguments.feature_tiles // rounds
        seconds: dict[str, tuple[list[Any], list[Any]]] = {}
        with replaced(zeros) if null else nullcontext():
            for i in range(-1, rounds):  # round -1 warms up, on few tiles where they cost
                first = 0 if null else max(i, 0) * each
                many = slice(first, first + (FEW if i < 0 and not null else each))
                for j, rows in enumerate((slice(first, first + FEW), many)):
                    for name, work in ways(rows, null, workers).items():
                        start = clocks()
                        work()
                        if i >= 0:
                            seconds.setdefault(name, ([], []))[j].append(since(start))
        per_tile = {
            name: (np.array(many) - np.median(few, axis=0)) / (each - FEW) * 1e3
            for name, (few, many) in seconds.items()
        }
        own = np.median(per_tile["pekasc"], axis=0)
        for name, values in per_tile.items():
            low, mid, high = (of(values, axis=0) for of in (np.min, np.median, np.max))
            cpu = "- | -" if "2 workers" in name else f"{mid[1]:.2f} | {mid[1] / own[1]:.2f}"  # of other processes
            print(
                f"| {what}: {name} | {each if null else each * rounds} | {np.median(seconds[name][0], axis=0)[0]:.2f} "
                f"| {mid[0]:.2f} ({low[0]:.2f}-{high[0]:.2f}) | {mid[0] / own[0]:.2f} | {cpu} |",
                flush=True,
            )
    print(f"\nMedians (and ranges) of {rounds} rounds, load {os.getloadavg()[0]:.1f}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batch", "lazyslide"])
    parser.add_argument("--her2st", type=Path, required=True, help="folder with C2 and C3")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiles", type=int, default=4000)
    parser.add_argument("--feature-tiles", type=int, default=2000, help="lazyslide: with the network, in all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pekasc").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.slide = her2st_slide(arguments.her2st, arguments.out)
    more = ("lazyslide", "wsidata", "openslide-python") if arguments.what == "lazyslide" else ()
    print(machine((*PACKAGES, *more)), f"{arguments.threads} threads of torch.", flush=True)
    {"batch": batch, "lazyslide": lazyslide}[arguments.what](arguments)


if __name__ == "__main__":
    main()
