"""`pekasc tile`: sections around their spots, slides on a grid."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd

import pekasc as pk


def test_a_section_and_a_slide(
    run: Any, sections: Path, slide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    how = ["--tile-px", "28", "--mpp", "4", "--tissue", "none"]
    with caplog.at_level(logging.DEBUG, logger="pekasc"):
        done = run("tile", sections / "P1S1.zarr", slide, "--out", out, *how, "--json")
    assert done.code == 0, done.stderr
    assert [(r["status"], r["table"]) for r in done.results] == [("done", "table"), ("done", "grid")]
    assert f"{sections / 'P1S1.zarr'} is tiled around its spots, where there is no use for tissue." in caplog.messages
    for name, table in (("P1S1", "table"), ("slide", "grid")):
        sdata = sd.read_zarr(out / f"{name}.zarr")
        tiles = pk.get.tiles(sdata, table_name=table)
        assert tiles.shape[1:] == (28, 28, 3) and tiles.attrs["mpp"] == 4
        assert len(tiles) == done.results[name == "slide"]["n_tiles"] > 5
    # pixels are those of the slide
    assert np.asarray(sd.read_zarr(out / "slide.zarr")["slide"]).shape == (3, 300, 300)
    assert run("tile", slide, "--out", out, *how).stderr.endswith("slide.tif: finished before\n")
