"""A store of predictions: parts of the rows, what is left in it when a table is written, and damaged metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pytest

from pekasc.models.features import PredictionStore, StoredLayer, stored_layer

DIGEST = "ab" * 32
SHAPE = (2500, 70)


def opened(folder: Path) -> PredictionStore:
    return PredictionStore(folder, DIGEST, SHAPE, {}, "float32")


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, values: np.ndarray) -> PredictionStore:
    found = opened(tmp_path / "store")
    for part in found.missing():
        found.write(part, values[part])
    return found


def test_parts_that_are_missing(tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pekasc.models.features._predictions._SHARD_BYTES", 1)  # a file for each 1024 rows
    store = opened(tmp_path / "store")
    assert store.missing() == [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)]
    store.write(slice(1024, 2048), values[1024:2048])
    again = opened(tmp_path / "store")
    assert again.missing() == [slice(0, 1024), slice(2048, 2500)]
    layer = again.layer("peka")
    np.testing.assert_array_equal(np.asarray(layer[1024:2048]), values[1024:2048])
    assert np.isnan(np.asarray(layer[:1024])).all() and layer.numblocks == (3, 1)


def test_a_layer_stays_in_its_store_only_as_the_layer_that_the_record_names(
    store: PredictionStore, values: np.ndarray, tmp_path: Path
) -> None:
    layer = store.layer("peka")
    assert isinstance(layer, StoredLayer)
    table = ad.AnnData(X=layer, layers={"peka": layer, "mine": layer, "half": layer / 2})
    table.write_zarr(tmp_path / "table.zarr")
    table.write_h5ad(tmp_path / "table.h5ad")
    for again in (ad.read_zarr(tmp_path / "table.zarr"), ad.read_h5ad(tmp_path / "table.h5ad")):
        assert set(filter(None, again.layers)) == {"mine", "half"}
        np.testing.assert_array_equal(again.X, values)
        np.testing.assert_array_equal(again.layers["mine"], values)
        np.testing.assert_array_equal(again.layers["half"], values / 2)
    assert type(layer[:5]) is da.Array and layer.copy() is layer


def no_json(meta: dict[str, Any]) -> str:
    return json.dumps(meta)[:-40]


def other_digest(meta: dict[str, Any]) -> str:
    meta["attributes"]["pekasc_predictions"]["digest"] = "cd" * 32
    return json.dumps(meta)


def no_record(meta: dict[str, Any]) -> str:
    meta["attributes"]["pekasc_predictions"] = 3
    return json.dumps(meta)


def other_shape(meta: dict[str, Any]) -> str:
    meta["shape"] = [2500, 69]
    return json.dumps(meta)


def no_shards(meta: dict[str, Any]) -> str:
    meta["codecs"] = meta["codecs"][0]["configuration"]["codecs"]
    return json.dumps(meta)


def narrow_files(meta: dict[str, Any]) -> str:
    meta["chunk_grid"]["configuration"]["chunk_shape"][1] = 64
    return json.dumps(meta)


def no_codecs(meta: dict[str, Any]) -> str:
    del meta["codecs"]
    return json.dumps(meta)


@pytest.mark.parametrize("damage", [no_json, other_digest, no_record, other_shape, no_shards, narrow_files, no_codecs])
def test_damaged_metadata(store: PredictionStore, damage: Callable[[dict[str, Any]], str]) -> None:
    file = store.path / store.name / "zarr.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=r"is damaged: .*cannot be opened|holds other predictions than the table's"):
        stored_layer(store.path, store.name, DIGEST, SHAPE, "peka")
    with pytest.raises(ValueError, match=r"is damaged: .*cannot be opened|of another digest or size .*Delete"):
        opened(store.path)


def test_a_damaged_value_is_found_when_it_is_read(store: PredictionStore) -> None:
    (file,) = (store.path / store.name / "c").rglob("0/0")
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    layer = stored_layer(store.path, store.name, DIGEST, SHAPE, "peka")
    with pytest.raises(ValueError, match="checksum"):
        np.asarray(layer)


def test_a_store_that_is_gone(store: PredictionStore) -> None:
    with pytest.raises(FileNotFoundError, match="it was moved or deleted. Give its new place as `store=`"):
        stored_layer(store.path.with_name("other"), store.name, DIGEST, SHAPE, "peka")
