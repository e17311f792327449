"""`pekasc predict` on lists: half a file among three, two processes of which one is killed, files of a result.

    python benchmarks/predict_lists.py --out FOLDER

Slides are phantoms of 4 mm at 2 um per pixel, written as tiled TIFF; the adapter is frozen `tiny` at 56 px, on its
default grid of 112 um, on tissue. half: three slides, the second cut to half its bytes. two: two processes on one list
of eight; one is killed (SIGKILL) while it works on a slide, once three slides are finished; every slide has to be done
once, and to hold the bits of a run of one process. files: those of one result, by folder.
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
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import pekasc as pk
from _machine import machine

MPP, SIDE_UM, N_SLIDES = 2.0, 4000, 8
PACKAGES = ("pekasc", "torch", "timm", "zarr", "spatialdata", "anndata", "tifffile", "numpy")


def adapter(folder: Path) -> Path:
    sdata = pk.datasets.phantom(n_patients=2, size_um=800, mpp=MPP)
    pk.pp.tile(sdata, tile_px=56, mpp=MPP)
    made = pk.tl.fit_adapter(sdata, method=None, readout={"depth": 2}, progress=False, random_state=0)
    made.save(folder)
    return folder


def slides(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    sdata = pk.datasets.phantom(n_patients=N_SLIDES, size_um=SIDE_UM, mpp=MPP)
    files = []
    for name in sdata.images:
        pixels = np.moveaxis(np.asarray(sdata[name]["scale0"]["image"]), 0, -1)
        files.append(folder / f"{name.removesuffix('_he')}.tif")
        tifffile.imwrite(
            files[-1], pixels, tile=(256, 256), photometric="rgb", compression="deflate", resolution=(1e4 / MPP,) * 2,
            resolutionunit="CENTIMETER",
        )  # fmt: skip
    return files


def started(arguments: list[Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pekasc", "predict", *map(str, arguments), "--json", "--compute", "device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def results(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    out, errors = process.communicate()
    return [json.loads(line) for line in out.splitlines()], errors


def half(files: list[Path], of: Path, out: Path) -> None:
    cut = out / "half.tif"
    cut.write_bytes(files[1].read_bytes()[: files[1].stat().st_size // 2])
    process = started([files[0], cut, files[2], "--adapter", of, "--out", out / "half"])
    found, errors = results(process)
    print(f"half: {dict(Counter(r['status'] for r in found))}, exit code {process.returncode}")
    print("      " + errors.splitlines()[-1].replace(str(out), "FOLDER"))


def digest(store: Path) -> str:
    files = sorted(file for file in store.rglob("*") if file.is_file() and "c" in file.relative_to(store).parts)
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


def in_work(out: Path) -> list[str]:
    """Return the slides whose predictions have begun and whose result is not there yet."""
    begun = {store.name for store in (out / "predictions").glob("*.zarr")} if (out / "predictions").is_dir() else set()
    return sorted(begun - {target.name for target in out.glob("*.zarr")})


def two(files: list[Path], of: Path, out: Path) -> None:
    listed, shared, alone = out / "slides.txt", out / "two", out / "one"
    listed.write_text("\n".join(map(str, files)))
    arguments: list[Any] = ["--list", listed, "--adapter", of, "--out"]
    one, _ = results(started([*arguments, alone]))
    print(f"one process: {dict(Counter(r['status'] for r in one))}")
    killed, other = started([*arguments, shared]), started([*arguments, shared])
    while len(list(shared.glob("*.zarr"))) < 3 or len(in_work(shared)) < 2:
        if killed.poll() is not None or other.poll() is not None:
            raise SystemExit("A process ended before the kill: make the slides larger.")
        time.sleep(0.01)
    at = in_work(shared)
    killed.send_signal(signal.SIGKILL)
    first, _ = results(killed)
    second, _ = results(other)
    done = Counter(Path(r["source"]).name for r in first + second if r["status"] == "done")
    print(
        f"two: killed after {sum(r['status'] == 'done' for r in first)} of its slides, with {len(at)} in work; "
        f"{sum(done.values())} done by both, {len(done)} slides, each {sorted(set(done.values()))} times; "
        f"exit codes {killed.returncode} and {other.returncode}"
    )
    names = [f"{file.stem}.zarr" for file in files]
    same = sum(digest(alone / "predictions" / name) == digest(shared / "predictions" / name) for name in names)
    print(f"     {same} of {len(names)} stores with the bits of one process's")


def n_files(result: Path) -> None:
    inside = [file.relative_to(result) for file in result.rglob("*") if file.is_file()]
    folders = Counter("/".join(file.parts[:3] if file.parts[0] == "tables" else file.parts[:2]) for file in inside)
    size = sum((result / file).stat().st_size for file in inside)
    print(f"files: {len(inside)} of {size / 1e6:.1f} MB in {result.name}; {dict(folders.most_common())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    warnings.filterwarnings("ignore")
    logging.getLogger("pekasc").setLevel(logging.ERROR)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    print(machine(PACKAGES), flush=True)
    of, files = adapter(out / "adapter"), slides(out / "slides")
    half(files, of, out)
    two(files, of, out)
    n_files(out / "one" / f"{files[0].stem}.zarr")
    n_files(out / "one" / "predictions" / f"{files[0].stem}.zarr")


if __name__ == "__main__":
    main()
