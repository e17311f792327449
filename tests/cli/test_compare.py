"""`pekasc compare`: methods on held-out groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest


def test_two_methods(run: Any, sections: Path, tmp_path: Path) -> None:
    how = ["--methods", "mean", "--methods", "frozen-best", "--genes", "svg", "--n-genes", "5"]
    how += [
        "--tile-px",
        "56",
        "--mpp",
        "2",
        "--readout",
        "ridge",
        "--readout",
        "n_components=5",
        "--compute",
        "device=cpu",
    ]
    how += ["--out", str(tmp_path / "frame.csv")]
    sources = [sections / f"{name}.zarr" for name in ("P1S1", "P2S1", "P3S1")]
    done = run("compare", *sources, *how, "--json")
    assert done.code == 0, done.stderr
    rows = {row["method"]: row for row in done.results}
    assert set(rows) == {"mean", "frozen-best"} and all(row["n_folds"] == 3 for row in rows.values())
    frame = pd.read_csv(tmp_path / "frame.csv")
    best = frame[frame["method"] == "frozen-best"]
    assert rows["frozen-best"]["pearson"] == pytest.approx(best.groupby("fold")["pearson"].mean().mean())
    assert rows["mean"]["pearson"] == 0 and rows["frozen-best"]["difference"] is None
