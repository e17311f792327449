"""Small slides, sections and an adapter on disk, and the command run on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

import pekasc as pk
from pekasc.cli import app

TILES = ["--tile-px", "56", "--mpp", "2"]
CPU = ["--compute", "device=cpu"]


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    before = pk.settings.verbosity
    yield
    pk.settings.verbosity = before


@pytest.fixture(scope="session")
def sections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one zarr folder for each of two patients, ``P1S1.zarr`` and ``P2S1.zarr``, not tiled."""
    folder = tmp_path_factory.mktemp("sections")
    sdata = pk.datasets.phantom(n_patients=2, size_um=600, mpp=2.0, n_genes=12)
    for name in ("P1S1", "P2S1"):
        sdata.filter_by_coordinate_system(name).write(folder / f"{name}.zarr")
    return folder


@pytest.fixture(scope="session")
def adapter(sections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter trained on P1S1: the frozen encoder."""
    import spatialdata

    sdata = spatialdata.read_zarr(sections / "P1S1.zarr")
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    made = pk.tl.fit_adapter(
        sdata, method=None, readout={"depth": 2, "n_components": 5}, compute={"device": "cpu"}, progress=False
    )
    made.save(tmp_path_factory.mktemp("adapter") / "frozen")
    return tmp_path_factory.getbasetemp() / "adapter0" / "frozen"


@pytest.fixture(scope="session")
def slide(sections: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a TIFF of 300 x 300 px at 2 um, which says its pixel size."""
    import spatialdata

    image = spatialdata.read_zarr(sections / "P2S1.zarr")["P2S1_he"]["scale0"]["image"]
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    tifffile.imwrite(
        path, np.moveaxis(np.asarray(image), 0, -1), tile=(128, 128), photometric="rgb", resolution=(5000, 5000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


@pytest.fixture
def slides(slide: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """Return a function that copies the slide under other names in `tmp_path`."""

    def copies(*names: str) -> list[Path]:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(slide, tmp_path / name)
        return [tmp_path / name for name in names]

    return copies


class Run:
    """A finished run of the command: its exit code, what it wrote, and its results with ``--json``."""

    def __init__(self, *arguments: str | Path) -> None:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.stdout, self.stderr = result.exit_code, result.stdout, result.stderr

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


@pytest.fixture(scope="session")
def run() -> type[Run]:
    """Return a function that runs the command."""
    return Run
