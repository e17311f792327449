"""A slide without spots, larger than memory: peak memory, kills, the time of one gene's map, files and bytes.

    python benchmarks/slide_predict.py memory --side 100000 --genes 2000 18000 --out slide_predict
    python benchmarks/slide_predict.py kills --genes 18000 --stride 60 --out slide_predict
    python benchmarks/slide_predict.py kills --side 100000 --mpp 4 --genes 18000 --out slide_predict
    python benchmarks/slide_predict.py map --out slide_predict
    python benchmarks/slide_predict.py room --out slide_predict

memory: a phantom of that many pixels at 0.5 um, read lazily, tiles of 112 px at `--mpp` (1.0) um every `--stride`
(200) um, all of it taken for tissue; the encoder is a stub (timm's test_vit with random weights), since memory does not
depend on it; the adapter is frozen, with spatial context, and predicts that many genes into a store. Peak memory is
that of the process that predicts, from its start. With `--mpp 4` the level that is read is drawn in seconds; at 1.0 um
all pixels of the finest level are drawn, which takes most of an hour. With `--share` the second number of genes finds
the features of the first in the store, so that only predicting is repeated.
kills: the same run once; then killed three times by SIGKILL, when a fifth, a half and nine tenths of the files were
there, and run to the end: the same bits? What was in work at a kill is lost: a file of 256 tiles' features or a part of
the predictions.
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

TILE_PX = 112
TIMM = "test_vit"
PACKAGES = ("pekasc", "torch", "timm", "zarr", "spatialdata", "anndata", "numpy")


def adapter_of(n_genes: int, mpp: float = 1.0) -> pk.Adapter:
    """Return a frozen stub with context, fitted on a small phantom."""
    small = pk.datasets.phantom(n_patients=2, size_um=800 * max(1.0, mpp / 2), mpp=mpp, n_genes=n_genes)
    pk.pp.tile(small, tile_px=TILE_PX, mpp=mpp)
    encoder = pk.models.Encoder(TIMM, weights="random", model_kwargs={"img_size": TILE_PX})
    return pk.tl.fit_adapter(
        small, encoder=encoder, method=None, genes=list(small["table"].var_names), progress=False,
        readout=pk.Readout.preset("ridge").replace(n_depths=None, depth=2, context_um=250), random_state=0,
    )  # fmt: skip


def slide(side_px: int, mpp: float = 1.0, stride_um: float = 200) -> Any:
    um = side_px * 0.5
    sdata = pk.datasets.phantom(n_patients=1, size_um=um, mpp=0.5, n_genes=4, n_spots=500, lazy=True)
    pk.pp.tile_grid(
        sdata, "P1S1_he", tile_px=TILE_PX, mpp=mpp, stride_um=stride_um, tissue=False, min_sharpness=None,
        max_pen=None,
    )  # fmt: skip
    return sdata


def child(arguments: argparse.Namespace) -> None:
    """Predict, and print tiles, seconds and peak memory."""
    adapter = pk.Adapter.load(arguments.adapter)
    sdata = slide(arguments.side, arguments.mpp, arguments.stride)
    start = time.perf_counter()
    pk.tl.predict_expression(sdata, adapter, table_name="grid", store=arguments.store, progress=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"tiles": sdata["grid"].n_obs, "seconds": seconds, "peak_gb": peak_gb("self")}))


def peak_gb(process: int | str) -> float:
    """Return the largest resident memory of a process so far, in GB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) * 1024 / 1e9


def started(arguments: argparse.Namespace, adapter: Path, store: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "child", "--side", str(arguments.side), "--mpp", str(arguments.mpp)]
    command += ["--stride", str(arguments.stride), "--adapter", str(adapter), "--store", str(store)]
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


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a process printed at its end."""
    out, _ = process.communicate()
    return json.loads(out.splitlines()[-1])


def told(arguments: argparse.Namespace, found: dict[str, Any], n_genes: int) -> str:
    return (
        f"{arguments.side} px, {found['tiles']} tiles, {n_genes} genes: peak {found['peak_gb']:.2f} GB, "
        f"{found['seconds']:.0f} s"
    )


def memory(arguments: argparse.Namespace) -> None:
    store = arguments.out / f"store-{arguments.genes[0]}"
    shutil.rmtree(store, ignore_errors=True)
    for n_genes in arguments.genes:
        adapter = arguments.out / f"adapter-{n_genes}"
        if not arguments.share:
            store = arguments.out / f"store-{n_genes}"
            shutil.rmtree(store, ignore_errors=True)
        adapter_of(n_genes, arguments.mpp).save(adapter)
        found = finished(started(arguments, adapter, store))
        n_files, size = files_and_bytes(store)
        print(f"{told(arguments, found, n_genes)}; {n_files} files of {size / 1e9:.2f} GB in the store", flush=True)


def kills(arguments: argparse.Namespace) -> None:
    n_genes = arguments.genes[0]
    adapter = arguments.out / f"adapter-kills-{n_genes}"
    adapter_of(n_genes, arguments.mpp).save(adapter)
    whole, killed = arguments.out / "whole", arguments.out / "killed"
    for store in (whole, killed):
        shutil.rmtree(store, ignore_errors=True)
    print(told(arguments, finished(started(arguments, adapter, whole)), n_genes), flush=True)
    n_chunks = len(chunks(whole))
    for share in (0.2, 0.5, 0.9):
        process = started(arguments, adapter, killed)
        while len(chunks(killed)) < share * n_chunks:
            if process.poll() is not None:
                raise SystemExit("The process ended before it was killed.")
            time.sleep(0.05)
        peak = peak_gb(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed with {len(chunks(killed))} of {n_chunks} files there, peak {peak:.2f} GB", flush=True)
    print("run again: " + told(arguments, finished(started(arguments, adapter, killed)), n_genes))
    same = digest(whole) == digest(killed) and len(chunks(killed)) == n_chunks
    print(f"killed three times and run again: {'the same bits' if same else 'OTHER'}")


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
    parser.add_argument("--mpp", type=float, default=1.0, help="um per pixel of a tile")
    parser.add_argument("--stride", type=float, default=200, help="um between tiles")
    parser.add_argument("--share", action="store_true", help="one store for all numbers of genes")
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
