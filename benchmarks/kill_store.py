"""kill -9 at random moments, 20 times in a row, then finish: what is in the store, and what was computed twice?

    python benchmarks/kill_store.py --out FOLDER

Two phantom sections, the encoder `tiny` on tiles of 56 px, chunks of 32 tiles so that there are many. Every run counts
the chunks that it computes. A process is killed at a random moment after the call, within a tenth of the time that a
whole run takes (opening and checking the store is part of it); the last is left alone. Then the store is compared
with that of a run without a kill, file by file. At last a run on a full disk: a small file system in memory, where one
can be mounted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

N_KILLS = 20
CHUNK = 32


def embed(store: Path, log: Path) -> None:
    """Embed into a store; append a line to the log when it starts, and one for every chunk that was computed."""
    import torch

    import pekasc as pk
    from pekasc.models.features import embed_pieces
    from pekasc.tl import _section_features

    torch.set_num_threads(1)
    _section_features._CHUNK = CHUNK
    sdata = pk.datasets.phantom(2, size_um=8000, mpp=2.0, n_genes=8)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0, strict=False)
    with log.open("a", buffering=1) as lines:

        def counted(*args: object) -> object:
            lines.write("start\n")
            for found in embed_pieces(*args):  # type: ignore[arg-type]
                lines.write("chunk\n")
                yield found

        setattr(_section_features, "embed_pieces", counted)  # noqa: B010 (imported there, not its own)
        lines.write("begin\n")
        began = time.perf_counter()
        pk.tl.embed_tiles(sdata, "tiny", store=store, progress=False, compute={"embed_batch_size": 16, "device": "cpu"})
        lines.write(f"end {time.perf_counter() - began:.2f}\n")


def run(store: Path, log: Path, kill_after: float | None = None) -> bool:
    """Run in a process of its own; kill it so long after the call. Return whether it came to its end."""
    before = log.read_text().count("begin") if log.exists() else 0
    command = [sys.executable, "-W", "ignore", __file__, "--embed", str(store), str(log)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if kill_after is not None:
        while process.poll() is None and (not log.exists() or log.read_text().count("begin") == before):
            time.sleep(0.005)
        time.sleep(kill_after)
        os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(errors.decode()[-2000:])
    return process.returncode == 0


def content(store: Path) -> dict[str, str]:
    files = (file for file in sorted(store.rglob("*")) if file.is_file())
    return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def full_disk(out: Path) -> str:
    """Embed into a file system of 600 kB; give it room, and go on."""
    room, log = out / "small", out / "small.log"
    room.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(room)], capture_output=True)
    if mount.returncode:
        return "a full disk: not tried, no file system could be mounted here"
    try:
        try:
            run(room / "s.zarr", log)
            return "a full disk: 600 kB were enough, nothing was shown"
        except RuntimeError as error:
            message = str(error).strip().splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=50m", str(room)], check=True)
        before = log.read_text().count("chunk")
        run(room / "s.zarr", log)
        same = content(room / "s.zarr") == content(out / "whole.zarr")
        more = log.read_text().count("chunk") - before
        return f"a full disk: `{message}` after {before} chunks; with room, {more} more, store as without: {same}"
    finally:
        subprocess.run(["umount", str(room)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the stores, emptied first")
    parser.add_argument("--embed", type=Path, nargs=2, help="what each process does")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.embed:
        embed(*arguments.embed)
        return
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run(out / "whole.zarr", out / "whole.log")
    whole = (out / "whole.log").read_text()
    n_chunks, seconds = whole.count("chunk"), float(whole.split()[-1])
    log, kill, store = out / "killed.log", random.Random(arguments.seed), out / "killed.zarr"
    killed = sum(not run(store, log, kill.uniform(0, seconds / 10)) for _ in range(N_KILLS))
    run(store, log)
    computed = log.read_text().count("chunk")
    print(json.dumps({"kills": killed, "chunks": n_chunks, "computed in all": computed}))
    print("store as without a kill, bit for bit:", content(store) == content(out / "whole.zarr"))
    print("computed twice:", computed - n_chunks, "of at most", killed)
    print(full_disk(out))
    from _machine import machine

    print(machine())


if __name__ == "__main__":
    main()
