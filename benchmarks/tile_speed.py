"""Tiles per second on real tissue in zarr, against spatialdata's own tile dataset and against decoding alone.

    python benchmarks/tile_speed.py --her2st PATH --out FOLDER

Section C2 of her2st, written as a SpatialData zarr with chunks of 512 px (single scale, zarr's own compression), read
back lazily. `spots`: a tile of 112 um around every spot, 163 px interpolated to 224. `grid`: 5,000 tiles of that
size in rows that touch, 163 px to 224. Rivals, taking turns in every round:

- `ImageTilesDataset` of spatialdata: its crops as arrays, without resampling, and rasterized to 224 px
- the crop of each tile from the dask array, and from the zarr array
- each chunk that the tiles need, decoded once by zarr on one thread: the floor of any reader that decodes on one
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import spatialdata as sd
import zarr
from spatialdata.dataloader import ImageTilesDataset
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from _machine import machine
from pekasc._sections._tiled import section_readers, tiled_sections
from pekasc.tiling import ImagePyramid, TileGeometry, TileReader, TileSpec, batches
from pekasc.tiling._parallel import n_threads

SPEC = TileSpec(224, 0.5)
N_GRID = 5000


def stored(her2st: Path, folder: Path) -> sd.SpatialData:
    path = folder / "C2.zarr"
    if not path.exists():
        sdata = pk.datasets.her2st(("C2",), path=her2st)
        image = sd.get_pyramid_levels(sdata["C2_he"], n=0)
        sdata.images["C2_he"] = Image2DModel.parse(
            np.asarray(image), dims=("c", "y", "x"), c_coords=["r", "g", "b"], chunks=(3, 512, 512),
            transformations=get_transformation(sdata["C2_he"], get_all=True),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        sdata.write(path)
    return sd.read_zarr(path)


def grid(section: Any) -> TileGeometry:
    """Return 5,000 tiles in rows that touch; a grid that is full begins again, shifted by half a tile."""
    side = SPEC.side_um * np.linalg.norm(section.um_to_px[:, 0])
    width, height = section.size_px
    columns, rows = (np.arange(side, size - side, side) for size in (width, height))
    x, y = (axis.ravel() for axis in np.meshgrid(columns, rows))
    centres = np.column_stack([x, y])
    times = -(-N_GRID // len(centres))
    every = np.concatenate([centres + i * side / 2 / times for i in range(times)])[:N_GRID]
    return TileGeometry(every, section.um_to_px, SPEC)


def read_all(make: Callable[[], TileReader]) -> None:
    for _ in batches(make(), 64):
        pass


def needed_chunks(reader: TileReader) -> list[tuple[int, int]]:
    return sorted({key for box in reader._boxes(np.arange(reader.n)) for key in reader._source.chunks_of(box)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with C2")
    parser.add_argument("--out", type=Path, required=True, help="where the zarr store goes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rival-tiles", type=int, default=60, help="tiles of ImageTilesDataset in every round")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    sdata = stored(arguments.her2st, arguments.out)
    pk.pp.tile(sdata, tile_px=SPEC.tile_px, mpp=SPEC.mpp)
    sections, spec = tiled_sections(sdata)
    pyramid: ImagePyramid = sections[0].pyramid
    geometries = {"spots": None, "grid": grid(sections[0])}

    def reader(name: str) -> TileReader:
        geometry = geometries[name]
        return section_readers(sections, spec)[0] if geometry is None else TileReader(pyramid, geometry)

    array = zarr.open_array(next((arguments.out / "C2.zarr" / "images" / "C2_he").glob("*/zarr.json")).parent, mode="r")
    rivals = {
        kind: ImageTilesDataset(
            sdata,
            {"C2_spots": "C2_he"},
            {"C2_spots": "C2"},
            table_name="table",
            tile_dim_in_units=SPEC.side_um / sections[0].mpp,
            transform=lambda s: np.asarray(s["C2_he"].data),
            **how,
        )  # fmt: skip
        for kind, how in {
            "cropped": {},
            "rasterized": {"rasterize": True, "rasterize_kwargs": {"target_width": SPEC.tile_px}},
        }.items()
    }
    ways: dict[str, tuple[Callable[[], Any], int]] = {}
    for name in geometries:
        n, chunks = reader(name).n, needed_chunks(reader(name))
        ways[f"{name}: pekasc"] = (lambda name=name: read_all(lambda: reader(name)), n)
        ways[f"{name}: each chunk once, one thread"] = (
            lambda chunks=chunks: [array.blocks[0, y, x] for y, x in chunks], n
        )  # fmt: skip
    some = range(min(arguments.rival_tiles, len(rivals["cropped"])))
    boxes = reader("spots")._boxes(np.arange(len(some)))
    lazy = pyramid.levels[0]
    for kind, source in (("dask", lambda crop: lazy[crop].compute()), ("zarr", lambda crop: array[crop])):
        crops = [(slice(None), slice(y0, y1), slice(x0, x1)) for y0, y1, x0, x1 in boxes]
        ways[f"spots: {kind}, a crop for each"] = (
            lambda source=source, crops=crops: [source(crop) for crop in crops], len(crops)
        )  # fmt: skip
    for kind, dataset in rivals.items():
        ways[f"spots: ImageTilesDataset, {kind}"] = (lambda dataset=dataset: [dataset[i] for i in some], len(some))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(arguments.rounds + 1):
        for name, (work, n) in ways.items():
            start = time.perf_counter()
            work()
            if i:  # the first round compiles and fills the disk cache
                seconds[name].append((time.perf_counter() - start) / n)
    ms = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    print("| tiles | ms per tile | times |\n|---|---|---|")
    for name, value in ms.items():
        own = ms[f"{name.split(':')[0]}: pekasc"]
        print(f"| {name} | {value:.3f} | {value / own:.2f} |")
    print(f"\n{n_threads()} threads of pekasc; medians of {arguments.rounds} rounds. {machine()}")


if __name__ == "__main__":
    main()
