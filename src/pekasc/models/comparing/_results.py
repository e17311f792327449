"""Results of a comparison in a folder: predictions in its store; features and gene sets in the cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pekasc._digests import file_sha256, fingerprint
from pekasc.models.runtime import explained, unfinished, write_array, write_json

_ABOUT = "about.json"
_WHAT = "A result of the comparison"

Piece = tuple[Mapping[str, np.ndarray], dict[str, Any]]  # arrays, and plain values about them


class Results:
    """Keep results under a name and a fingerprint of everything that they depend on.

    A result is a folder with arrays and plain values. It is written atomically, and arrays are memory-mapped.

    Parameters
    ----------
    folder
        The folder; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _path(self, name: str, key: str) -> Path:
        assert self.folder is not None  # for the type checker: callers checked it
        return self.folder / f"{name}-{key[:16]}"

    def get(self, name: str, key: str) -> Piece | None:
        """Return a stored result, or None.

        Raises
        ------
        ValueError
            If the result is damaged.
        """
        if self.folder is None or not self._path(name, key).exists():
            return None
        path = self._path(name, key)
        try:
            record = json.loads((path / _ABOUT).read_text())
            digests, about = record["arrays"], record["about"]
            if record["sha256"] != fingerprint(digests, about):
                raise ValueError(f"{_ABOUT} was changed after it was written")
            arrays = {}
            for array, digest in digests.items():
                if file_sha256(path / f"{array}.npy") != digest:
                    raise ValueError(f"{array}.npy is not the file that was written")
                arrays[array] = np.load(path / f"{array}.npy", mmap_mode="r", allow_pickle=False)
            return arrays, about
        except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"The stored result {str(path)!r} cannot be read ({error}): delete it to compute it again."
            ) from error

    def kept(self, name: str, key: str, make: Callable[[], Piece]) -> Piece:
        """Return a stored result; if there is none, compute it with `make` and store it."""
        found = self.get(name, key)
        if found is None:
            self.put(name, key, *(found := make()))
            found = self.get(name, key) or found  # memory-mapped, if there is a folder
        return found

    def put(self, name: str, key: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Store a result, unless another run was first.

        Raises
        ------
        OSError
            If there is not enough disk space, or the folder cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(name, key)
        part = unfinished(path)
        try:
            for array, found in arrays.items():
                write_array(part / f"{array}.npy", found, _WHAT)
            digests = {array: file_sha256(part / f"{array}.npy") for array in arrays}
            values = json.loads(json.dumps(dict(about)))  # as they will be read back
            record = {"arrays": digests, "about": values, "sha256": fingerprint(digests, values)}
            write_json(part / _ABOUT, record, _WHAT)
            part.rename(path)
        except OSError as error:
            if not path.exists():  # else another run was first
                # named after the result, not after the file that was not finished
                plain = error if error.errno is None else OSError(error.errno, os.strerror(error.errno))
                raise explained(plain, path, _WHAT) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
