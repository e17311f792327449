"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine


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
