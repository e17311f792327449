"""A slide without spots, larger than memory: peak memory, kills, the time of one gene's map, files and bytes.

    python benchmarks/slide_predict.py memory --side 100000 --genes 2000 18000 --out slide_predict
    python benchmarks/slide_predict.py kills --out slide_predict
    python benchmarks/slide_predict.py map --out slide_predict
    python benchmarks/slide_predict.py room --out slide_predict

memory: a phantom of that many pixels at 0.5 um, read lazily, tiles of 112 um every 200 um, all of it taken for tissue;
the encoder is a stub (timm's test_vit with random weights), since memory does not depend on it; the adapter is frozen,
with spatial context, and predicts that many genes into a store. Peak memory is that of the process that predicts.
kills: the same on 12,000 px, run once; then killed three times by SIGKILL, when a fifth, a half and nine tenths of the
files were there, and run to the end: the same bits?
map: one gene out of a store of 40,000 tiles x 18,000 genes, numbers drawn, no encoder; the cache of the file system is
warm.
room: files and bytes of a store of 4,000 tiles x 2,000 genes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import pekasc as pk
from _machine import machine

TILE: dict[str, Any] = {"tile_px": 112, "mpp": 1.0}
TIMM = "test_vit"
PACKAGES = ("pekasc", "torch", "timm", "zarr", "spatialdata", "anndata", "numpy")


def adapter_of(n_genes: int) -> pk.Adapter:
    """Return a frozen stub with context, fitted on a small phantom."""
    small = pk.datasets.phantom(n_patients=2, size_um=800, mpp=1.0, n_genes=n_genes)
    pk.pp.tile(small, **TILE)
    encoder = pk.models.Encoder(TIMM, weights="random", model_kwargs={"img_size": TILE["tile_px"]})
    return pk.tl.fit_adapter(
        small, encoder=encoder, method=None, genes=list(small["table"].var_names), progress=False,
        readout=pk.Readout.preset("ridge").replace(n_depths=None, depth=2, context_um=250), random_state=0,
    )  # fmt: skip


def slide(side_px: int) -> Any:
    um = side_px * 0.5
    sdata = pk.datasets.phantom(n_patients=1, size_um=um, mpp=0.5, n_genes=4, n_spots=500, lazy=True)
    pk.pp.tile_grid(
        sdata, "P1S1_he", **TILE, stride_um=200, tissue=False, min_sharpness=None, max_pen=None,
    )  # fmt: skip
    return sdata


def child(arguments: argparse.Namespace) -> None:
    """Predict, and print tiles, seconds and peak memory."""
    adapter = pk.Adapter.load(arguments.adapter)
    sdata = slide(arguments.side)
    start = time.perf_counter()
    pk.tl.predict_expression(sdata, adapter, table_name="grid", store=arguments.store, progress=False)
    seconds = time.perf_counter() - start
    peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    print(json.dumps({"tiles": sdata["grid"].n_obs, "seconds": seconds, "peak_gb": peak * 1024 / 1e9}))


def started(side: int, adapter: Path, store: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "child", "--side", str(side), "--adapter", str(adapter), "--store", str(store)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def files_and_bytes(folder: Path) -> tuple[int, int]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files)


def chunks(store: Path) -> list[Path]:
    files = (file for file in store.rglob("*") if "c" in file.parts and file.suffix != ".partial")
    return sorted(file for file in files if file.is_file())


def digest(store: Path) -> str:
    files = chunks(store)
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def memory(arguments: argparse.Namespace) -> None:
    for n_genes in arguments.genes:
        adapter, store = arguments.out / f"adapter-{n_genes}", arguments.out / f"store-{n_genes}"
        adapter_of(n_genes).save(adapter)
        shutil.rmtree(store, ignore_errors=True)
        out, _ = started(arguments.side, adapter, store).communicate()
        found = json.loads(out.splitlines()[-1])
        n_files, size = files_and_bytes(store)
        print(
            f"{arguments.side} px, {found['tiles']} tiles, {n_genes} genes: peak {found['peak_gb']:.2f} GB, "
            f"{found['seconds']:.0f} s, {n_files} files of {size / 1e9:.2f} GB",
            flush=True,
        )


def kills(arguments: argparse.Namespace) -> None:
    adapter = arguments.out / "adapter-200"
    adapter_of(200).save(adapter)
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    for store in (whole, killed):
        shutil.rmtree(store, ignore_errors=True)
    started(arguments.side, adapter, whole).communicate()
    n_chunks = len(chunks(whole))
    for share in (0.2, 0.5, 0.9):
        process = started(arguments.side, adapter, killed)
        while process.poll() is None and len(chunks(killed)) < share * n_chunks:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed with {len(chunks(killed))} of {n_chunks} files there", flush=True)
    started(arguments.side, adapter, killed).communicate()
    print(f"killed three times and run again: {'the same bits' if digest(whole) == digest(killed) else 'OTHER'}")


def stored(folder: Path, n_tiles: int, n_genes: int) -> Any:
    """Return drawn predictions in a store, as `predict_expression` lays them out."""
    from pekasc.models.features import PredictionStore

    shutil.rmtree(folder, ignore_errors=True)
    store = PredictionStore(folder, "0" * 64, (n_tiles, n_genes), {}, "float32")
    rng = np.random.default_rng(0)
    for rows in store.missing():
        store.write(rows, rng.random((rows.stop - rows.start, n_genes), dtype=np.float32))
    return store.layer()


def gene_map(arguments: argparse.Namespace) -> None:
    layer = stored(arguments.out / "map", 40_000, 18_000)
    seconds = {"a gene's map": [], "a tile's profile": []}
    for i in np.random.default_rng(1).integers(0, 18_000, 5):
        for name, part in (("a gene's map", layer[:, [i]]), ("a tile's profile", layer[[2 * i]])):
            start = time.perf_counter()
            np.asarray(part)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{name} of 40,000 x 18,000: {np.median(values):.2f} s (median of 5)")
    n_files, size = files_and_bytes(arguments.out / "map")
    print(f"{n_files} files of {size / 1e9:.2f} GB")


def room(arguments: argparse.Namespace) -> None:
    adapter, store = adapter_of(2000), arguments.out / "room"
    shutil.rmtree(store, ignore_errors=True)
    sdata = slide(25_400)
    pk.tl.predict_expression(sdata, adapter, table_name="grid", store=store, progress=False)
    n_files, size = files_and_bytes(store)
    print(f"{sdata['grid'].n_obs} tiles x 2000 genes: {n_files} files of {size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "kills", "map", "room", "child"])
    parser.add_argument("--side", type=int, default=12_000, help="pixels")
    parser.add_argument("--genes", type=int, nargs="+", default=[2000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pekasc").setLevel(logging.ERROR)
    if arguments.what == "child":
        child(arguments)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(machine(PACKAGES), f"{psutil.virtual_memory().total / 1e9:.0f} GB.", flush=True)
    {"memory": memory, "kills": kills, "map": gene_map, "room": room}[arguments.what](arguments)


if __name__ == "__main__":
    main()
