"""Folders laid out like HEST-1k, made of phantoms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import spatialdata
import tifffile
from anndata import AnnData
from scipy.sparse import csr_matrix

import pekasc as pk

MPP = 1.0
SIDE_PX = 112


def write_tiff(file: Path, pixels: np.ndarray, *, jpeg: bool = False, n_levels: int = 3, **kwargs: Any) -> None:
    """Write a tiled pyramid as libvips does: pages of reduced size, one after the other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(file, bigtiff=True) as tiff:
        for level in range(n_levels):
            options: dict[str, Any] = {"tile": (256, 256), "compression": "jpeg" if jpeg else "zlib"} | kwargs
            h, w = (s // 2**level for s in pixels.shape[:2])
            small = pixels[: h * 2**level, : w * 2**level].reshape(h, 2**level, w, 2**level, -1).mean(axis=(1, 3))
            tiff.write(
                np.rint(small).astype(np.uint8), photometric="rgb", subfiletype=int(level > 0), metadata=None, **options
            )


def write_patches(
    file: Path,
    pixels: np.ndarray,
    corners: np.ndarray | None,
    barcodes: np.ndarray,
    *,
    name: str = "barcode",
    attrs: bool = True,
) -> None:
    """Write patches as HEST-1k has them: a chunk and a row each."""
    with h5py.File(file, "w") as h5:
        img = h5.create_dataset("img", data=pixels, chunks=(1, *pixels.shape[1:]))
        if attrs:
            img.attrs.update(
                {"patch_size_src": SIDE_PX, "patch_size_target": pixels.shape[1], "pixel_size": MPP, "downsample": 1.0}
            )
        if corners is not None:
            h5["coords"] = corners
        h5[name] = barcodes.astype("S")[:, None]


@dataclass
class Folder:
    """What was written: the folder, and the truth of each sample."""

    path: Path
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    centres: dict[str, np.ndarray] = field(default_factory=dict)
    barcodes: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, pd.DataFrame] = field(default_factory=dict)
    patches: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def file(self, kind: str, name: str) -> Path:
        ending = {"st": "h5ad", "wsis": "tif", "patches": "h5", "metadata": "json"}[kind]
        return self.path / kind / f"{name}.{ending}"

    def edit_metadata(self, name: str, **changes: Any) -> None:
        file = self.file("metadata", name)
        found = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def _sections() -> dict[str, dict[str, Any]]:
    sdata = pk.datasets.phantom(n_patients=2, size_um=800, mpp=MPP, n_genes=20, lazy=False)
    table = sdata["table"]
    found = {}
    for section, name in (("P1S1", "INT1"), ("P2S1", "INT2")):
        rows = np.flatnonzero(table.obs["section"] == section)
        level = spatialdata.get_pyramid_levels(sdata.images[f"{section}_he"], n=0)
        found[name] = {
            "pixels": np.moveaxis(np.asarray(level), 0, -1),
            # whole pixels: a patch is then exactly what a tile shows
            "centres": np.round(table.obsm["spatial"][rows]),
            "obs": table.obs.iloc[rows][["array_row", "array_col"]],
            "counts": table.X[rows].toarray(),
            "genes": [f"gene{i:03d}" for i in range(table.n_vars)],
        }
    return found


@pytest.fixture(scope="session")
def _phantoms() -> dict[str, dict[str, Any]]:
    return _sections()


def _write_sample(folder: Folder, name: str, parts: dict[str, Any], *, image: bool, patches: bool, jpeg: bool) -> None:
    for kind in ("st", "wsis", "patches", "metadata"):
        (folder.path / kind).mkdir(parents=True, exist_ok=True)
    pixels, centres = parts["pixels"], parts["centres"]
    n = len(centres)
    rng = np.random.default_rng(int(name[-1]))
    letters = np.array(list("ACGT"))
    barcodes = np.array(["".join(letters[rng.integers(0, 4, 16)]) + "-1" for _ in range(n)], dtype=object)
    obs = parts["obs"].copy()
    obs.index = pd.Index(barcodes)
    obs["in_tissue"] = True
    obs["total_counts"] = parts["counts"].sum(axis=1)
    adata = AnnData(csr_matrix(parts["counts"]), obs=obs, var=pd.DataFrame(index=parts["genes"]))
    adata.obsm["spatial"] = centres
    adata.uns["spatial"] = {"ST": {"images": {"downscaled_fullres": pixels[::8, ::8]}, "scalefactors": {"a": 1.0}}}
    adata.write_h5ad(folder.file("st", name))
    height, width = pixels.shape[:2]
    metadata = {
        "id": name, "patient": f"Patient {name[-1]}", "dataset_title": "Phantoms", "species": "Homo sapiens",
        "st_technology": "Visium", "pixel_size_um_estimated": MPP, "pixel_size_um_embedded": None,
        "inter_spot_dist": 100.0, "spot_diameter": 55.0, "magnification": "10x",
        "fullres_px_width": width, "fullres_px_height": height,
    }  # fmt: skip
    folder.file("metadata", name).write_text(json.dumps(metadata))
    folder.pixels[name], folder.centres[name], folder.barcodes[name] = pixels, centres, barcodes
    folder.counts[name] = pd.DataFrame(parts["counts"], index=barcodes, columns=parts["genes"])
    if image:
        write_tiff(folder.file("wsis", name), pixels, jpeg=jpeg)
    order = rng.permutation(n)  # patches are in an order of their own
    corners = (centres - SIDE_PX // 2).astype(int)[order]
    # outside of the slide is white, as in a tile
    padded = np.pad(pixels, ((SIDE_PX, SIDE_PX), (SIDE_PX, SIDE_PX), (0, 0)), constant_values=255)
    cut = np.stack([padded[y + SIDE_PX : y + 2 * SIDE_PX, x + SIDE_PX : x + 2 * SIDE_PX] for x, y in corners])
    folder.patches[name] = dict(zip(barcodes[order], cut, strict=True))
    if patches:
        write_patches(folder.file("patches", name), cut, corners, barcodes[order])


@pytest.fixture
def hest(tmp_path: Path, _phantoms: dict[str, dict[str, Any]]) -> Callable[..., Folder]:
    """Return a function that writes a folder with one sample (INT1) or two (INT1, INT2)."""

    def make(n: int = 1, *, image: bool = True, patches: bool = True, jpeg: bool = False, **changes: Any) -> Folder:
        folder = Folder(tmp_path / "hest")
        if folder.path.exists():
            shutil.rmtree(folder.path)
        for name in list(_phantoms)[:n]:
            _write_sample(folder, name, _phantoms[name] | changes, image=image, patches=patches, jpeg=jpeg)
        return folder

    return make
