"""Digests of what fits, comparisons and stores give, for checking that a refactoring changes nothing.

    python benchmarks/same_results.py > before.txt                      # at one commit
    python benchmarks/same_results.py > after.txt                       # at another, on the same machine
    diff before.txt after.txt
    python benchmarks/same_results.py --only main_fit --her2st PATH --vits PATH

One line of JSON a case, on one thread, float32, on the CPU: where nothing changed, the lines are the same to the last
character. Another machine, or another version of torch or numpy, rounds in other places. ``main_fit``, a fit on real
tissue as in ``her2st_main.py``, runs where ``--her2st`` and ``--vits`` are given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spatialdata import SpatialData

import pekasc as pk
from _her2st import vits

COMPARED = [
    "fold", "section", "method", "context_um", "genes", "pearson", "pearson_low", "rmse", "difference", "depth",
    "epochs", "alpha",
]  # fmt: skip
N_HEX = 16
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)


def digest(*arrays: Any) -> str:
    """Return a digest of arrays: their types, shapes and every bit of them."""
    found = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        found.update(str((array.dtype.str, array.shape)).encode())
        found.update(array.tobytes())
    return found.hexdigest()[:N_HEX]


def adapter_digests(adapter: pk.Adapter) -> dict[str, Any]:
    """Return digests of an adapter's weights and head, and what was chosen."""
    weights = [tensor.numpy() for _, part in sorted(adapter.weights.items()) for _, tensor in sorted(part.items())]
    members = adapter.reading.members
    parts = [(linear.own, block.out) for m in members for block in m.head.blocks for linear in block.maps.values()]
    return {
        "weights": digest(*weights),
        "head": digest(*(m.head.intercept for m in members), *(array for part in parts for array in part)),
        **{name: adapter.info[name] for name in ("depth", "epochs", "alpha")},
        "n_genes": len(adapter.genes),
        "held_out": float(adapter.gene_scores["pearson"].mean()),
    }


def tiled_phantom(n_patients: int, size_um: float = 1200, **how: Any) -> SpatialData:
    """Return synthetic sections with tiles of 56 px."""
    sdata = pk.datasets.phantom(n_patients=n_patients, size_um=size_um, **how)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return sdata


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare four methods with three readouts."""
    frame = pk.tl.cross_validate(
        tiled_phantom(3), methods=["mean", "frozen", "frozen-best", "bone"], recipe={"epochs": 2, "n_views": 1},
        readout=[RIDGE, RIDGE.replace(context_um=300), pk.Readout()], compute={"device": "cpu"}, progress=False,
    )  # fmt: skip
    text = frame[COMPARED].to_csv(float_format="%.17g")
    mean = {method: float(of["pearson"].mean()) for method, of in frame.groupby("method", sort=False)}
    return {"rows": len(frame), "digest": hashlib.sha256(text.encode()).hexdigest()[:N_HEX], "mean": mean}


def resumed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit, and make the same call with the folder that the first left."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            pk.tl.fit_adapter(
                tiled_phantom(2), recipe={"epochs": 2, "n_views": 2},
                compute={"device": "cpu", "resume": f"{folder}/state"}, progress=False,
            )
            for _ in range(2)
        )  # fmt: skip
    return {"first": adapter_digests(first), "resumed": adapter_digests(second)}


def store(arguments: argparse.Namespace) -> dict[str, Any]:
    """Embed tiles into a store."""
    sdata = tiled_phantom(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "features.zarr"
        pk.tl.embed_tiles(sdata, "tiny", store=folder, compute={"device": "cpu"}, progress=False)
        features = np.asarray(sdata["table"].obsm["X_tiny"])
        chunks = sorted(file for file in folder.rglob("*") if file.is_file() and "c" in file.relative_to(folder).parts)
        content = hashlib.sha256(b"".join(file.read_bytes() for file in chunks)).hexdigest()[:N_HEX]
    return {"features": digest(features), "files": len(chunks), "content": content}


def paper(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train by the published recipe, for two epochs."""
    adapter = pk.tl.fit_adapter(
        tiled_phantom(2, 2000, n_genes=400), recipe=pk.Recipe.preset("paper").replace(epochs=2), readout="paper",
        compute={"device": "cpu"}, progress=False,
    )  # fmt: skip
    return adapter_digests(adapter)


def main_fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit on two sections of real tissue with the ViT-S/14, and predict a third."""
    sdata = pk.datasets.her2st(("C2", "C3", "C4"), path=arguments.her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    adapter = pk.tl.fit_adapter(
        sdata, encoder=vits(arguments.vits), train=["C2", "C3"], compute={"device": "cpu"}, progress=False
    )
    pk.tl.predict_expression(sdata, adapter, compute={"device": "cpu"}, progress=False)
    pk.tl.evaluate(sdata)
    table = sdata["table"]
    return {
        **adapter_digests(adapter),
        "predicted": digest(table.layers["peka"]),
        "pearson": float(table.var["peka_pearson"].mean()),
    }


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "store": store, "resumed": resumed, "compare": compare, "paper": paper, "main_fit": main_fit,
}  # fmt: skip


def main() -> None:
    """Print a line for every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, help="folder with C2, C3, C4")
    parser.add_argument("--vits", type=Path, help="weights of the ViT-S/14")
    parser.add_argument("--only", nargs="+", choices=list(CASES))
    arguments = parser.parse_args()
    real = arguments.her2st is not None and arguments.vits is not None
    if not real and "main_fit" in (arguments.only or ()):
        parser.error("main_fit needs --her2st and --vits")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in arguments.only or [case for case in CASES if real or case != "main_fit"]:
        print(json.dumps({"case": name, **CASES[name](arguments)}), flush=True)


if __name__ == "__main__":
    main()
