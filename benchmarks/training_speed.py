"""Seconds per epoch and per fit: a plain loop, all blocks, and the last four of twelve on cached activations.

    python benchmarks/training_speed.py --her2st PATH --vits PATH --out FOLDER [--rounds 3] [--threads 2]

her2st C2 and C3, ViT-S/14 at 112 px, features of the last block, fp32, six epochs a fit. Every round runs everything
once, one after the other; medians over rounds, ratios within a round. Peak memory is of a process for each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

import pekasc as pk
from _her2st import KeptRows, vits
from _machine import machine
from _plain_loop import PlainLoop, teacher_of
from pekasc._expression import dense, log1p_cp10k
from pekasc._options import Recipe
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import CachePlan, EmbedJob, TileInputs, cache_activations
from pekasc.models.runtime import peak_memory
from pekasc.models.training import Engine, make_config, target_layers, train_student
from pekasc.tiling import ArrayTiles

CPU = torch.device("cpu")
EPOCHS = 6
PLAIN, ALL = "plain loop, all 12 blocks", "pekasc, all 12 blocks"
TAILS = {
    "last 4, 1 view": (1, False), "last 4, 1 view, on disk": (1, True), "last 4, 2 views": (2, False),
    "last 4, 4 views": (4, False), "last 4, 8 views": (8, False),
}  # fmt: skip


class _Clock(L.Callback):
    """Seconds of every epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def data(her2st: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return tiles and teacher embedding of C2 and C3."""
    sdata = pk.datasets.her2st(("C2", "C3"), path=her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    tiles = np.asarray(pk.get.tiles(sdata).data)
    return tiles, teacher_of(dense(log1p_cp10k(sdata["table"])))


def run(label: str, weights: Path, tiles: np.ndarray, teacher: np.ndarray, epochs: int, folder: Path) -> dict[str, Any]:
    """Train once; return seconds of the whole, of caching the activations, and of every epoch."""
    start = time.perf_counter()
    if label == PLAIN:
        loop = PlainLoop(weights, tiles, teacher, 0)
        seconds = []
        for _ in range(epochs):
            then = time.perf_counter()
            loop.epoch()
            seconds.append(time.perf_counter() - then)
        return {"whole": time.perf_counter() - start, "prefix": 0.0, "epochs": seconds}
    encoder, source = EncoderNetwork(vits(weights), 112), ArrayTiles(tiles)
    n_views, on_disk = TAILS.get(label, (8, False))
    clock, prefix = _Clock(), 0.0
    engine = Engine(CPU, "fp32", progress=False, trainer={"callbacks": [clock]})
    recipe = Recipe(epochs=epochs, n_views=n_views)
    if label == ALL:
        inputs: Any = TileInputs(source)
        blocks: Any = "all"
    else:
        blocks, then = 4, time.perf_counter()
        facts = EmbedJob(encoder.encoder, encoder.digest, 112, (8,), 1, 64, "cpu", "fp32").digest(encoder)
        plan = CachePlan(8, n_views, "fp16", 64, CPU, "fp32", 1 if on_disk else None, False, folder / "p.zarr", facts)
        inputs = cache_activations(encoder, source, np.arange(source.n), plan)
        prefix = time.perf_counter() - then
    config = make_config("bone", recipe.rank, target_layers(encoder, (12,), blocks))
    everything = np.arange(source.n)
    train_student(
        encoder, (12,), config, inputs, everything, teacher, recipe=recipe, epochs=epochs, engine=engine,
        random_state=0, local=np.ones(source.n, dtype=bool),
    )  # fmt: skip
    return {"whole": time.perf_counter() - start, "prefix": prefix, "epochs": clock.seconds}


def main() -> None:
    """Run the rounds that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True)
    parser.add_argument("--vits", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    tiles, teacher = data(a.her2st)
    folder = Path(tempfile.mkdtemp(prefix="pekasc-speed-"))
    try:
        if a.memory_of:
            run(a.memory_of, a.vits, tiles, teacher, 1, folder)
            print(json.dumps({"peak": peak_memory(CPU)}))
            return
        kept = KeptRows(a.out / "speed.jsonl")
        labels = [PLAIN, ALL, *TAILS]
        for number in range(a.rounds):
            for label in labels:
                if any(r["round"] == number and r["label"] == label for r in kept.rows):
                    continue
                shutil.rmtree(folder, ignore_errors=True)
                row = {"round": number, "label": label, **run(label, a.vits, tiles, teacher, a.epochs, folder)}
                kept.add([row])
                print(label, f"{row['whole']:.1f} s", flush=True)
        for label in labels:
            if not any(r["round"] == "memory" and r["label"] == label for r in kept.rows):
                command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", label]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                kept.add([{"round": "memory", "label": label, **json.loads(out.splitlines()[-1])}])
        print(f"{len(tiles)} tiles, {a.threads} threads. {machine()}\n{table(kept.rows, labels)}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[dict[str, Any]], labels: list[str]) -> str:
    """Return medians over rounds; ratios to all blocks are taken within a round."""
    lines = [
        "| training | s per epoch | caching, s | fit, s | epoch: times faster than all blocks | fit: times | peak GB |"
    ]
    lines.append("|" + " --- |" * 7)
    by = {(r["round"], r["label"]): r for r in rows}
    rounds = sorted({r["round"] for r in rows if r["round"] != "memory"})
    for label in labels:
        of = [by[n, label] for n in rounds]
        base = [by[n, ALL] for n in rounds]
        epoch = [np.median(r["epochs"][1:] or r["epochs"]) for r in of]
        of_all = [np.median(r["epochs"][1:] or r["epochs"]) for r in base]
        faster = np.median(np.array(of_all) / np.array(epoch))
        whole = np.median([b["whole"] / r["whole"] for r, b in zip(of, base, strict=True)])
        peak = by["memory", label]["peak"] / 1e9
        lines.append(
            f"| {label} | {np.median(epoch):.2f} | {np.median([r['prefix'] for r in of]):.1f} | "
            f"{np.median([r['whole'] for r in of]):.1f} | {faster:.2f} | {whole:.2f} | {peak:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
