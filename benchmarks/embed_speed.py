"""Does the encoder wait for tiles? `tl.embed_tiles` against the bare model on tensors that are in memory.

    python benchmarks/embed_speed.py --her2st PATH --vits PATH --out FOLDER

Section C2 of her2st as zarr (see `tile_speed.py`), tiles at spots. `tiny` at 112 px with many tiles (the spots, shifted
several times), ViT-S/14 at 224 px with few. In every round, one after the other: the bare model over batches of
tensors in memory, the reader alone (its CPU time is taken), and embedding from the zarr store.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pekasc as pk
from _machine import machine
from pekasc._sections._tiled import tiled_sections
from pekasc.models.encoders import EncoderNetwork, resolve_encoder
from pekasc.models.features import BatchEncoder, embed_chunks
from pekasc.tiling import TileGeometry, TileReader, TileSpec, batches
from pekasc.tiling._parallel import n_threads
from tile_speed import stored

BATCH = 64


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with C2")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True, help="where the zarr store goes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    sdata = stored(arguments.her2st, arguments.out)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    section = tiled_sections(sdata)[0][0]
    vits = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    print(
        "| encoder | tiles | bare model, s | reader: CPU s | embed, s | embed / (bare + CPU / cores) | bare / embed |"
    )
    print("|---|---|---|---|---|---|---|")
    for encoder, px, shifts in (("tiny", 112, 4), (vits, 224, 1)):
        spec = TileSpec(px, 112 / px)
        centres = np.concatenate([section.centres_px + 40 * i for i in range(shifts)])
        geometry = TileGeometry(centres, section.um_to_px, spec)

        def reader(geometry: TileGeometry = geometry) -> TileReader:
            assert section.pyramid is not None
            return TileReader(section.pyramid, geometry)

        run = BatchEncoder(EncoderNetwork(resolve_encoder(encoder), px), [(-1,)], 1, torch.device("cpu"), "fp32")
        run.depths = [(run.encoder.n_blocks,)]
        held = [tiles for _, tiles in batches(reader(), BATCH)]
        tensors = [run.encoder.normalise(torch.from_numpy(tiles)) for tiles in held]

        def bare(run: BatchEncoder = run, tensors: list[torch.Tensor] = tensors) -> None:
            with torch.inference_mode():
                for x in tensors:
                    run.encoder(x, [run.encoder.n_blocks])

        def read(reader: Callable[[], TileReader] = reader) -> None:
            for _ in batches(reader(), BATCH):
                pass

        def embed(run: BatchEncoder = run, reader: Callable[[], TileReader] = reader) -> None:
            source = reader()
            order = source.reading_order
            for _ in embed_chunks(run, source, [order[i : i + 256] for i in range(0, len(order), 256)], BATCH):
                pass

        rounds = [(timed(bare)[0], timed(read)[1], timed(embed)[0]) for _ in range(arguments.rounds + 1)][1:]
        bound = [w / (b + c / arguments.threads) for b, c, w in rounds]
        rate = [b / w for b, _, w in rounds]
        b, c, w = np.median(rounds, axis=0)
        name = encoder if isinstance(encoder, str) else encoder.short
        print(
            f"| {name}, {px} px | {len(centres)} | {b:.2f} | {c:.2f} | {w:.2f} | {np.median(bound):.3f} | "
            f"{np.median(rate):.3f} |", flush=True,
        )  # fmt: skip
    print(
        f"\n{arguments.threads} threads of torch, {n_threads()} of the reader; medians of {arguments.rounds} rounds. "
        f"{machine()}"
    )


if __name__ == "__main__":
    main()
