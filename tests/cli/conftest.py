"""Small slides, sections and an adapter on disk, and the command run on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from spatialdata import SpatialData
from typer.testing import CliRunner

import pekasc as pk
from pekasc.cli import app


@pytest.fixture(scope="session")
def phantom() -> SpatialData:
    """Return sections of three patients, not tiled; tests must not change it."""
    return pk.datasets.phantom(n_patients=3, size_um=600, mpp=2.0, n_genes=12)


@pytest.fixture(scope="session")
def sections(phantom: SpatialData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a zarr folder for each patient: ``P1S1.zarr``, ``P2S1.zarr``, ``P3S1.zarr``."""
    folder = tmp_path_factory.mktemp("sections")
    for name in ("P1S1", "P2S1", "P3S1"):
        phantom.filter_by_coordinate_system(name).write(folder / f"{name}.zarr")
    return folder


@pytest.fixture(scope="session")
def adapter(phantom: SpatialData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter trained on P1S1 and P2S1: the frozen encoder."""
    sdata = phantom.subset(list(phantom.images) + list(phantom.shapes) + ["table"])
    sdata.tables["table"] = phantom["table"].copy()
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    readout = pk.Readout.preset("ridge").replace(n_depths=None, depth=2, n_components=5)
    made = pk.tl.fit_adapter(
        sdata, method=None, train=["P1S1_spots", "P2S1_spots"], readout=readout,
        compute={"device": "cpu"}, progress=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("adapters") / "frozen"
    made.save(folder)
    return folder


@pytest.fixture(scope="session")
def slide(phantom: SpatialData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a TIFF of 300 x 300 px, which says that its pixels are 2 um."""
    image = phantom["P3S1_he"]["scale0"]["image"]
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    tifffile.imwrite(
        path, np.moveaxis(np.asarray(image), 0, -1), tile=(128, 128), photometric="rgb", resolution=(5000, 5000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


@pytest.fixture
def slides(slide: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """Return a function that copies the slide under other names in `tmp_path`."""
    return lambda *names: [_copy(slide, tmp_path / name) for name in names]


def _copy(file: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
    return to


class Run:
    """A finished run of the command: its exit code, what it wrote, and its results with ``--json``."""

    def __init__(self, *arguments: str | Path) -> None:
        self.arguments = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, self.arguments)
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


@pytest.fixture(scope="session")
def predicted(adapter: Path, slide: Path, sections: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Return the run that predicts two slides of one name, half a slide and a section with spots, and its folder."""
    folder = tmp_path_factory.mktemp("predicted")
    first, second, half = (_copy(slide, folder / name) for name in ("A/x.tif", "B/x.tif", "half.1.svs"))
    half.write_bytes(half.read_bytes()[:100_000])
    sources = [first, half, second, sections / "P3S1.zarr"]
    where = ["--adapter", adapter, "--out", folder / "out"]
    return Run("predict", *sources, *where, "--compute", "device=cpu", "--json"), folder / "out"
