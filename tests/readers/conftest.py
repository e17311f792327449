"""Small folders as Space Ranger and the Xenium analyzer write them, read with the readers of spatialdata-io."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
import zarr
from anndata import AnnData
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData, get_pyramid_levels

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


def write_visium_hd(folder: Path, sizes: tuple[int, ...] = (8, 16), seed: int = 0) -> Path:
    """Write the output of Space Ranger for a Visium HD slide, bins 128 um apart, with the full image in its place."""
    (folder / "microscope_image").mkdir(parents=True)
    image = Image.fromarray(picture(seed))
    image.save(folder / "microscope_image" / "tissue.tif")
    hires, lowres = 0.5, 0.2
    spatial = folder / "spatial"
    spatial.mkdir()
    for name, factor in (("hires", hires), ("lowres", lowres)):
        side = round(SIDE_PX * factor)
        image.resize((side, side), Image.Resampling.BOX).save(spatial / f"tissue_{name}_image.png")
    factors = {"tissue_hires_scalef": hires, "tissue_lowres_scalef": lowres, "microns_per_pixel": MPP}
    with h5py.File(folder / "feature_slice.h5", "w") as file:
        layout = json.dumps({"file_format": "1.0", "transform": np.eye(3).ravel().tolist()})
        file.attrs["metadata_json"] = json.dumps({"hd_layout_json": layout, "transform_matrices": {}})
    for um in sizes:
        place = folder / "binned_outputs" / f"square_{um:03}um"
        (place / "spatial").mkdir(parents=True)
        n = round(SIDE_PX * MPP / um)
        row, col = (axis.ravel() for axis in np.mgrid[:n, :n])
        y, x = ((axis + 0.5) * um / MPP for axis in (row, col))
        tissue = np.hypot(x - SIDE_PX / 2, y - SIDE_PX / 2) < 0.4 * SIDE_PX
        barcodes = np.array([f"s_{um:03}um_{r:05}_{c:05}-1" for r, c in zip(row, col, strict=True)])
        pd.DataFrame(
            {
                "barcode": barcodes,
                "in_tissue": tissue.astype(int),
                "array_row": row,
                "array_col": col,
                "pxl_row_in_fullres": y,
                "pxl_col_in_fullres": x,
            }
        ).to_parquet(place / "spatial" / "tissue_positions.parquet")
        bin_factors = {**factors, "bin_size_um": float(um), "spot_diameter_fullres": um / MPP}
        (place / "spatial" / "scalefactors_json.json").write_text(json.dumps(bin_factors))
        # few of the bins, so that the tests are quick
        step = 96 // um
        kept = tissue & (row % step == 1) & (col % step == 1)
        write_counts(place / "filtered_feature_bc_matrix.h5", barcodes[kept].tolist(), seed=seed)
    return folder


def write_segmentations(folder: Path, outs: Path) -> Path:
    """Write the part of Visium HD with segmented cells, beside what `write_visium_hd` wrote to `outs`."""
    cells = folder / "segmented_outputs"
    (cells / "spatial").mkdir(parents=True)
    shutil.copy(outs / "feature_slice.h5", folder)
    shutil.copytree(outs / "microscope_image", folder / "microscope_image")
    shutil.copy(outs / "binned_outputs" / "square_008um" / "spatial" / "scalefactors_json.json", cells / "spatial")
    corners = [(x, y) for y in range(200, 600, 50) for x in range(200, 600, 50)]
    write_counts(cells / "filtered_feature_cell_matrix.h5", [f"cellid_{i + 1:09}-1" for i in range(len(corners))])
    features = [
        {
            "type": "Feature",
            "properties": {"cell_id": i + 1},
            "geometry": shapely.geometry.mapping(shapely.box(x, y, x + 8, y + 8)),
        }
        for i, (x, y) in enumerate(corners)
    ]
    geojson = {"type": "FeatureCollection", "features": features}
    (cells / "cell_segmentations.geojson").write_text(json.dumps(geojson))
    return folder


XENIUM_PX = 0.85  # um per pixel of the morphology images, four times Xenium's so that they are small


def write_xenium(folder: Path, n_cells: int = 100, seed: int = 0, nuclei: Sequence[int] | None = None) -> Path:
    """Write the output of the Xenium analyzer (version 3), with an H&E image aligned to it.

    `nuclei` is the cell of every nucleus, ascending; each has one by default.
    """
    folder.mkdir()
    rng = np.random.default_rng(seed)
    side_um = SIDE_PX * MPP
    specs = {"analysis_sw_version": "xenium-3.0.0.15", "pixel_size": XENIUM_PX, "region_name": "Region_1"}
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    side = int(np.ceil(np.sqrt(n_cells)))
    at = np.array([(x, y) for y in range(side) for x in range(side)])[:n_cells]
    centres = side_um * (0.2 + 0.6 * (at + 0.5) / side) + rng.uniform(-3, 3, at.shape)
    radii = rng.uniform(5, 9, n_cells)
    names = ["".join(chr(97 + (i + 4096 >> s & 15)) for s in range(28, -1, -4)) + "-1" for i in range(n_cells)]
    pd.DataFrame(
        {
            "cell_id": names,
            "x_centroid": centres[:, 0],
            "y_centroid": centres[:, 1],
            "transcript_counts": rng.integers(20, 60, n_cells),
            "control_probe_counts": 0,
            "total_counts": rng.integers(20, 60, n_cells),
            "cell_area": np.pi * radii**2,
            "nucleus_area": np.pi * (radii / 2) ** 2,
        }
    ).to_parquet(folder / "cells.parquet")
    every = np.arange(n_cells)
    of_nucleus = every if nuclei is None else np.asarray(nuclei)
    # a cell's second nucleus is beside its first one, and smaller
    second = np.r_[False, of_nucleus[1:] == of_nucleus[:-1]]
    nucleus_centres = centres[of_nucleus] + second[:, None] * 0.6 * radii[of_nucleus, None]
    nucleus_radii = np.where(second, 0.25, 0.5) * radii[of_nucleus]
    masks = {0: ("nucleus", of_nucleus, nucleus_centres, nucleus_radii), 1: ("cell", every, centres, radii)}
    angle = np.linspace(0, 2 * np.pi, 25)
    for name, of_cell, middle, radius in masks.values():
        ring = middle[:, None] + radius[:, None, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        pd.DataFrame(
            {
                "cell_id": np.repeat(np.array(names)[of_cell], len(angle)),
                "vertex_x": ring[..., 0].ravel().astype(np.float32),
                "vertex_y": ring[..., 1].ravel().astype(np.float32),
                "label_id": np.repeat(np.arange(1, len(of_cell) + 1), len(angle)),
            }
        ).to_parquet(folder / f"{name}_boundaries.parquet")
    pd.DataFrame(
        {
            "transcript_id": np.arange(2 * n_cells),
            "cell_id": np.repeat(names, 2),
            "feature_name": [f"GENE{i % 12}" for i in range(2 * n_cells)],
            "x_location": np.repeat(centres[:, 0], 2).astype(np.float32),
            "y_location": np.repeat(centres[:, 1], 2).astype(np.float32),
            "z_location": np.float32(1),
            "qv": np.float32(30),
        }
    ).to_parquet(folder / "transcripts.parquet")
    write_counts(folder / "cell_feature_matrix.h5", names, seed=seed)
    px = round(side_um / XENIUM_PX)
    group = zarr.open_group(folder / "cells.zarr", mode="w", zarr_format=2)
    group["cell_id"] = np.column_stack([np.arange(n_cells) + 4096, np.ones(n_cells)]).astype(np.uint32)
    summary = group.create_array("cell_summary", data=np.ones((n_cells, 2)))
    summary.attrs["column_names"] = ["z_level", "nucleus_count"]
    for mask, (_, of_cell, middle, extent) in masks.items():
        labels = np.zeros((px, px), dtype=np.uint32)
        for i, ((x, y), radius) in enumerate(zip(middle / XENIUM_PX, extent / XENIUM_PX, strict=True)):
            x0, y0, x1, y1 = (round(v) for v in (x - radius, y - radius, x + radius, y + radius))
            rows, cols = np.mgrid[y0:y1, x0:x1]
            labels[y0:y1, x0:x1][np.hypot(rows + 0.5 - y, cols + 0.5 - x) < radius] = i + 1
        group[f"masks/{mask}"] = labels
        group[f"polygon_sets/{mask}/cell_index"] = of_cell.astype(np.uint32)
    shutil.make_archive(str(folder / "cells.zarr"), "zip", folder / "cells.zarr")
    (folder / "morphology_focus").mkdir()
    dapi = rng.integers(0, 4000, (px, px), dtype=np.uint16)
    tifffile.imwrite(folder / "morphology_focus" / "morphology_focus_0000.ome.tif", dapi, metadata={"axes": "YX"})
    tifffile.imwrite(folder / "slide_he_image.ome.tif", picture(seed), photometric="rgb", metadata={"axes": "YXS"})
    alignment = np.diag([MPP / XENIUM_PX, MPP / XENIUM_PX, 1.0])
    np.savetxt(folder / "slide_he_imagealignment.csv", alignment, delimiter=",")
    return folder


def write_st(folder: Path, seed: int = 0) -> Path:
    """Write a section of Spatial Transcriptomics: image, spots with grid indices and pixels, and counts."""
    folder.mkdir()
    Image.fromarray(picture(seed)).save(folder / "he.jpg", quality=95)
    y, x = (axis.ravel() for axis in np.mgrid[1:5, 1:5])
    names = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
    pixels = {"pixel_x": x * 200 / MPP - 0.5, "pixel_y": y * 200 / MPP + 0.5}
    # as her2st has them: no column of ids, not all spots counted, and some counts of spots off the image
    pd.DataFrame({"x": x, "y": y, **pixels})[1:].to_csv(folder / "spots.tsv", sep="\t", index=False)
    names = [*names[:-1], "30x30"]
    counts = np.random.default_rng(seed).poisson(3, (len(names), 12))
    pd.DataFrame(counts, names, [f"GENE{i}" for i in range(12)]).to_csv(folder / "counts.tsv", sep="\t")
    return folder


def write_hest(folder: Path, name: str = "INT1", seed: int = 0) -> Path:
    """Write a sample of HEST-1k with its image."""
    for kind in ("st", "wsis", "metadata"):
        (folder / kind).mkdir(parents=True)
    rows, cols = np.array([(row, col) for row in range(8) for col in range(16) if (row + col) % 2 == 0]).T
    adata = AnnData(sparse.csr_matrix(np.random.default_rng(seed).poisson(3, (len(rows), 12)).astype(np.float32)))
    adata.obs = pd.DataFrame({"array_row": rows, "array_col": cols, "in_tissue": True}, index=adata.obs_names)
    adata.obsm["spatial"] = np.column_stack([100 + cols * 50 / MPP, 100 + rows * 50 * np.sqrt(3) / MPP])
    adata.write_h5ad(folder / "st" / f"{name}.h5ad")
    tifffile.imwrite(folder / "wsis" / f"{name}.tif", picture(seed), photometric="rgb", tile=(256, 256))
    metadata = {
        "id": name, "patient": "Patient 1", "dataset_title": "none", "species": "Homo sapiens",
        "st_technology": "Visium", "pixel_size_um_estimated": MPP, "pixel_size_um_embedded": None,
        "inter_spot_dist": 100.0, "spot_diameter": 55.0,
        "magnification": "10x", "fullres_px_width": SIDE_PX, "fullres_px_height": SIDE_PX,
    }  # fmt: skip
    (folder / "metadata" / f"{name}.json").write_text(json.dumps(metadata))
    return folder


def write_slide(folder: Path) -> Path:
    """Write a slide without spots as Aperio does, and an adapter that was fitted on another patient."""
    import pekasc as pk

    folder.mkdir()
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=24)
    pixels = np.moveaxis(np.asarray(get_pyramid_levels(sdata["P2S1_he"], n=0)), 0, -1)
    with tifffile.TiffWriter(folder / "slide.svs") as tiff:
        height, width = pixels.shape[:2]
        about = f"Aperio Image Library v12\r\n{width}x{height} (256x256) JPEG/RGB Q=90|AppMag = 10|MPP = 1.0"
        for level, tile in ((pixels, (256, 256)), (pixels[::8, ::8], None), (pixels[::2, ::2], (256, 256))):
            tiff.write(level, photometric="rgb", tile=tile, compression="jpeg", metadata=None, description=about)
    readout = pk.Readout.preset("ridge").replace(n_depths=None, depth=2)
    how: dict[str, Any] = {"method": None, "readout": readout, "compute": {"device": "cpu"}}
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    pk.tl.fit_adapter(sdata, train=["P1S1_spots"], progress=False, **how).save(folder / "adapter")
    return folder


def write_plain(folder: Path) -> Path:
    """Write a SpatialData of which nothing is known: no shared coordinate system, no pixel size, no annotation."""
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

    rng = np.random.default_rng(0)
    image = Image2DModel.parse(picture(), dims=("y", "x", "c"), transformations={"scan": Identity()})
    centres = rng.uniform(150, SIDE_PX - 150, (40, 2))
    spots = ShapesModel.parse(centres, geometry=0, radius=30, index=np.arange(100, 140))
    table = AnnData(rng.poisson(3, (40, 12)).astype(np.float32))
    sdata = SpatialData(images={"he": image}, shapes={"spots": spots}, tables={"table": TableModel.parse(table)})
    folder.mkdir()
    sdata.write(folder / "my.zarr")
    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a SpatialData that no reader made."""
    return write_plain(tmp_path_factory.mktemp("plain") / "data")


@pytest.fixture(scope="session")
def slide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a slide without spots and an adapter."""
    return write_slide(tmp_path_factory.mktemp("slide") / "data")


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


@pytest.fixture(scope="session")
def visium_hd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Visium HD slide."""
    return write_visium_hd(tmp_path_factory.mktemp("visium_hd") / "outs")


@pytest.fixture
def read_visium_hd(visium_hd_folder: Path) -> Callable[..., SpatialData]:
    """Return a function that reads the Visium HD slide."""
    import spatialdata_io

    def read(**kwargs: Any) -> SpatialData:
        return spatialdata_io.visium_hd(visium_hd_folder, **{"load_segmentations_only": False, **kwargs})

    return read


@pytest.fixture
def segmentations_folder(visium_hd_folder: Path, tmp_path: Path) -> Path:
    """Return the folder of a Visium HD slide with segmented cells and without bins."""
    return write_segmentations(tmp_path / "segmented", visium_hd_folder)


@pytest.fixture(scope="session")
def xenium_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Xenium slide."""
    return write_xenium(tmp_path_factory.mktemp("xenium") / "outs")


@pytest.fixture(scope="session")
def uneven_nuclei_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Xenium slide on which cells 7 and 60 have no nucleus, and cell 30 has two."""
    nuclei = [*({*range(100)} - {7, 60}), 30]
    return write_xenium(tmp_path_factory.mktemp("xenium_nuclei") / "outs", nuclei=sorted(nuclei))


@pytest.fixture(scope="session")
def _xenium(xenium_folder: Path) -> Callable[..., SpatialData]:
    import spatialdata_io

    return functools.cache(functools.partial(spatialdata_io.xenium, xenium_folder))


@pytest.fixture
def read_xenium(_xenium: Callable[..., SpatialData]) -> Callable[..., SpatialData]:
    """Return a function that reads the Xenium slide, once for all tests: table and shapes are copies."""

    def read(**kwargs: Any) -> SpatialData:
        sdata = _xenium(**kwargs)
        return SpatialData(
            images=dict(sdata.images),
            labels=dict(sdata.labels),
            points=dict(sdata.points),
            shapes={name: shapes.copy() for name, shapes in sdata.shapes.items()},
            tables={name: table.copy() for name, table in sdata.tables.items()},
            attrs=dict(sdata.attrs),
        )

    return read


@pytest.fixture(scope="session")
def st_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a section of Spatial Transcriptomics."""
    return write_st(tmp_path_factory.mktemp("st") / "section")


@pytest.fixture(scope="session")
def hest_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of HEST-1k with one sample, INT1."""
    return write_hest(tmp_path_factory.mktemp("hest") / "hest_data")
