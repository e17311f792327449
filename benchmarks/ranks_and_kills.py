"""Two processes against one, and a training that is killed against one that is not.

    python benchmarks/ranks_and_kills.py --her2st PATH --vits PATH [--kills 4]

her2st C2 and C3, ViT-S/14 at 112 px cut after block 6, the last four blocks, six epochs in each of two inner folds and
the last fit (``recipe="paper"`` with these numbers, which chooses no epochs), fp32. One process with two threads; two
processes (gloo, DDP) with one thread each; one process that is killed (SIGKILL) at random times and called again with
the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from _machine import machine


def child(a: argparse.Namespace) -> None:
    """Fit once."""
    import torch

    import pekasc as pk
    from _her2st import vits

    torch.set_num_threads(a.threads)
    sdata = pk.datasets.her2st(("C2", "C3"), path=a.her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    recipe = pk.Recipe.preset("paper").replace(
        blocks=4, rank=64, n_clusters=17, teacher_components=128, epochs=6, n_views=4, learning_rate=3e-4
    )
    readout = pk.Readout.preset("ridge").replace(n_depths=None, depth=6, n_components=128)
    adapter = pk.tl.fit_adapter(
        sdata, encoder=vits(a.vits), recipe=recipe, readout=readout,
        compute={"device": "cpu", **json.loads(a.child)}, progress=False,
    )  # fmt: skip
    if os.environ.get("LOCAL_RANK", "0") == "0":
        adapter.save(a.out)
        adapter.history.to_csv(a.out / "history.csv")


def start(a: argparse.Namespace, out: Path, compute: dict[str, Any], threads: int) -> subprocess.Popen[bytes]:
    """Start a process that fits."""
    command = [sys.executable, __file__, "--her2st", str(a.her2st), "--vits", str(a.vits), "--out", str(out)]
    command += ["--threads", str(threads), "--child", json.dumps(compute)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for it."""
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(error.decode()[-3000:])


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return all numbers of a saved adapter."""
    return {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "heads.safetensors")}


def main() -> None:
    """Run all three, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True)
    parser.add_argument("--vits", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(a)
        return
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        seconds = {}
        for label, compute, threads in (
            ("one", {}, 2), ("two", {"trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}}, 1),
        ):  # fmt: skip
            then = time.perf_counter()
            finish(start(a, base / label, compute, threads))
            seconds[label] = time.perf_counter() - then
        resumed: dict[str, Any] = {"resume": str(base / "state"), "checkpoint_minutes": 0.02}
        generator, kills, process = random.Random(0), 0, None
        while kills < a.kills:
            process = start(a, base / "killed", resumed, 2)
            time.sleep(generator.uniform(0.35, 0.9) * seconds["one"])
            if process.poll() is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        finish(start(a, base / "killed", resumed, 2))
        one, two, killed = (pd.read_csv(base / label / "history.csv") for label in ("one", "two", "killed"))
        loss = np.nanmax(np.abs(one["loss"] - two["loss"]))
        first, second, third = (weights(base / label) for label in ("one", "two", "killed"))
        adapter = max(float(np.abs(first[k] - second[k]).max()) for k in first if "miss" in k)
        same = all(first[k].tobytes() == third[k].tobytes() for k in first)
        epochs = int((one["epoch"] > 0).sum())
        training = {
            label: json.loads((base / label / "pekasc.json").read_text())["info"]["profile"] for label in ("one", "two")
        }
        print(f"two processes: largest difference of a loss {loss:.2g}, of an adapter weight {adapter:.2g}.")
        for label in ("one", "two"):
            s = training[label]["seconds"]
            print(
                f"{label}: training {s['training'] / epochs:.2f} s an epoch, encoding {s['encoding']:.1f} s, "
                f"whole {seconds[label]:.0f} s"
            )
        history = one["loss"].equals(killed["loss"])
        print(
            f"killed {kills} times: weights {'the same to the last bit' if same else 'DIFFER'}, "
            f"losses {'the same' if history else 'DIFFER'}."
        )
        print(machine())


if __name__ == "__main__":
    main()
