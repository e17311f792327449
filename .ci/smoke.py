"""The main job in a minute and without a test runner: tile, train, save, load, predict, score, draw, write.

With `--floors`, every dependency must be installed in the oldest release that pyproject.toml allows.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tifffile

matplotlib.use("Agg")
# what other packages say of their own next releases is nothing to act on here
warnings.filterwarnings("ignore", category=FutureWarning)

import scanpy as sc
import spatialdata as sd
import squidpy as sq
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

import pekasc as pk
from pekasc.cli import app

CPU: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}


def main(out: Path) -> None:
    """Run the job, with everything that it writes under `out`."""
    made = pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=24)
    made.write(out / "made.zarr")
    sdata = sd.read_zarr(out / "made.zarr")
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    assert pk.get.tiles(sdata).shape[1:] == (56, 56, 3)

    # the published schedule always trains
    recipe = pk.Recipe.preset("paper").replace(
        epochs=1, rank=16, n_clusters=4, teacher_components=10, learning_rate=3e-3
    )
    readout = {"depth": 2, "n_components": 10}
    adapter = pk.tl.fit_adapter(sdata, train=["P1S1_spots"], recipe=recipe, readout=readout, **CPU)
    assert adapter.method == "bone" and len(adapter.history), adapter
    adapter.save(out / "adapter")
    loaded = pk.Adapter.load(out / "adapter")
    pk.tl.predict_expression(sdata, adapter, key_added="first", **CPU)
    pk.tl.predict_expression(sdata, loaded, **CPU)
    table = sdata["table"]
    assert np.isfinite(table.layers["peka"]).any()
    np.testing.assert_array_equal(table.layers["peka"], table.layers["first"])
    scores = pk.tl.evaluate(sdata)
    assert np.isfinite(scores["rmse"]).all() and len(scores) == len(adapter.genes), scores
    pk.pl.expression(sdata, adapter.genes[0]).savefig(out / "expression.png")

    predicted = pk.get.expression(sdata, layer="peka")
    sc.pp.pca(predicted, n_comps=5)
    sc.pp.neighbors(predicted)
    sq.gr.spatial_neighbors_knn(predicted, library_key="section")
    sq.gr.spatial_autocorr(predicted, n_perms=None)
    assert len(predicted.uns["moranI"]) == predicted.n_vars
    sdata.write(out / "done.zarr")
    np.testing.assert_array_equal(sd.read_zarr(out / "done.zarr")["table"].layers["peka"], table.layers["peka"])

    pixels = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(out / "slide.tif", pixels, tile=(256, 256), photometric="rgb", compression="jpeg")
    slide = pk.io.read_slide(out / "slide.tif", image_mpp=0.5)
    assert np.abs(np.asarray(slide.images["slide"]).astype(int) - 200).max() < 3

    how = ["--tissue", "none", "--min-sharpness", "none", "--image-mpp", "0.5", "--compute", "device=cpu", "--json"]
    where = [str(out / "slide.tif"), "--adapter", str(out / "adapter"), "--out", str(out / "predicted")]
    command = CliRunner().invoke(app, ["predict", *where, *how])
    assert command.exit_code == 0, command.output
    written = sd.read_zarr(out / "predicted" / "slide.zarr")
    pk.io.attach_predictions(written)
    assert np.isfinite(np.asarray(written["grid"].layers["peka"])).all()


def dependencies() -> list[Requirement]:
    """Return what the installed package depends on, without its extras."""
    return [r for r in map(Requirement, requires("pekasc") or []) if r.marker is None]


def check_floors() -> None:
    """Refuse a floor that is not the version that runs here: then nobody has run it."""
    wrong = [
        f"{requirement} but {version(requirement.name)} is installed"
        for requirement in dependencies()
        if [Version(floor.version) for floor in requirement.specifier] != [Version(version(requirement.name))]
    ]
    assert not wrong, wrong


if __name__ == "__main__":
    print("Python", sys.version.split()[0], *(f"{r.name}=={version(r.name)}" for r in dependencies()))
    if "--floors" in sys.argv[1:]:
        check_floors()
    logging.getLogger("pekasc").addHandler(logging.StreamHandler())
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
    print("smoke passed")
