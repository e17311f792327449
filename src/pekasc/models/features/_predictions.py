"""Predictions on disk: a zarr array of table rows x genes beside the features, written in parts that are read apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr

from pekasc.models.features._store import explained, open_array, sweep

ATTRIBUTE = "pekasc_predictions"
_SHARD_BYTES = 32 * 2**20  # a file, encoded in memory
_ROWS, _GENES = 1024, 64  # of a chunk: a gene's map and a tile's profile are both read without the rest


class PredictionStore:
    """Predictions of the rows of a table, (n_obs, n_genes), NaN where nothing is predicted.

    A file holds all genes of a part of the rows, in chunks with a checksum each that are read one by one.

    Parameters
    ----------
    path
        Folder of the zarr group, which may hold features too; created if it does not exist.
    digest
        Digest of everything that the predictions depend on, from which the array is named.
    shape
        Number of rows and of genes.
    info
        Description of the predictions, stored as attributes.
    dtype
        ``"float32"`` or ``"float16"``.

    Raises
    ------
    ValueError
        If the folder is not such a store, or holds an array of another digest or size under this name.
    OSError
        If the folder cannot be written.
    """

    def __init__(self, path: Path, digest: str, shape: tuple[int, int], info: Mapping[str, Any], dtype: str) -> None:
        self.path, self.name, self.digest, self.shape = path, f"predictions-{digest[:16]}", digest, shape
        width = -(-shape[1] // _GENES) * _GENES
        rows = max(1, _SHARD_BYTES // (_ROWS * width * np.dtype(dtype).itemsize)) * _ROWS
        rows = min(rows, -(-shape[0] // _ROWS) * _ROWS)
        self._array = open_array(
            path, self.name, ATTRIBUTE, {"digest": digest, **info}, shape, dtype=dtype, chunks=(_ROWS, _GENES),
            shards=(rows, width),
        )  # fmt: skip
        self.rows_per_part = _rows_per_part(self._array, path, self.name)

    def missing(self) -> list[slice]:
        """Return the parts of the rows that are not there yet: a file is written whole or not at all."""
        n = self._array.shape[0]
        return [
            slice(start, min(start + self.rows_per_part, n))
            for start in range(0, n, self.rows_per_part)
            if not (self.path / self.name / "c" / str(start // self.rows_per_part) / "0").exists()
        ]

    def write(self, rows: slice, values: np.ndarray) -> None:
        """Write a part of the rows.

        Raises
        ------
        OSError
            If there is not enough disk space, or the folder cannot be written.
        """
        try:
            self._array[rows] = values
        except OSError as error:
            raise explained(error, self.path, " Rows written before stay") from error

    def layer(self, key: str) -> da.Array:
        """Return the predictions as a dask array, which is written with a table unless it is a layer named `key`."""
        return stored_layer(self.path, self.name, self.digest, self.shape, key)

    def sweep(self) -> None:
        """Delete the partial files of an interrupted run. Call it only while holding the lock."""
        sweep(self.path / self.name)


def stored_layer(path: Path, name: str, digest: str, shape: tuple[int, int], key: str) -> da.Array:
    """Return stored predictions as a dask array, read when it is computed; `key` is the layer that it is for.

    Raises
    ------
    FileNotFoundError
        If the store or the array is not there.
    ValueError
        If it holds other predictions.
    """
    if not (path / name / "zarr.json").is_file():
        raise FileNotFoundError(
            f"The predictions {name!r} are not in the store {str(path)!r}: it was moved or deleted. Give its new place "
            "as `store=`, or predict again."
        )
    try:
        array: Any = zarr.open_array(path, path=name, mode="r")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, name, str(error)) from error
    found: Any = array.attrs.get(ATTRIBUTE)
    stored = found.get("digest") if isinstance(found, Mapping) else None
    if stored != digest or array.shape != shape:
        raise ValueError(
            f"The store {str(path)!r} holds other predictions than the table's: {array.shape[0]} rows and "
            f"{array.shape[1]} genes, {shape[0]} and {shape[1]} expected, digest {str(stored)[:12]}, "
            f"{digest[:12]} expected. Predict again."
        )
    _keep_in_store()
    chunks = (_rows_per_part(array, path, name), min(shape[1], 16 * _GENES))
    lazy = da.from_array(array, chunks=chunks, name=f"{name}-{digest[:16]}")
    return derived_layer(lazy, key)


def derived_layer(lazy: da.Array, key: str) -> StoredLayer:
    """Return what is computed from a stored layer as the layer `key`, which is not written with a table either."""
    layer = StoredLayer(lazy.dask, lazy.name, lazy.chunks, meta=lazy._meta)
    layer.key = key
    return layer


def _rows_per_part(array: Any, path: Path, name: str) -> int:
    """Return the rows of a file of the array, which holds all genes of them."""
    if array.shards is None or array.shards[1] < array.shape[1]:
        raise _damaged(path, name, f"its files hold {array.shards}")
    return int(array.shards[0])


def _damaged(path: Path, name: str, why: str) -> ValueError:
    return ValueError(f"The store {str(path)!r} is damaged: {name!r} cannot be opened ({why}). Delete {name!r} in it.")


class StoredLayer(da.Array):
    """A dask array of stored predictions, which stays in its store when the table is written, as the layer `key`.

    Under another name, or as `X`, it is written: no record says where it is. A layer of 18,000 genes for a slide takes
    gigabytes, which every ``sdata.write`` would copy and every ``read_zarr`` would load. Slices and results of
    operations are ordinary dask arrays, which are written.
    """

    key = ""

    def copy(self) -> StoredLayer:
        """Return the same array: it is read only."""
        return self

    def __deepcopy__(self, memo: Any) -> StoredLayer:
        return self


def _left_in_store(group: Any, key: str, layer: StoredLayer, *args: Any, _writer: Any, **kwargs: Any) -> None:
    """Write nothing where the record in ``uns`` names the store; what stands elsewhere is an array like any other."""
    if f"{group.name}/{key}".endswith(f"layers/{layer.key}"):
        return
    plain = da.Array(layer.dask, layer.name, layer.chunks, meta=layer._meta)
    _writer.write_elem(group, key, plain, dataset_kwargs=kwargs.get("dataset_kwargs", {}))


def _keep_in_store() -> None:
    # anndata has a registry of writers by type, and no public way to add one that writes nothing
    from anndata._io.specs.registry import _REGISTRY, IOSpec
    from h5py import Group as H5Group

    _REGISTRY.write_specs[StoredLayer] = IOSpec("array", "0.2.0")
    for group in (zarr.Group, H5Group):
        _REGISTRY.write[(group, StoredLayer, frozenset())] = _left_in_store
