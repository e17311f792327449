"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute on one thread: models are small, and threads that wait for one another on a busy machine cost more."""
    import sklearn  # noqa: F401  its threads are known once it is loaded
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    with threadpool_limits(limits=1):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data for tests: named by PEKASC_SHARED, else `shared` beside the checkout."""
    named = os.environ.get("PEKASC_SHARED")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"no real data: {path} is no folder (set PEKASC_SHARED to one laid out like it)")
    return path


UM_PER_UNIT = 0.5  # of the coordinate system of `make_scene`


def _colour(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # linear in x and y around the middle: the mean over any symmetric window is the value at its centre
    return np.stack([0.8713 * x + 0.0317 * y - 65, 0.1 * x + 0.05 * y, 0.0291 * x + 0.8917 * y - 45], axis=-1)


def make_scene(
    *,
    centres: np.ndarray | None = None,
    px_to_cs: np.ndarray | None = None,
    shapes_to_cs: np.ndarray | None = None,
    size: tuple[int, int] = (400, 360),
    multi_scale: bool = True,
    polygons: bool = False,
    name: str = "A",
) -> SpatialData:
    """Return one section whose colour is a linear function of its coordinate system: spots, image and counts.

    The coordinate system `name` has 0.5 um per unit; "um" is the same in um. `px_to_cs` and `shapes_to_cs` are the
    3 x 3 maps under which image and shapes are stored; `centres` are in the coordinate system.
    """
    px_to_cs = np.eye(3) if px_to_cs is None else np.asarray(px_to_cs, dtype=float)
    shapes_to_cs = np.eye(3) if shapes_to_cs is None else np.asarray(shapes_to_cs, dtype=float)
    if centres is None:
        centres = np.random.default_rng(0).uniform((110, 90), (300, 270), (12, 2))
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    x, y = (px_to_cs[k, 0] * x + px_to_cs[k, 1] * y + px_to_cs[k, 2] for k in (0, 1))
    # rounded up or down by chance, so that means are those of the closed form
    dither = np.random.default_rng(2).random((size[1], size[0], 1))
    pixels = np.moveaxis(np.clip(np.floor(_colour(x, y) + dither), 0, 255).astype(np.uint8), -1, 0)
    to_um = np.diag([UM_PER_UNIT, UM_PER_UNIT, 1.0])

    def systems(matrix: np.ndarray) -> dict[str, Affine]:
        both = {name: matrix, "um": to_um @ matrix}
        return {key: Affine(value, ("x", "y"), ("x", "y")) for key, value in both.items()}

    image = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), scale_factors=[2, 2] if multi_scale else None, transformations=systems(px_to_cs)
    )
    ids = np.arange(len(centres)) + 10
    inverse = np.linalg.inv(shapes_to_cs)
    own = centres @ inverse[:2, :2].T + inverse[:2, 2]
    if polygons:
        corners = own[:, None] + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.5
        frame = GeoDataFrame(geometry=shapely.polygons(corners), index=ids)
    else:
        frame = GeoDataFrame({"radius": np.full(len(ids), 3.0)}, geometry=shapely.points(own), index=ids)
    table = AnnData(
        np.random.default_rng(1).poisson(2, (len(ids), 6)).astype(np.float32),
        obs=pd.DataFrame(
            {"region": pd.Categorical([f"{name}_spots"] * len(ids)), "spot_id": ids},
            index=[f"{name}_{i}" for i in ids],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(6)]),
    )
    return SpatialData(
        images={f"{name}_he": image},
        shapes={f"{name}_spots": ShapesModel.parse(frame, transformations=systems(shapes_to_cs))},
        tables={"table": TableModel.parse(table, region=f"{name}_spots", region_key="region", instance_key="spot_id")},
    )


def scene_tiles(centres: np.ndarray, tile_px: int, mpp: float) -> np.ndarray:
    """Return what the tiles of :func:`make_scene` show, (n, tile_px, tile_px, 3) float, from its closed form."""
    offset = ((np.arange(tile_px) + 0.5) - tile_px / 2) * mpp / UM_PER_UNIT
    x, y = np.meshgrid(offset, offset)
    return _colour(centres[:, 0, None, None] + x, centres[:, 1, None, None] + y)


@pytest.fixture
def scene() -> Callable[..., SpatialData]:
    """Return :func:`make_scene`."""
    return make_scene


@pytest.fixture
def scene_truth() -> Callable[[np.ndarray, int, float], np.ndarray]:
    """Return :func:`scene_tiles`."""
    return scene_tiles


def _record_totals(adata: AnnData, layer: str | None = None) -> None:
    """Record totals as a prediction does."""
    from pekasc._expression import TARGETS
    from pekasc._keys import write_uns
    from pekasc._totals import totals_to_record

    recorded = totals_to_record(adata, layer)
    assert recorded is not None
    adata.obs["peka_total"], adata.obsm["peka_total_check"] = recorded[:2]
    write_uns(adata, "peka", {"target": TARGETS["log1p"], **recorded[2]})


@pytest.fixture
def record_totals() -> Callable[..., None]:
    """Return :func:`_record_totals`."""
    return _record_totals


@pytest.fixture
def counted() -> AnnData:
    """Return counts of 12 genes in 30 spots, one without any, one without the first three, with recorded totals."""
    raw = np.random.default_rng(0).poisson(3, (30, 12)).astype(np.float32)
    raw[4] = 0
    raw[7, :3] = 0
    adata = AnnData(raw)
    _record_totals(adata)
    return adata


def write_scfoundation(
    folder: Path,
    genes: Sequence[str],
    *,
    dim: int = 16,
    depth: int = 2,
    heads: int = 4,
    bins: int = 7,
    seed: int = 0,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write a random checkpoint of scFoundation and its gene index, laid out as the official files are.

    `change` may alter what goes into ``models.ckpt`` before it is written.
    """
    import torch
    from torch import nn

    seq_len = len(genes) + 2
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        "token_emb.mlp.weight": random(bins, 1), "token_emb.mlp.bias": random(bins),
        "token_emb.mlp2.weight": random(bins, bins), "token_emb.mlp2.bias": random(bins),
        "token_emb.emb.weight": random(bins, dim) * 3, "token_emb.emb_mask.weight": random(1, dim),
        "token_emb.emb_pad.weight": random(1, dim), "pos_emb.weight": random(seq_len + 1, dim),
        "decoder_embed.weight": random(8, dim), "decoder_embed.bias": random(8), "norm.weight": random(8),
        "to_final.weight": random(1, 8), "decoder.layers.0.weight": random(8, 8),
    }  # fmt: skip
    for name, shape in nn.TransformerEncoderLayer(dim, heads, 4 * dim, device="meta").named_parameters():
        for layer in range(depth):
            state[f"encoder.transformer_encoder.{layer}.{name}"] = random(*shape.shape)
    state |= {"encoder.norm.weight": 1 + random(dim), "encoder.norm.bias": random(dim)}
    module = {"depth": depth, "heads": heads, "module_type": "transformer", "norm_first": False}
    model = {
        "encoder": {"hidden_dim": dim, **module}, "decoder": {"hidden_dim": 8, **module, "module_type": "performer"},
        "n_class": 104, "mask_token_id": 102, "pad_token_id": 103, "bin_num": bins, "bin_alpha": 1.0, "seq_len": 0,
    }  # fmt: skip
    version = {
        "config": {
            "model": "mae_autobin",
            "model_config": {"mae_autobin": model},
            "dataset_config": {"rnaseq": {"seq_len": seq_len, "data_dir": "somewhere"}},
        },
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
    }
    checkpoint: dict[str, Any] = {"cell": version, "gene": {"config": {}, "state_dict": {}}, "rde": {}}
    if change is not None:
        change(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "models.ckpt")
    index = pd.DataFrame({"gene_name": list(genes), "index": range(len(genes))})
    index.to_csv(folder / "OS_scRNA_gene_index.19264.tsv", sep="\t", index=False)
    return folder


@pytest.fixture(scope="session")
def scfoundation() -> Callable[..., Path]:
    """Return :func:`write_scfoundation`."""
    return write_scfoundation
