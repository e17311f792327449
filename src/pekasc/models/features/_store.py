"""Store of features on disk: a zarr group with one array per section and scale, written chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from filelock import FileLock, Timeout
from zarr.codecs import Crc32cCodec

from pekasc._settings import get_logger
from pekasc.models.runtime import NO_ROOM, READ_ONLY

logger = get_logger(__name__)

_FORMAT = 1
_ATTRIBUTE = "pekasc_features"
_ZARR = "zarr.json"


class FeatureStore:
    """Features of the tiles of a section, (n, width), in chunks of rows with a checksum each.

    Chunks are written atomically and verified when they are read; rows that were never written are NaN.

    Parameters
    ----------
    path
        Folder of the zarr group; created if it does not exist.
    digest
        Digest of everything that the features depend on, from which the array is named.
    shape
        Number of tiles and of features.
    chunk
        Tiles per chunk of a new array; an existing array keeps its own.
    info
        Description of the features, stored as attributes.
    dtype
        ``"float32"`` or ``"float16"``.

    Raises
    ------
    ValueError
        If the folder is not such a store, or has features of another digest under this name.
    OSError
        If the folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        shape: tuple[int, int],
        chunk: int,
        info: Mapping[str, Any],
        dtype: str = "float32",
    ) -> None:
        self.path, self.name, self._dtype = path, digest[:16], np.dtype(dtype)
        record = {"format": _FORMAT, "digest": digest, **info}
        array = open_array(path, self.name, _ATTRIBUTE, record, shape, dtype=self._dtype, chunks=(chunk, shape[1]))
        self._array = array
        self.chunk = int(array.chunks[0])
        self.n_chunks = -(-shape[0] // self.chunk)

    def sweep(self) -> None:
        """Delete the partial files of an interrupted run. Call it only while holding the lock."""
        sweep(self.path / self.name)

    def missing(self) -> list[int]:
        """Return the indices of chunks that are missing or damaged; all others are read and verified."""
        missing = []
        for i in range(self.n_chunks):
            try:
                whole = bool(np.isfinite(self.read(slice(i * self.chunk, (i + 1) * self.chunk))).all())
            except (ValueError, RuntimeError) as error:
                logger.warning(
                    "Chunk %d of %s in %s is damaged (%s): it is computed again.", i, self.name, self.path, error
                )
                whole = False
            if not whole:
                missing.append(i)
        return missing

    def write(self, chunk: int, features: np.ndarray) -> None:
        """Write a chunk.

        Raises
        ------
        OSError
            If there is not enough disk space, or the folder cannot be written.
        """
        start = chunk * self.chunk
        try:
            self._array[start : start + len(features)] = features
        except OSError as error:
            raise explained(error, self.path, f" Chunks written before stay, {chunk} is missing") from error

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read features, (k, width) float32.

        Raises
        ------
        ValueError
            If a chunk's checksum is wrong.
        """
        return np.asarray(self._array[rows] if isinstance(rows, slice) else self._array.oindex[rows])

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Read single rows, (k, width), in any order, without verifying them: :meth:`missing` did that.

        The file of a chunk is its raw values followed by the checksum, so a row can be read alone; zarr would decode
        the whole chunk for every row.
        """
        width = self._array.shape[1]
        out = np.empty((len(index), width), dtype=self._dtype)
        folder, size = self.path / self.name / "c", width * self._dtype.itemsize
        chunks, places = np.divmod(np.asarray(index), self.chunk)
        for i, (chunk, place) in enumerate(zip(chunks.tolist(), places.tolist(), strict=True)):
            out[i] = np.fromfile(folder / str(chunk) / "0", self._dtype, count=width, offset=place * size)
        return out


def open_array(
    path: Path, name: str, attribute: str, record: Mapping[str, Any], shape: tuple[int, int], **layout: Any
) -> Any:
    """Return an array of a store, whose chunks have a checksum each; created if it does not exist.

    Parameters
    ----------
    path, name
        Folder of the zarr group, and name of the array.
    attribute, record
        Attribute that describes the array, and its value, with the ``"digest"`` of all that the values depend on.
    shape, layout
        Shape of the array; type and chunks of a new one, for :func:`zarr.create_array`.

    Raises
    ------
    ValueError
        If the folder is no such store, or has an array of another digest or size under this name.
    OSError
        If the folder cannot be written.
    """
    folder = path / name
    # two runs that start at the same time must create group and array only once
    with locked(path, ["create"]):
        _open_group(path)
        try:
            if not (folder / _ZARR).exists():
                array: Any = zarr.create_array(
                    path, name=name, shape=shape, fill_value=np.nan, compressors=[Crc32cCodec()],
                    attributes={attribute: dict(record)}, **layout,
                )  # fmt: skip
            else:
                array = zarr.open_array(path, path=name, mode="r+")
        except OSError as error:
            raise explained(error, path) from error
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"The store {str(path)!r} is damaged: {str(folder)!r} cannot be opened ({error}). Delete it."
            ) from error
    found: Any = array.attrs.get(attribute)
    stored = found.get("digest") if isinstance(found, Mapping) else None
    if stored != record["digest"] or array.shape != shape:
        raise ValueError(
            f"The store {str(path)!r} holds {name!r} of another digest or size (digest {stored}, shape {array.shape}; "
            f"expected {record['digest']}, {shape}): it was changed. Delete {str(folder)!r}, or give another `store=`."
        )
    return array


def sweep(folder: Path) -> None:
    """Delete the partial files of an interrupted run from the folder of an array."""
    for partial in folder.rglob("*.partial"):
        with suppress(PermissionError):
            partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, names: Iterable[str]) -> Iterator[None]:
    """Lock arrays of a store against other runs; wait, with a warning, while another run is writing one of them.

    Arrays share 256 lock files, in a hidden folder beside the store, so that a run with many sections does not need a
    file descriptor for each. All runs acquire them in the same order, which rules out deadlocks.
    """
    folder = path.with_name(f".{path.name}.locks")
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in sorted({name if name == "create" else name[:2] for name in names}):
                lock = FileLock(folder / f"{name}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    logger.warning("Another run is writing to the store %s: waiting for it.", path)
                    lock.acquire()
                held.callback(lock.release)
        except OSError as error:
            if error.errno not in READ_ONLY or not (path / _ZARR).is_file():
                raise explained(error, path) from error
            # a finished store where nothing can be written is read; a chunk is written whole, and checked when read
            logger.debug("The store %s cannot be locked (%s): it is read without.", path, error)
        yield


def _open_group(path: Path) -> None:
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"`store={str(path)!r}` is a file: give a folder.")
        if path.is_dir() and not (path / _ZARR).is_file():
            for partial in path.glob("*.partial"):  # left by a run that was killed at its start
                partial.unlink()
            if any(path.iterdir()):
                raise ValueError(
                    f"`store={str(path)!r}` is there and is no zarr group: give another folder. Features of several "
                    "encoders and objects can share one store."
                )
        try:
            group = zarr.open_group(path, mode="a")
        except (json.JSONDecodeError, KeyError, zarr.errors.ContainsArrayError) as error:
            raise ValueError(
                f"`store={str(path)!r}` is no zarr group, or a damaged one ({type(error).__name__}: {error}): give "
                "another folder, or delete it."
            ) from error
        if _ATTRIBUTE not in group.attrs:
            if any(key for key in group.attrs) or any(True for _ in group.keys()):
                raise ValueError(
                    f"`store={str(path)!r}` is a zarr group with other content ({sorted(group.keys())[:5]}): give a "
                    "folder of its own."
                )
            group.attrs[_ATTRIBUTE] = _FORMAT
    except OSError as error:
        raise explained(error, path) from error
    if group.attrs[_ATTRIBUTE] != _FORMAT:
        raise ValueError(
            f"`store={str(path)!r}` has format {group.attrs[_ATTRIBUTE]}, this pekasc writes {_FORMAT}: give another "
            "folder."
        )


def explained(error: OSError, path: Path, what: str = "") -> OSError:
    """Return the error with the folder and what to do."""
    if error.errno in NO_ROOM:
        text = f"No room for features in the store {str(path)!r}.{what}; make room and run the same call again."
    else:
        text = f"The store {str(path)!r} cannot be written: {error.strerror or error}.{what and what + '.'}"
    return type(error)(error.errno, text)
