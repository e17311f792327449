"""Seconds and memory of the default call and of ``recipe="quick"``, beside the default call of an earlier version.

    git worktree add ../before c90b17a   # the last version whose default was plain ridge on an adapter
    python benchmarks/call_time.py --her2st PATH --vits PATH --before ../before --out results/calls

her2st C2 + C3, ViT-S/14, 112 px at 1.0 um/px; from tiles on disk to the fitted adapter, all that it chooses included.
Every call is a process of its own, one after the other in every round. On a machine that does other work, seconds of
the processor are the ones to compare. Finished runs stay in ``--out``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from _her2st import KeptRows, parsed, quick_parser
from _machine import machine

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "default, before": ("before", {}),
    "default": ("now", {}),
    "quick": ("now", {"recipe": "quick"}),
    "method=None": ("now", {"method": None}),
}
CHILD = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
import pekasc as pk
from pathlib import Path
sdata = pk.datasets.her2st(("C2", "C3"), path=Path(sys.argv[1]))
pk.pp.tile(sdata, tile_px=112, mpp=1.0)
encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=Path(sys.argv[2]))
clock, used = time.perf_counter(), time.process_time()
pk.tl.fit_adapter(sdata, encoder=encoder, progress=False, **json.loads(sys.argv[3]))
row = {"seconds": time.perf_counter() - clock, "processor": time.process_time() - used}
row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print("RESULT " + json.dumps(row))
"""


def run(source: Path, arguments: Any, how: dict[str, Any]) -> dict[str, float]:
    """Return what one call took in a process of its own, with the package of a checkout."""
    threads = str(arguments.threads)
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", CHILD, str(arguments.her2st), str(arguments.vits), json.dumps(how), threads]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.rpartition("RESULT ")[2]))


def main() -> None:
    """Run what is missing, and print the table."""
    parser = quick_parser(__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parsed(parser)
    kept = KeptRows(arguments.out / "calls.jsonl")
    sources = {"now": Path(__file__).resolve().parent.parent, "before": arguments.before}
    for number in range(0 if arguments.only == "table" else arguments.rounds):
        for label, (which, how) in CALLS.items():
            if sources[which] is None or any((r["round"], r["call"]) == (number, label) for r in kept.rows):
                continue
            found = run(sources[which], arguments, how)
            kept.add([{"round": number, "call": label, "at": time.time(), **found}])
            print(label, found, flush=True)
    frame = pd.DataFrame(kept.rows).groupby("call", sort=False)[["seconds", "processor", "peak_gb"]].median()
    if "default, before" in frame.index:
        frame["of before"] = frame["processor"] / frame.loc["default, before", "processor"]
    print(f"{machine()}\n{frame.round(2).to_string()}")


if __name__ == "__main__":
    main()
