"""`store=`, `client` and `max_memory` of the calls that embed: nothing is computed twice, and the bits stay."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from distributed import Client, LocalCluster
from spatialdata import SpatialData
from spatialdata.models import TableModel

import pekasc as pk
from pekasc.models.features import BatchEncoder, EmbedJob
from pekasc.tl import _section_features

CPU: dict[str, Any] = {"device": "cpu", "embed_batch_size": 8}
FIELDS: dict[str, Any] = {"fields_um": (224,)}


def embed(sdata: SpatialData, encoder: Any = "tiny", *, store: Any = None, key_added: str | None = None,
          readout: Any = None, **compute: Any) -> None:  # fmt: skip
    """Embed tiles in small batches; further arguments are fields of `Compute`."""
    pk.tl.embed_tiles(
        sdata, encoder, readout=readout, compute={**CPU, **compute}, store=store, key_added=key_added, progress=False
    )


def predict(sdata: SpatialData, adapter: pk.Adapter, *, store: Any = None, table_added: str | None = None,
            **compute: Any) -> None:  # fmt: skip
    """Predict in small batches; further arguments are fields of `Compute`."""
    pk.tl.predict_expression(
        sdata, adapter, store=store, table_added=table_added, compute={**CPU, **compute}, progress=False
    )


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_section_features, "_CHUNK", 16)


@pytest.mark.parametrize("readout", [None, {"fields_um": (224,), "orientations": 2}], ids=["plain", "fields"])
def test_the_store_gives_the_bits_of_a_run_without(
    tiled: SpatialData, tmp_path: Path, counted: list[int], readout: dict[str, Any] | None
) -> None:
    table = tiled["table"]
    embed(tiled, key_added="plain", readout=readout)
    n = sum(counted)
    embed(tiled, key_added="kept", store=tmp_path / "s.zarr", readout=readout)
    assert sum(counted) == 2 * n
    embed(tiled, key_added="again", store=str(tmp_path / "s.zarr"), readout=readout)
    assert sum(counted) == 2 * n
    for key in ("kept", "again"):
        np.testing.assert_array_equal(table.obsm[key], table.obsm["plain"])


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("locks", [True, False])
def test_a_finished_store_is_read_where_nothing_can_be_written(
    tiled: SpatialData, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, code: int, locks: bool
) -> None:
    store = tmp_path / "s.zarr"
    embed(tiled, key_added="kept", store=store)
    if not locks:  # it was copied without them
        shutil.rmtree(tmp_path / ".s.zarr.locks")
    counted.clear()
    opened, made = os.open, os.mkdir

    # tests may run as root, for whom no folder is read-only
    def refuse_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *args, **options)

    def refuse_mkdir(path: Any, *args: Any, **options: Any) -> None:
        if str(path).startswith(str(tmp_path)) and not os.path.exists(path):
            raise OSError(code, os.strerror(code), str(path))
        made(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "mkdir", refuse_mkdir)
    embed(tiled, key_added="again", store=store)
    assert not counted
    np.testing.assert_array_equal(tiled["table"].obsm["again"], tiled["table"].obsm["kept"])
    with pytest.raises(OSError, match=rf"The store '{tmp_path / 'new.zarr'}' cannot be written"):
        embed(tiled, key_added="new", store=tmp_path / "new.zarr")


def test_an_interrupted_run_goes_on(
    tiled: SpatialData, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store, table = tmp_path / "s.zarr", tiled["table"]
    embed(tiled, key_added="plain")
    whole = sum(counted)
    counted.clear()
    write = _section_features.FeatureStore.write

    def interrupted(self: Any, chunk: int, features: np.ndarray) -> None:
        if sum(counted) > 40:
            raise KeyboardInterrupt
        write(self, chunk, features)

    monkeypatch.setattr(_section_features.FeatureStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(tiled, store=store)
    assert "X_tiny" not in table.obsm
    first = sum(counted)
    monkeypatch.setattr(_section_features.FeatureStore, "write", write)
    counted.clear()
    with caplog.at_level(logging.INFO, logger="pekasc"):
        embed(tiled, store=store)
    assert 0 < sum(counted) < whole and first + sum(counted) <= whole + 2 * 16
    assert f"has the features of {whole - sum(counted)} of {whole} tiles" in caplog.text
    np.testing.assert_array_equal(table.obsm["X_tiny"], table.obsm["plain"])


def test_a_damaged_chunk_is_computed_again(tiled: SpatialData, tmp_path: Path, counted: list[int]) -> None:
    store = tmp_path / "s.zarr"
    embed(tiled, key_added="first", store=store)
    counted.clear()
    chunk = next(store.glob("*/c/1/0"))
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(bytes(content))
    embed(tiled, key_added="second", store=store)
    assert sum(counted) == 16
    np.testing.assert_array_equal(tiled["table"].obsm["second"], tiled["table"].obsm["first"])


def test_nothing_of_other_tiles_weights_or_settings_is_taken(
    tiled: SpatialData, tmp_path: Path, counted: list[int], adapter: pk.Adapter
) -> None:
    def added(encoder: Any = "tiny", **how: Any) -> int:
        counted.clear()
        embed(tiled, encoder, key_added="x", store=tmp_path / "s.zarr", **how)
        return sum(counted)

    def random(kwargs: dict[str, Any], **more: Any) -> pk.models.Encoder:
        return pk.models.Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=kwargs, **more)

    n = added()
    assert n == tiled["table"].n_obs and added() == 0
    assert added(embed_batch_size=16) == 0  # what is there is the same to rounding
    assert added(readout={"depth": 2}) == n
    assert added(precision="bf16") == n
    assert added(readout={"orientations": 2}) == n
    assert added(readout=FIELDS) == n  # the wide tiles; the others are there
    assert added(adapter) == n and added(adapter) == 0
    pk.pp.tile(tiled, tile_px=48, mpp=2.0)
    assert added(random({"depth": 2})) == n
    assert added(random({"depth": 2}, mean=(0.4, 0.4, 0.4))) == n
    assert added(random({"depth": 3})) == n
    pk.pp.tile(tiled, tile_px=48, mpp=2.1)
    assert added(random({"depth": 3})) == n


def test_a_subset_keeps_its_other_sections(tiled: SpatialData, tmp_path: Path, counted: list[int]) -> None:
    embed(tiled, store=tmp_path / "s.zarr")
    counted.clear()
    of_one = tiled["table"].obs["region"] == "P2S1_spots"
    table = tiled["table"][of_one].copy()
    table.obs["region"] = table.obs["region"].cat.remove_unused_categories()
    table.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": ["P2S1_spots"]}
    part = SpatialData(images=dict(tiled.images), shapes=dict(tiled.shapes), tables={"table": table})
    embed(part, key_added="part", store=tmp_path / "s.zarr")
    assert not counted
    np.testing.assert_array_equal(part["table"].obsm["part"], tiled["table"].obsm["X_tiny"][of_one])


def test_predictions_from_a_store(
    tiled: SpatialData, predicted: SpatialData, adapter: pk.Adapter, tmp_path: Path, counted: list[int]
) -> None:
    predict(tiled, adapter, store=tmp_path / "s.zarr")
    n = sum(counted)
    assert n == tiled["table"].n_obs
    predict(tiled, adapter, store=tmp_path / "s.zarr")
    assert sum(counted) == n
    np.testing.assert_allclose(tiled["table"].layers["peka"], predicted["table"].layers["peka"], atol=1e-5)


def test_features_beyond_the_memory_stay_lazy(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiled["table"]
    table.obs["in_tissue"] = np.arange(table.n_obs) % 7 > 0
    pk.pp.tile(tiled, tile_px=56, mpp=2.0)
    embed(tiled, key_added="plain", readout=FIELDS)
    with pytest.raises(ValueError, match=r"take 0\.\d GiB, more than `Compute.max_memory` .* Give `store=` a folder"):
        embed(tiled, key_added="lazy", readout=FIELDS, max_memory=1000)
    assert "lazy" not in table.obsm
    monkeypatch.setattr(_section_features, "_LAZY_ROWS", 30)
    embed(tiled, key_added="lazy", store=tmp_path / "s.zarr", readout=FIELDS, max_memory=1000)
    assert isinstance(table.obsm["lazy"], da.Array)
    np.testing.assert_array_equal(table.obsm["lazy"].compute(), table.obsm["plain"])
    tiled.write(tmp_path / "sdata.zarr")
    again = sd.read_zarr(tmp_path / "sdata.zarr")
    np.testing.assert_array_equal(np.asarray(again["table"].obsm["lazy"]), table.obsm["plain"])


DIGEST = """
import sys
import pekasc as pk
from pekasc.models.features import BatchEncoder, EmbedJob
adapter = pk.Adapter.load(sys.argv[1])
job = EmbedJob(adapter, adapter.encoder_digest, 56, adapter.depth, 1, 8, "cpu", "fp32")
print(job.digest(adapter.network()))
"""


def test_an_adapters_digest_is_the_same_in_every_process(adapter: pk.Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "adapter")
    job = EmbedJob(adapter, adapter.encoder_digest, 56, adapter.depth, 1, 8, "cpu", "fp32")
    # strings have other hashes there, so that sets are in another order
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DIGEST, str(tmp_path / "adapter")],
        env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert there.strip() == job.digest(adapter.network()) and len(there) == 65


def test_what_images_show_beyond_their_fingerprint_counts(
    tiled: SpatialData, tmp_path: Path, counted: list[int]
) -> None:
    def embedded(sdata: SpatialData) -> int:
        counted.clear()
        embed(sdata, key_added="x", store=tmp_path / "s.zarr")
        return sum(counted)

    n = embedded(tiled)
    assert embedded(tiled) == 0
    for level in (0, 1):
        images = {}
        for name, image in tiled.images.items():
            levels = [np.array(data) for data in sd.get_pyramid_levels(image, attr="data")]
            levels[level][:, 40 // 2**level : 300 // 2**level, 150 // 2**level : 330 // 2**level] //= 2
            tree = image.copy()
            for i, child in enumerate(tree.children.values()):
                child["image"].data = da.from_array(levels[i], chunks=levels[i].shape)
            images[name] = tree
        changed = SpatialData(images=images, shapes=dict(tiled.shapes), tables={"table": tiled["table"].copy()})
        done = embedded(changed)
        assert done in (0, n // 2, n)
        # tiles of 2 um per pixel are read from level 1
        assert (done > 0) == (level == 1) or done == n


def test_the_order_of_the_table_does_not_matter(tiled: SpatialData, tmp_path: Path, counted: list[int]) -> None:
    embed(tiled, store=tmp_path / "s.zarr")
    counted.clear()
    order = np.random.default_rng(0).permutation(tiled["table"].n_obs)
    shuffled = SpatialData(
        images=dict(tiled.images), shapes=dict(tiled.shapes), tables={"table": tiled["table"][order].copy()}
    )
    embed(shuffled, key_added="x", store=tmp_path / "s.zarr")
    assert not counted
    np.testing.assert_array_equal(shuffled["table"].obsm["x"], tiled["table"].obsm["X_tiny"][order])


def test_two_regions_of_the_same_tiles(tiled: SpatialData, tmp_path: Path, counted: list[int]) -> None:
    table = tiled["table"]
    one = table[table.obs["region"] == "P1S1_spots"].copy()
    two = one.copy()
    two.obs["region"] = pd.Categorical(["again"] * two.n_obs)
    one.obs["region"] = pd.Categorical(["P1S1_spots"] * one.n_obs)
    both = ad.concat([one, two], index_unique="-")
    both.obs["region"] = both.obs["region"].astype("category")
    del both.obs["tile_inside"]  # whose record is not here any more
    shapes = {"P1S1_spots": tiled["P1S1_spots"], "again": tiled["P1S1_spots"].copy()}
    parsed = TableModel.parse(both, region=["P1S1_spots", "again"], region_key="region", instance_key="spot_id")
    twice = SpatialData(images=dict(tiled.images), shapes=shapes, tables={"table": parsed})
    pk.pp.tile(twice, tile_px=56, mpp=2.0, image_mpp=1.0)
    counted.clear()
    embed(twice, store=tmp_path / "s.zarr")
    assert sum(counted) == one.n_obs
    x = twice["table"].obsm["X_tiny"]
    np.testing.assert_array_equal(x[: one.n_obs], x[one.n_obs :])


def test_a_lazy_obsm_whose_store_is_gone_is_an_error(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embed(tiled, store="s.zarr", max_memory=1000)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert np.isfinite(tiled["table"].obsm["X_tiny"].compute()).all()
    shutil.rmtree(tmp_path / "s.zarr")
    with pytest.raises(OSError, match="Features are missing in the store .*: it was moved, deleted or changed"):
        tiled["table"].obsm["X_tiny"].compute()


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"store": "s3://bucket/x"}, ValueError, "is an address: a folder of a file system is needed"),
        ({"store": {}}, TypeError, "`store={}` must be the path of a folder, got dict"),
        ({"max_memory": "4GB"}, TypeError, "`compute`: `max_memory='4GB'` must be a whole number of bytes"),
        ({"max_memory": -1}, ValueError, "`max_memory=-1` must be a whole number of bytes, at least 1"),
        (
            {"precision": "fp8"},
            ValueError,
            r"`precision='fp8'` must be one of \['fp32', 'bf16', 'fp16'\]",
        ),
        ({"embed_batch_size": 0}, ValueError, "`embed_batch_size=0` must be a whole number, at least 1"),
        ({"embed_batch_size": -4}, ValueError, "`embed_batch_size=-4` must be a whole number, at least 1"),
    ],
)
def test_arguments_that_are_none(tiled: SpatialData, how: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        embed(tiled, **how)


@pytest.mark.parametrize("stored", [False, True])
def test_features_that_are_no_numbers_are_an_error(
    tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    forward = BatchEncoder._forward

    def overflown(self: BatchEncoder, tiles: np.ndarray) -> list[torch.Tensor]:
        out = [part.clone() for part in forward(self, tiles)]
        out[0][0, 3] = float("inf")
        return out

    monkeypatch.setattr(BatchEncoder, "_forward", overflown)
    with pytest.raises(ValueError, match=r"features of \d+ of 16 tiles are NaN or infinite"):
        embed(tiled, store=tmp_path / "s.zarr" if stored else None)
    assert "X_tiny" not in tiled["table"].obsm


def test_a_failing_prediction_leaves_nothing(
    untiled: SpatialData, adapter: pk.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any) -> Any:
        raise OSError("the store is gone")

    monkeypatch.setattr(_section_features.SectionFeatures, "by_row", gone)
    shapes = set(untiled.shapes)
    with pytest.raises(OSError, match="the store is gone"):
        predict(untiled, adapter, store=tmp_path / "s.zarr")
    assert set(untiled.shapes) == shapes and "peka" not in untiled["table"].layers
    with pytest.raises(ValueError, match="Predictions of 2. genes for .* rows would take .* `Compute.max_memory`"):
        predict(untiled, adapter, table_added="p", max_memory=100)


def test_a_store_that_is_none_leaves_the_object_alone(tiled: SpatialData, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no zarr group"):
        embed(tiled, store=tmp_path)
    assert "X_tiny" not in tiled["table"].obsm


def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers, each of one thread, as the tests themselves."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.run(_one_thread)
        yield client


@pytest.mark.parametrize("images", ["in memory", "on disk"])
def test_two_workers_give_the_bits_of_none(
    tiled: SpatialData, adapter: pk.Adapter, blend: pk.Adapter, client: Client, tmp_path: Path, images: str
) -> None:
    if images == "on disk":
        tiled.write(tmp_path / "sdata.zarr")
        tiled = sd.read_zarr(tmp_path / "sdata.zarr")
    table = tiled["table"]
    embed(tiled, key_added="here", readout=FIELDS)
    embed(tiled, key_added="there", readout=FIELDS, client=client)
    np.testing.assert_array_equal(table.obsm["there"], table.obsm["here"])
    embed(tiled, key_added="kept", store=tmp_path / "s.zarr", readout=FIELDS, client=client)
    np.testing.assert_array_equal(table.obsm["kept"], table.obsm["here"])
    for one in (adapter, blend):
        predict(tiled, one)
        alone, features = table.layers["peka"].copy(), table.obsm["X_peka"].copy()
        predict(tiled, one, client=client)
        np.testing.assert_array_equal(table.layers["peka"], alone)
        np.testing.assert_array_equal(table.obsm["X_peka"], features)


def _elsewhere(folder: str) -> None:
    import os

    os.chdir(folder)


def test_workers_that_see_no_image_do_not_make_it_up(
    tiled: SpatialData, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled.write(tmp_path / "sdata.zarr")
    monkeypatch.chdir(tmp_path)
    stored = sd.read_zarr("sdata.zarr")
    client.run(_elsewhere, "/")
    embed(stored, client=client)  # the place does not depend on where a process is
    for chunk in (tmp_path / "sdata.zarr" / "images").rglob("zarr.json"):
        chunk.unlink()
    for chunk in (tmp_path / "sdata.zarr" / "images").rglob("c/*/*/*"):
        chunk.unlink()
    for cluster in (None, client):
        with pytest.raises(OSError, match="is not there; it was moved, or this process does not see its disk"):
            embed(stored, key_added="x", client=cluster)


def _change_pixels(*, back: bool = False) -> None:
    """Make a worker read other pixels, or the right ones again."""
    from pekasc.tiling import TileReader

    reader: Any = TileReader
    if back:
        reader.read = reader.read_rightly
    else:
        reader.read_rightly = read = reader.read
        reader.read = lambda self, index: read(self, index) // 2


def _n_states() -> int:
    from pekasc.models.features._pieces import _STATES

    return len(_STATES)


def test_workers_that_see_other_pixels_are_found_and_forget_all(tiled: SpatialData, client: Client) -> None:
    embed(tiled, key_added="here", client=client)
    assert list(client.run(_n_states).values()) == [0, 0]
    client.run(_change_pixels)
    try:
        with pytest.raises(
            OSError, match="A worker reads other pixels than the process that made the call in section 'P"
        ):
            embed(tiled, key_added="there", client=client)
    finally:
        client.run(_change_pixels, back=True)


def _die_once(flag: str | None) -> None:
    """Make this worker's next piece end its process, if none has died before; None lets it live."""
    import os

    from pekasc.models.features import _embed, _pieces

    room: Any = _pieces
    if flag is None:
        room.embed_chunks = _embed.embed_chunks
        return

    def dying(*args: Any) -> Any:
        with open(flag + ".pieces", "a") as out:
            out.write("piece\n")
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return _embed.embed_chunks(*args)
        os._exit(9)

    room.embed_chunks = dying


def test_a_worker_that_dies_costs_its_piece(tiled: SpatialData, client: Client, tmp_path: Path) -> None:
    embed(tiled, key_added="here")
    flag = tmp_path / "died"
    client.run(_die_once, str(flag))
    embed(tiled, key_added="there", client=client)
    client.wait_for_workers(2)
    client.run(_die_once, None)
    assert flag.exists()
    # what was begun where the cause of death was planted: no more than all pieces, and those of the dead worker again
    n_pieces = sum(-(-len(rows) // 16) for rows in tiled["table"].obs.groupby("region", observed=True).indices.values())
    assert len((tmp_path / "died.pieces").read_text().splitlines()) <= n_pieces + 2
    # the worker that took its place may have computed with more threads
    np.testing.assert_allclose(tiled["table"].obsm["there"], tiled["table"].obsm["here"], atol=1e-5)
    client.run(_one_thread)


def test_clients_that_are_none(tiled: SpatialData) -> None:
    with pytest.raises(TypeError, match="`client` must be a distributed.Client, got str"):
        embed(tiled, client="tcp://here")
    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        closed = Client(cluster)
        closed.close()
    with pytest.raises(ValueError, match="`client` is closed: give a `distributed.Client` that is connected"):
        embed(tiled, client=closed)


def test_a_broken_image_chunk_is_named_by_workers_too(tiled: SpatialData, client: Client, tmp_path: Path) -> None:
    tiled.write(tmp_path / "sdata.zarr")
    broken = sd.read_zarr(tmp_path / "sdata.zarr")
    for chunk in (tmp_path / "sdata.zarr" / "images").rglob("c/0/0/0"):
        chunk.write_bytes(chunk.read_bytes()[:50])
    for cluster in (None, client):
        with pytest.raises(OSError, match=r"Tile \d+ of section .* cannot be read: chunk \(0, 0\) of image level"):
            embed(broken, client=cluster)
    assert "X_tiny" not in broken["table"].obsm


def test_batches_that_do_not_fit_are_halved(
    tiled: SpatialData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    embed(tiled, key_added="plain")
    forward = BatchEncoder._forward
    sizes = []

    def small(self: BatchEncoder, tiles: np.ndarray) -> list[torch.Tensor]:
        sizes.append(len(tiles))
        if len(tiles) > 3:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.\nMore lines.")
        return forward(self, tiles)

    monkeypatch.setattr(BatchEncoder, "_forward", small)
    with caplog.at_level(logging.WARNING, logger="pekasc"):
        embed(tiled, key_added="halved")
    assert "Batches of 8 tiles run out of memory on cpu (Tried to allocate 20.00 GiB.): going on with 4" in caplog.text
    assert sum(size > 3 for size in sizes) == 2  # found once, not for every batch
    np.testing.assert_allclose(tiled["table"].obsm["halved"], tiled["table"].obsm["plain"], atol=1e-5)

    def never(self: BatchEncoder, tiles: np.ndarray) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(BatchEncoder, "_forward", never)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        embed(tiled)
