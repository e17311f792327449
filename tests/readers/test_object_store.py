"""Objects whose images are on an object store: a server on this machine stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import fsspec
import numpy as np
import pytest
import spatialdata as sd
import zarr
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

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
    return pk.datasets.phantom(n_patients=2, size_um=700, mpp=2.0, n_genes=12, n_spots=24)


def remote(options: dict[str, Any], local: Path) -> SpatialData:
    """Return the sections with their images on the store, as the page on large objects does."""
    fs, root = fsspec.url_to_fs(URL, **options)
    for path in fs.find(root):
        if "/images/" not in path:
            fs.get(path, str(local) + path.removeprefix(root))
    sdata = sd.read_zarr(local, selection=("shapes", "tables"))
    for name, image in sections().images.items():
        levels = zarr.open_group(f"{URL}/images/{name}", mode="r", storage_options=options)
        sdata[name] = sd.models.Image2DModel.parse(
            da.from_zarr(levels["s0"]), dims=("c", "y", "x"), c_coords=["r", "g", "b"],
            transformations=get_transformation(image, get_all=True),
        )  # fmt: skip
    return sdata


def test_tiles_and_predictions_are_those_of_local_images(options: dict[str, Any], tmp_path: Path) -> None:
    there, here = remote(options, tmp_path / "local.zarr"), sections()
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
    sdata = remote(options, tmp_path / "local.zarr")
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
