"""`pekasc evaluate`: scores of what `pekasc predict` wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import spatialdata as sd

import pekasc as pk


def test_scores(run: Any, predicted: Any, tmp_path: Path) -> None:
    _, out = predicted
    sdata = sd.read_zarr(out / "P3S1.zarr")
    pk.io.attach_predictions(sdata)
    expected = pk.tl.evaluate(sdata)
    # a folder that was moved, its store with it
    shutil.copytree(out / "P3S1.zarr", tmp_path / "P3S1.zarr")
    shutil.copytree(out / "predictions" / "P3S1.zarr", tmp_path / "predictions" / "P3S1.zarr")
    csv = tmp_path / "scores" / "all.csv"
    done = run("evaluate", tmp_path / "P3S1.zarr", out / "A_x.zarr", "--out", csv, "--json")
    assert done.code == 1  # nothing was measured on the slide
    first, second = done.results
    assert first["group"] == "P3S1_spots" and first["n_genes"] == len(expected)
    for score in ("pearson", "ceiling", "reached"):
        assert first[f"{score}_median"] == pytest.approx(expected[score].median())
    assert second["status"] == "failed" and "if nothing was measured, as on a slide's grid" in second["reason"]
    written = pd.read_csv(csv)
    assert written["source"].unique().tolist() == [str(tmp_path / "P3S1.zarr")]
    pd.testing.assert_frame_equal(written.drop(columns="source"), expected, check_dtype=False, rtol=1e-6)
    shown = run("evaluate", out / "P3S1.zarr")
    assert shown.code == 0
    assert f"P3S1_spots: n_genes {len(expected)}, n_spots " in shown.stdout
