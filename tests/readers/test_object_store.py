"""Objects whose images are on an object store: a server on this machine stands for it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.transformations import Scale, set_transformation

import pekasc as pk

URL = "s3://lab/sections.zarr"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return options of fsspec for a server with the sections of two synthetic patients."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    own = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    own.start()
    host, port = own.get_host_and_port()
    found = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    fs = fsspec.filesystem("s3", **found)
    fs.mkdir("lab")
    folder = tmp_path_factory.mktemp("sections") / "sections.zarr"
    sections().write(folder)
    fs.put(str(folder), "lab/sections.zarr", recursive=True)
    yield found
    own.stop()


def sections() -> SpatialData:
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=2.0, n_genes=12, n_spots=24)
    # "global" not in pixels: where an image lies is known from its transformation only
    for element in (sdata["P2S1_he"], sdata["P2S1_spots"]):
        set_transformation(element, {"global": Scale([0.5, 0.5], axes=("x", "y"))}, set_all=True)
    return sdata


def remote(options: dict[str, Any], folder: Path) -> SpatialData:
    """Return the sections with their images on the store, by the code of the page on large objects."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "large.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    code, tiles = code.rsplit("\n", 2)[:2]
    assert f'url, options = "{URL}", {{"anon": True}}' in code and tiles.startswith("pk.pp.tile(")
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code.replace('{"anon": True}', repr(options)), names)
    sdata = names["sdata"]
    assert isinstance(sdata, SpatialData)
    return sdata


def test_tiles_and_predictions_are_those_of_local_images(options: dict[str, Any], tmp_path: Path) -> None:
    there, here = remote(options, tmp_path), sections()
    for sdata in (there, here):
        pk.pp.tile(sdata, tile_px=28, mpp=2.0, image_mpp=2.0)
    np.testing.assert_array_equal(pk.get.tiles(there).compute(), pk.get.tiles(here).compute())
    readout = pk.Readout.preset("ridge").replace(n_depths=None, depth=2, n_components=4)
    how: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
    adapter = pk.tl.fit_adapter(there, method=None, readout=readout, **how)
    for sdata in (there, here):
        pk.tl.predict_expression(sdata, adapter, **how)
    np.testing.assert_array_equal(there["table"].layers["peka"], here["table"].layers["peka"])
    assert here["table"].obs["peka_train"].all()  # the tissue is known again


def test_results_go_to_folders(options: dict[str, Any], tmp_path: Path) -> None:
    sdata = remote(options, tmp_path)
    pk.pp.tile(sdata, tile_px=28, mpp=2.0, image_mpp=2.0)
    before = set(sdata["table"].obsm)
    with pytest.raises(
        ValueError, match="`store='s3://lab/x'` is an address: a folder .* locks .* copy it when it is done"
    ):
        pk.tl.embed_tiles(sdata, "tiny", store="s3://lab/x")
    with pytest.raises(ValueError, match="`cache='s3://lab/x'` is an address"):
        pk.Compute(cache="s3://lab/x")
    assert set(sdata["table"].obsm) == before


def test_an_object_that_spatialdata_reads_there(options: dict[str, Any]) -> None:
    group = zarr.open_group(URL, mode="r", storage_options=options)
    try:
        sdata = sd.read_zarr(group)
    except (TypeError, AttributeError, OSError) as error:
        pytest.skip(f"spatialdata reads nothing from an object store yet: {error}")
    pk.pp.tile(sdata, tile_px=28, mpp=2.0)
    here = sections()
    pk.pp.tile(here, tile_px=28, mpp=2.0)
    np.testing.assert_array_equal(pk.get.tiles(sdata).compute(), pk.get.tiles(here).compute())
