from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from spatialdata import SpatialData

import pekasc as pk

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# the elements that a report is made of: no other comes from anywhere
ELEMENTS = set(
    "html head meta title style body header nav main section footer h1 h2 h3 p ul li a dl dt dd div span strong code "
    "pre table caption thead tbody tr th td figure img figcaption label input select option button noscript "
    "script".split()
)


@pytest.fixture(scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def whole(_folder: Path, adapter: Any, sdata: SpatialData) -> Path:
    """Return the report of genes and groups with markup in their names, with sections."""
    path = _folder / "whole.html"
    if not path.exists():
        pk.report(adapter, path, sdata, groups="donor", genes=list(adapter.genes[:2]))
    return path


def _check(text: str, page: Any) -> Any:
    """Return the parsed page, after checking that it is well formed and holds nothing of what it must not."""
    found = page(text)
    assert set(found.counts) <= ELEMENTS
    kinds = [attributes.get("type") for attributes in found.all("script")]
    assert kinds == ["application/json", None]
    for _, attributes in found.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in found.all("img"))
    assert all(link["href"].startswith("#") for link in found.all("a"))
    identities = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert {link["href"][1:] for link in found.all("a")} <= set(identities)
    # the only address is the name of a kind of XML
    addresses = re.findall(r"https?://[^\"]*", re.sub(r"data:image/png;base64,[\w+/=]*", "", text))
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
    return found


def test_names_are_text_wherever_they_stand(whole: Path, adapter: Any, page: Any) -> None:
    found = _check(whole.read_text(encoding="utf-8"), page)
    rows = json.loads(next(data for tag, data in found.texts if tag == "script" and data.startswith("{")))["rows"]
    assert rows[0][0] == "<img src=x onerror=alert(1)>"
    for name in (*adapter.info["groups"], *adapter.genes[:2]):
        assert name in found.text
    assert ("strong", adapter.genes[1]) in found.texts


def test_what_a_reader_needs_is_there(whole: Path, adapter: Any, page: Any) -> None:
    found = page(whole.read_text(encoding="utf-8"))
    headings = [data for tag, data in found.texts if tag == "h2"]
    assert headings == [
        "In short", "What it can and cannot be used for", "What it was trained on", "How it was tested",
        "Which genes to trust", "How far off it may be", "Tissue unlike the training", "Predictions on these sections",
        "How it was made", "Words",
    ]  # fmt: skip
    assert adapter.info["call"] in found.text
    assert found.counts["h1"] == found.counts["main"] == 1
    assert found.counts["img"] == 5  # trust, calibration, novelty, two genes


def test_without_sections(adapter: Any, tmp_path: Path, page: Any) -> None:
    pk.report(adapter, str(tmp_path / "new" / "a.html"))
    found = _check((tmp_path / "new" / "a.html").read_text(encoding="utf-8"), page)
    assert found.counts["img"] == 2 and "Predictions on these sections" not in found.text
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.html"]


def test_an_adapter_that_knows_little(adapter: Any, tmp_path: Path, page: Any) -> None:
    info = {
        name: value for name, value in adapter.info.items() if name not in {"call", "members", "profile", "sections"}
    }
    scores = adapter.gene_scores[["pearson"]] * float("nan")
    bare = replace(adapter, info=info, gene_scores=scores, held_out=None, novelty=None, calibration=None)
    pk.report(bare, tmp_path / "a.html")
    found = _check((tmp_path / "a.html").read_text(encoding="utf-8"), page)
    assert found.counts["img"] == 0
    assert "Not recorded: the adapter is of an earlier version" in found.text
    assert "For nothing yet" in found.text


def test_a_slide(adapter: Any, tmp_path: Path, page: Any) -> None:
    slide = pk.datasets.phantom(1, size_um=700, mpp=2.0, n_genes=14, random_state=5)
    pk.pp.tile_grid(slide, "P1S1_he", tile_px=56, mpp=2.0)
    del slide.tables["table"]
    pk.tl.predict_expression(slide, adapter, table_name="grid", progress=False)
    pk.report(adapter, tmp_path / "a.html", slide)
    found = _check((tmp_path / "a.html").read_text(encoding="utf-8"), page)
    assert "nothing measured to compare with" in found.text and found.counts["img"] == 2 + 1 + 3


def test_a_target_that_is_no_gene(tmp_path: Path, page: Any) -> None:
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=2.0, n_genes=12)
    table = sdata["table"]
    counts = table.X.toarray() if hasattr(table.X, "toarray") else table.X
    table.obsm["score"] = counts[:, :2].astype(float) + 0.5
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    how: dict[str, Any] = {"method": None, "readout": "ridge", "progress": False}
    adapter = pk.tl.calibrate(pk.tl.fit_adapter(sdata, target={"obsm": "score"}, train=["P1S1_spots"], **how))
    pk.tl.predict_expression(sdata, adapter, progress=False)
    pk.report(adapter, tmp_path / "a.html", sdata)
    found = _check((tmp_path / "a.html").read_text(encoding="utf-8"), page)
    assert "2 columns of 'score'" in found.text and "all training tissue is of one group" in found.text


def test_bad_input(adapter: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"`path='.*a.html'` exists, and a report replaces nothing"):
        pk.report(adapter, path)
    assert path.read_text() == "mine"
    with pytest.raises(FileExistsError, match="exists"):
        pk.report(adapter, tmp_path)
    with pytest.raises(TypeError, match="`adapter` must be a pekasc.Adapter, got str"):
        pk.report("adapter", tmp_path / "b.html")
    with pytest.raises(TypeError, match="`path=3` must be the path of a file, got int"):
        pk.report(adapter, 3)
    for name, value in {"genes": ["a"], "groups": "donor", "layer": "mine"}.items():
        with pytest.raises(ValueError, match=f"`{name}=` does nothing without `sdata=`"):
            pk.report(adapter, tmp_path / "b.html", **{name: value})
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to see what a browser makes of the page")
def test_a_browser_makes_no_element_of_a_name(whole: Path, adapter: Any, page: Any) -> None:
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
         whole.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = page(re.sub(r"data:image/png;base64,[\w+/=]*", "data:image/png;base64,", done.stdout))
    rows = [data for tag, data in found.texts if tag == "th"]
    assert "<img src=x onerror=alert(1)>" in rows and {"$x^2$", "&lt;b&gt;", *adapter.genes[7:]} <= set(
        rows
    )  # the script ran
    assert set(found.counts) <= ELEMENTS | {"svg", "line", "circle"}
    assert found.counts["svg"] == len(adapter.genes) and found.counts["script"] == 2
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.all("img"))
