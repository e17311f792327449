"""docs/lazyslide.md and docs/qupath_napari.md work as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

import pekasc as pk

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def _stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slide_folder: Path) -> None:
    for path in slide_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def run(page: str) -> dict[str, Any]:
    """Run the code of a page, and return what it leaves."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S):
        exec(block, names)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_stand")
def test_the_page_on_qupath_and_napari(tmp_path: Path) -> None:
    pytest.importorskip("spatialdata_plot", reason="the page draws with spatialdata-plot")
    names = run("qupath_napari.md")
    sdata, genes = names["sdata"], names["genes"]
    features = json.loads((tmp_path / "slide.geojson").read_text())["features"]
    assert len(features) == sdata["grid"].n_obs
    assert set(features[0]["properties"]["measurements"]) == set(genes)
    assert list(sdata["slide_grid_peka"]["scale0"]["image"].coords["c"].values) == genes
    labels = [channel["label"] for channel in names["image"].attrs["ome"]["omero"]["channels"]]
    assert labels == genes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_stand")
def test_the_page_on_lazyslide() -> None:
    pytest.importorskip("lazyslide", reason="needs LazySlide: pip install 'pekasc[lazyslide]'")
    names = run("lazyslide.md")
    wsi, predicted, adapter = names["wsi"], names["predicted"], names["adapter"]
    assert predicted.shape == (len(wsi["tiles"]), len(adapter.genes)) and np.isfinite(predicted.X).all()
    rows = wsi["grid"].obs["tile_id"].to_numpy()  # without those out of focus
    # resampled from 1 to 2 um per pixel by either: not the same pixels
    r = np.corrcoef(predicted.X[rows].ravel(), wsi["grid"].layers["peka"].ravel())[0, 1]
    assert r > 0.99
    assert "leiden" in predicted.obs and isinstance(adapter, pk.Adapter)
