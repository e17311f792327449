"""The pages of docs/data work as they are written, and as many calls fail on the way as they say."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import squidpy as sq
from matplotlib import pyplot as plt

import pekasc as pk

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data"
FOLDERS = {
    "visium": "space_ranger",
    "visium_hd": "visium_hd_folder",
    "xenium": "uneven_nuclei_folder",
    "st": "st_folder",
    "anndata": "space_ranger",
    "slides": "slide_folder",
    "other": "plain_folder",
}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def _blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def stand(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    space_ranger: Path,
    hest_folder: Path,
) -> Callable[[str], None]:
    """Return a function that changes to a folder with what a page reads, under the names that it uses."""

    def change(page: str) -> None:
        source = request.getfixturevalue(FOLDERS[page])
        named = {"outs": source, "hest_data": hest_folder}
        if page in ("st", "slides", "other"):
            named |= {path.name: path for path in source.iterdir()}
        if page == "visium":  # several slides, each in a folder of its own
            named |= {f"{name}/outs": source for name in ("s1", "s2")}
        for name, path in named.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(path)
        monkeypatch.chdir(tmp_path)

    return change


@pytest.mark.parametrize("page", FOLDERS)
def test_the_code_of_a_page_runs(page: str, stand: Callable[[str], None]) -> None:
    stand(page)
    names: dict[str, Any] = {}
    for block in _blocks(page):
        exec(block, names)
    assert any(name.endswith("_tiles") for name in names["sdata"].shapes)


def test_nuclei_are_those_of_their_cells(stand: Callable[[str], None]) -> None:
    stand("xenium")
    names: dict[str, Any] = {}
    blocks = _blocks("xenium")
    for block in (blocks[0], blocks[2]):
        exec(block, names)
    sdata = names["sdata"]
    tiles, cells = sdata["nuclei_tiles"], sdata["cell_boundaries"]
    assert len(tiles) == 98 == sdata["table"].n_obs < len(cells)
    # the larger of two is in the middle of its cell, as the only one is
    assert tiles.centroid.distance(cells.loc[tiles.index].centroid).max() < 0.1


def test_errors_are_those_of_the_page(stand: Callable[[str], None]) -> None:
    stand("other")
    names: dict[str, Any] = {}
    said = re.findall(r"^```text\n(.*?)\n```", (DOCS / "other.md").read_text(encoding="utf-8"), re.M | re.S)
    start, *mended = _blocks("other")
    exec(start, names)
    assert len(said) == 3
    for message, block in zip(said, mended, strict=False):
        with pytest.raises(ValueError, match=re.escape(message)):
            pk.pp.tile(names["sdata"])
        exec(block, names)


def test_every_page_is_tested() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == {"index", *FOLDERS}


def _failures(call: str, names: dict[str, Any]) -> tuple[int, str]:
    """Type a call, then what its error says, until it works; return how many calls failed, and the one that worked."""
    for failed in range(4):
        try:
            exec(call, names)
        except (KeyError, ValueError, TypeError) as error:
            message = str(error.args[0])
        else:
            return failed, call
        lines = re.search(r":\n((?:    .*\n?)+)", message)
        whole = re.search(r"`(pekasc\.pp\.tile\(sdata, [^`]*\))`", message)
        argument = re.search(r'(?:add|or) `(array="\w+")`', message)
        if lines:
            exec(textwrap.dedent(lines[1]), names)
            call = "pk.pp.tile(sdata)"
        elif whole:
            call = whole[1].replace("pekasc", "pk")
        else:
            assert argument is not None, message
            call = f"pk.pp.tile(sdata, {argument[1]})"
    raise AssertionError(message)


@pytest.mark.parametrize(
    "data",
    ["Visium", "Visium HD", "Xenium", "HEST-1k", "Spatial Transcriptomics", "AnnData of scanpy or squidpy",
     "Slides without spots"],
)  # fmt: skip
def test_as_many_calls_fail_as_the_table_says(
    data: str, request: pytest.FixtureRequest, stand: Callable[[str], None], hest_folder: Path
) -> None:
    first, names = "pk.pp.tile(sdata)", {"pk": pk, "pekasc": pk}
    if data == "HEST-1k":
        names["sdata"] = pk.io.read_hest(hest_folder, "INT1")
    elif data == "Spatial Transcriptomics":
        stand("st")
        exec(_blocks("st")[0].rsplit("\n", 2)[0], names)  # all but the tiles
    elif data == "Slides without spots":
        names["sdata"] = pk.io.read_slide(request.getfixturevalue("slide_folder") / "slide.svs")
        first = 'pk.pp.tile_grid(sdata, "slide")'
    elif data.startswith("AnnData"):
        names["adata"] = sq.read.visium(request.getfixturevalue("space_ranger"))
        first = "pk.pp.tile(adata)"
    else:
        names["sdata"] = request.getfixturevalue(f"read_{data.lower().replace(' ', '_')}")()
    failed, call = _failures(first, names)
    row = re.search(rf"^\| \[{data}\].*$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M)
    assert row is not None
    *_, shown, count = (cell.strip() for cell in row[0].strip("| ").split(" | "))
    assert (call.replace("'", '"'), failed) == (shown.strip("`"), int(count))
