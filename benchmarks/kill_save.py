"""kill -9 at random moments in `adapter.save` over an existing adapter: does it load, does it save, what is left?

    python benchmarks/kill_save.py

A process saves two adapters over one folder, in turn, until it is killed 10 to 120 ms after it began, a hundred times.
After every kill the folder is loaded; after half of them it is saved to, so that the other kills meet what was left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

N_KILLS = 100
FILES = ["adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "pekasc.json"]


def killed_saves(adapter: Any, path: Path, n_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill saves over the folder `path`, and return how often it did not load or save, and what was left.

    Parameters
    ----------
    adapter
        A trained adapter. The other one is its head on the frozen encoder, which has fewer files.
    path
        The folder, in a folder of its own.
    n_kills, seed
        Number of kills, and seed of their moments.
    """
    other, chance = replace(adapter, config=None, weights={}, method="frozen"), random.Random(seed)
    counts = {"kills": n_kills, "not loaded": 0, "not saved": 0, "more or fewer files": 0}
    adapter.save(path)
    for i in range(n_kills):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child only writes files
            child = os.fork()
        if child == 0:
            while True:
                other.save(path)
                adapter.save(path)
        time.sleep(chance.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            loaded = type(adapter).load(path)
            counts["not loaded"] += loaded.method not in (adapter.method, "frozen")
        except (OSError, ValueError):
            counts["not loaded"] += 1
        if chance.random() < 0.5 or i == n_kills - 1:
            try:
                adapter.save(path)
            except (OSError, ValueError):
                counts["not saved"] += 1
            counts["more or fewer files"] += sorted(file.name for file in path.iterdir()) != FILES
    return {**counts, "left beside it": sorted(file.name for file in path.parent.iterdir() if file != path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=N_KILLS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch

    import pekasc as pk

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, n_genes=40, mpp=2.0)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    adapter = pk.tl.fit_adapter(
        sdata, recipe=pk.Recipe(epochs=1, n_views=1, rank=4, choose_epochs=False), compute={"device": "cpu"},
        progress=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(killed_saves(adapter, Path(folder) / "adapter", arguments.kills, arguments.seed)))
    from _machine import machine

    print(machine())


if __name__ == "__main__":
    main()
