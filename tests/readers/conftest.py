"""Small folders as Space Ranger writes them, read with the readers of spatialdata-io."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData

pytest.importorskip("spatialdata_io", reason="needs spatialdata-io: pip install 'pekasc[io]'")

SIDE_PX, MPP = 800, 1.25


def picture(seed: int = 0) -> np.ndarray:
    """Return an H&E-like image, (y, x, 3) uint8: stained tissue with texture on white."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (20, 20))
    fine = np.kron(coarse, np.ones((SIDE_PX // 20, SIDE_PX // 20)))[..., None]
    tissue = np.array([150, 70, 150]) + fine * np.array([80, 110, 60]) + rng.normal(0, 6, (SIDE_PX, SIDE_PX, 3))
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX] - SIDE_PX / 2
    image = np.where((np.hypot(x, y) < 0.49 * SIDE_PX)[..., None], tissue, 245)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_counts(path: Path, barcodes: list[str], n_genes: int = 12, seed: int = 0) -> None:
    """Write a feature-barcode matrix as Cell Ranger 3 and later do."""
    counts = sparse.csc_matrix(np.random.default_rng(seed).poisson(3, (n_genes, len(barcodes))).astype(np.int32))
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([b"lib"])
        file.attrs["chemistry_description"] = "Visium V1"
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(counts, name)
        matrix["shape"] = np.array(counts.shape, dtype=np.int64)
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{i:05d}" for i in range(n_genes)], dtype="S")
        features["name"] = np.array([f"GENE{i}" for i in range(n_genes)], dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * n_genes, dtype="S")
        features["genome"] = np.array(["GRCh38"] * n_genes, dtype="S")


def write_space_ranger(folder: Path, seed: int = 0) -> Path:
    """Write the output of Space Ranger for a Visium slide, with the full image beside it."""
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    image = Image.fromarray(picture(seed))
    image.save(folder / "full.tif")
    hires, lowres = 0.5, 0.2
    for name, factor in (("hires", hires), ("lowres", lowres)):
        side = round(SIDE_PX * factor)
        image.resize((side, side), Image.Resampling.BOX).save(spatial / f"tissue_{name}_image.png")
    spots = [(row, col) for row in range(8) for col in range(16) if (row + col) % 2 == 0]
    y = np.array([100 + row * 100 * np.sin(np.pi / 3) / MPP for row, _ in spots])
    x = np.array([100 + col * 50 / MPP for _, col in spots])
    barcodes = [f"BARCODE{i:04d}-1" for i in range(len(spots))]
    pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": (np.hypot(x - SIDE_PX / 2, y - SIDE_PX / 2) < 0.42 * SIDE_PX).astype(int),
            "array_row": [row for row, _ in spots],
            "array_col": [col for _, col in spots],
            "pxl_row_in_fullres": y.round().astype(int),
            "pxl_col_in_fullres": x.round().astype(int),
        }
    ).to_csv(spatial / "tissue_positions.csv", index=False)
    factors = {"tissue_hires_scalef": hires, "tissue_lowres_scalef": lowres, "spot_diameter_fullres": 65 / MPP}
    (spatial / "scalefactors_json.json").write_text(json.dumps({**factors, "fiducial_diameter_fullres": 105 / MPP}))
    write_counts(folder / "filtered_feature_bc_matrix.h5", barcodes, seed=seed)
    return folder


@pytest.fixture(scope="session")
def space_ranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Visium slide."""
    return write_space_ranger(tmp_path_factory.mktemp("visium") / "sample")


@pytest.fixture
def read_visium(space_ranger: Path) -> Callable[..., SpatialData]:
    """Return a function that reads the Visium slide."""
    import spatialdata_io

    def read(name: str = "sample", **kwargs: Any) -> SpatialData:
        kwargs = {"fullres_image_file": "full.tif", **kwargs}
        return spatialdata_io.visium(space_ranger, dataset_id=name, **kwargs)

    return read
