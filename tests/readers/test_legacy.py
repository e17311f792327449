"""An AnnData of scanpy or squidpy with images in ``uns``: the error shows the lines that convert it, and they work."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import squidpy as sq
from anndata import AnnData

import pekasc as pk

Reader = Callable[[str], AnnData]


@pytest.fixture
def read_legacy(space_ranger: Path) -> Reader:
    """Return a function that reads the Visium slide with squidpy, with images as scanpy has them: floats of 0 to 1."""

    def read(library: str) -> AnnData:
        adata = sq.read.visium(space_ranger, library_id=library)
        images = adata.uns["spatial"][library]["images"]
        for name, image in images.items():
            images[name] = (image / 255).astype(np.float32)
        return adata

    return read


def _run(error: BaseException, **names: object) -> dict:
    """Run the lines of a message, as a user would."""
    exec(textwrap.dedent(str(error).split(":\n", 1)[1]), names)
    return names


def test_one_library(read_legacy: Reader, caplog: pytest.LogCaptureFixture) -> None:
    adata = read_legacy("lib")
    with pytest.raises(TypeError, match="spatialdata_io.experimental import from_legacy_anndata") as error:
        pk.pp.tile(adata)
    for call in (pk.tl.fit_adapter, pk.tl.cross_validate, pk.get.tiles, pk.pl.tiles):
        with pytest.raises(TypeError, match="spatialdata_io.experimental import from_legacy_anndata"):
            call(adata)
    with pytest.raises(TypeError, match="spatialdata_io.experimental import from_legacy_anndata"):
        pk.tl.embed_tiles(adata, "tiny")
    sdata = _run(error.value, adata=adata)["sdata"]
    with caplog.at_level(logging.DEBUG, logger="pekasc"):
        pk.pp.tile(sdata)
    assert caplog.text.count("values between 0 and 1") == 1
    section = sdata["table"].uns["pekasc"]["tiles"]["sections"]["locations"]
    assert section["image"] == "lib_hires"
    assert section["mpp"] == pytest.approx(2.5, rel=2e-3)
    assert pk.get.tiles(sdata)[0].compute().max() > 200


@pytest.mark.parametrize("column", ["library_id", "sample"])
def test_several_libraries(read_legacy: Reader, column: str) -> None:
    parts = {name: read_legacy(name) for name in ("a", "b")}
    adata = ad.concat(parts, label=column, uns_merge="unique", index_unique="-")
    adata.obs["batch"] = "one"
    with pytest.raises(TypeError, match=f"(?s)2 libraries.*adata.obs\\['{column}'\\]") as error:
        pk.pp.tile(adata)
    sdata = _run(error.value, adata=adata)["sdata"]
    pk.pp.tile(sdata)
    sections = sdata["table"].uns["pekasc"]["tiles"]["sections"]
    assert {name: section["image"] for name, section in sections.items()} == {
        "locations-a": "a_hires-a",
        "locations-b": "b_hires-b",
    }


def test_several_libraries_without_a_column_of_theirs_ask_for_it(read_legacy: Reader) -> None:
    adata = ad.concat(
        {name: read_legacy(name) for name in ("a", "b")}, label="batch", uns_merge="unique", index_unique="-"
    )
    adata.obs["batch"] = adata.obs["batch"].map({"a": 0, "b": 1})
    with pytest.raises(TypeError, match="`library_key`: the column") as error:
        pk.pp.tile(adata)
    adata.obs["library"] = adata.obs["batch"].map({0: "a", 1: "b"})
    pk.pp.tile(_run(error.value, adata=adata, library_key="library")["sdata"])


@pytest.mark.parametrize("spatial", [None, {}, {"lib": {}}])
def test_without_images_nothing_is_promised(spatial: object) -> None:
    adata = AnnData(np.ones((3, 2), dtype=np.float32), uns={} if spatial is None else {"spatial": spatial})
    with pytest.raises(TypeError, match=r'none in `adata.uns\["spatial"\]`') as error:
        pk.pp.tile(adata)
    assert "from_legacy_anndata" not in str(error.value)
