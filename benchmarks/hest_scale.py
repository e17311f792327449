"""Read, tile, embed and predict 206,123 tiles of many samples laid out like HEST-1k, and print the peak memory.

    python benchmarks/hest_scale.py --out FOLDER

The paper that pekasc implements trains on 206,123 tiles. A folder of that many is generated: 50 samples, every second
one with a whole slide image (pyramid of JPEG tiles, level 0 at 2 um per pixel) and without patches, the others with
stored patches only. A tile shows 112 um as always, but has 28 pixels (4 um per pixel), so that the images fit a small
disk. The encoder is tiny and random: the figure is the memory of everything around an encoder. Data are made in a
process of their own, so that only reading and what follows counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

N_TILES, N_SAMPLES, N_GENES = 206_123, 50, 1000
MPP, TILE_MPP, TILE_PX = 2.0, 4.0, 28
STEP_PX = 100 / MPP
MARGIN_PX = 100
DENSITY = 0.2


def visium(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return array_row, array_col and centres (whole pixels) of `n` spots on a hexagonal grid."""
    per_row = int(np.ceil(np.sqrt(n * np.sin(np.pi / 3))))
    row, k = np.divmod(np.arange(n), per_row)
    col = 2 * k + row % 2
    xy = np.column_stack([col * STEP_PX / 2, row * STEP_PX * np.sin(np.pi / 3)])
    return row, col, np.round(xy + MARGIN_PX)


def slide(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return a pink image with structure at several scales, uint8 (height, width, 3)."""
    from scipy.ndimage import zoom

    field = np.zeros((height, width), np.float32)
    for cells in (8, 40, 200):
        coarse = rng.standard_normal((cells, cells)).astype(np.float32)
        field += zoom(coarse, (height / cells, width / cells), order=1, grid_mode=True, mode="nearest")[:height, :width]
    shade = np.clip(0.5 + 0.15 * field, 0, 1)[..., None]
    colour = shade * np.array([235, 160, 205], np.float32) + (1 - shade) * np.array([95, 45, 125], np.float32)
    return np.clip(colour + rng.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8)


def halved(image: np.ndarray) -> np.ndarray:
    h, w = (s // 2 for s in image.shape[:2])
    return np.rint(image[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean(axis=(1, 3))).astype(np.uint8)


def make(folder: Path) -> None:
    import h5py
    import pandas as pd
    import tifffile
    from anndata import AnnData
    from scipy import sparse

    for kind in ("st", "wsis", "patches", "metadata"):
        (folder / kind).mkdir(parents=True)
    sizes = np.full(N_SAMPLES, N_TILES // N_SAMPLES)
    sizes[: N_TILES % N_SAMPLES] += 1
    genes = pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)])
    for s, n in enumerate(sizes.tolist()):
        name, rng = f"GEN{s:02d}", np.random.default_rng([0, s])
        row, col, centres = visium(n)
        width, height = (int(v) + MARGIN_PX for v in centres.max(axis=0))
        image = slide(rng, width, height)
        nnz = int(N_GENES * DENSITY)
        index = np.concatenate([np.sort(rng.choice(N_GENES, nnz, replace=False)) for _ in range(n)])
        counts = sparse.csr_matrix(
            (rng.integers(1, 20, n * nnz).astype(np.float32), index, np.arange(n + 1) * nnz), shape=(n, N_GENES)
        )
        barcodes = np.array([f"{name}B{i:05d}-1" for i in rng.permutation(n)])
        obs = pd.DataFrame({"in_tissue": 1, "array_row": row, "array_col": col}, index=barcodes)
        AnnData(counts, obs=obs, var=genes, obsm={"spatial": centres}).write_h5ad(
            folder / "st" / f"{name}.h5ad", compression="lzf"
        )
        metadata = {
            "id": name, "st_technology": "Visium", "species": "Homo sapiens", "patient": f"Patient {s // 2}",
            "pixel_size_um_estimated": MPP, "inter_spot_dist": 100.0, "spot_diameter": 55.0,
            "fullres_px_width": width, "fullres_px_height": height,
        }  # fmt: skip
        (folder / "metadata" / f"{name}.json").write_text(json.dumps(metadata))
        if s % 2 == 0:
            with tifffile.TiffWriter(folder / "wsis" / f"{name}.tif", bigtiff=True) as tiff:
                for level in range(4):
                    tiff.write(
                        image, tile=(256, 256), compression="jpeg", photometric="rgb", subfiletype=int(level > 0),
                        metadata=None,
                    )  # fmt: skip
                    image = halved(image)
            continue
        side = int(TILE_PX * TILE_MPP / MPP)
        order = rng.permutation(n)
        corners = (centres[order] - side // 2).astype(np.int64)
        with h5py.File(folder / "patches" / f"{name}.h5", "w") as h5:
            img = h5.create_dataset("img", (n, TILE_PX, TILE_PX, 3), np.uint8, chunks=(1, TILE_PX, TILE_PX, 3))
            img.attrs.update({"patch_size_src": side, "patch_size_target": TILE_PX, "pixel_size": MPP})
            img[:] = np.stack([halved(image[y : y + side, x : x + side]) for x, y in corners])
            h5["coords"] = corners
            h5["barcode"] = barcodes[order].astype("S")[:, None]


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(folder: Path) -> None:
    import torch

    import pekasc as pk

    torch.set_num_threads(2)
    names = sorted(file.stem for file in (folder / "st").glob("*.h5ad"))
    start = time.perf_counter()
    rows: list[tuple[str, float, float]] = []

    def step(what: str) -> None:
        nonlocal start
        now = time.perf_counter()
        rows.append((what, now - start, peak_gb()))
        print(f"{what}: {rows[-1][1]:.0f} s, peak {rows[-1][2]:.2f} GB", flush=True)
        start = time.perf_counter()

    from pekasc import models, tl  # noqa: F401  what importing takes is told apart

    step("imports")
    sdata = pk.io.read_hest(folder, names)
    step(f"read_hest: {len(names)} samples, {sdata['table'].n_obs} spots, {sdata['table'].n_vars} genes")
    pk.pp.tile(sdata, tile_px=TILE_PX, mpp=TILE_MPP)
    n_tiled = int(np.isfinite(sdata["table"].obs["tile_inside"]).sum())
    step(f"pp.tile: {n_tiled} tiles")
    kwargs = {"img_size": TILE_PX, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 2}
    encoder = pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=kwargs, key="random")
    compute = {"embed_batch_size": 256, "device": "cpu"}
    pk.tl.embed_tiles(sdata, encoder, compute=compute, progress=False)
    step("embed_tiles")
    train = [f"{name}_spots" for name in names[:4]]
    ridge = pk.Readout.preset("ridge").replace(n_depths=None, depth=2)
    adapter = pk.tl.fit_adapter(
        sdata, encoder=encoder, method=None, train=train, genes=[f"G{i}" for i in range(50)], readout=ridge,
        compute={"device": "cpu"}, progress=False,
    )  # fmt: skip
    step("fit_adapter (4 samples, frozen encoder)")
    pk.tl.predict_expression(sdata, adapter, table_added="predicted", compute=compute, progress=False)
    step("predict_expression (all, 50 genes)")
    assert n_tiled == N_TILES == int(np.isfinite(sdata["predicted"].layers["peka"][:, 0]).sum())

    print("\n| step | seconds | peak memory so far, GB |\n|---|---|---|")
    for what, seconds, peak in rows:
        print(f"| {what} | {seconds:.0f} | {peak:.2f} |")
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "spatialdata", "anndata", "tifffile", "h5py")
    )
    print(f"\nPeak memory {rows[-1][2]:.2f} GB (the bar: 4). Python {platform.python_version()}, {versions}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the generated data, about 1.2 GB")
    parser.add_argument("--keep", action="store_true", help="do not remove the data afterwards; found again next time")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.out)
        return
    warnings.filterwarnings("ignore", message=".*tiles show no tissue")
    if not arguments.out.exists():
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, "--make", "--out", str(arguments.out)], check=True)
        print(f"generated in {time.perf_counter() - start:.0f} s")
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{size / 1e9:.2f} GB on disk")
    run(arguments.out)
    if not arguments.keep:
        shutil.rmtree(arguments.out)


if __name__ == "__main__":
    main()
