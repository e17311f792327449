"""Finished pieces of a comparison, kept in a folder so that none is computed twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of arrays and plain values, in order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part.astype("U") if part.dtype == object else part)
            sha.update(f"{array.dtype} {array.shape}".encode())
            sha.update(array.view(np.uint8).data if array.size else b"")
        else:
            sha.update(json.dumps(part, sort_keys=True, default=_plain).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    # a set has no order of its own
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


class Results:
    """Arrays and plain facts under a name and a fingerprint of everything that they depend on.

    Parameters
    ----------
    folder
        Where they are kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{key[:16]}.npz"

    def get(self, name: str, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return what was put there, or None."""
        if self.folder is None:
            return None
        path = self._path(name, key)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {k: stored[k] for k in stored.files}
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise ValueError(
                f"The stored result {path.name} cannot be read ({error}): delete it to compute it again."
            ) from error
        return arrays, json.loads(str(arrays.pop("about")))

    def kept(
        self, name: str, key: str, make: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what was put there; else what `make` gives, put there now."""
        found = self.get(name, key)
        if found is None:
            found = make()
            self.put(name, key, *found)
        return found

    def kept_large(self, name: str, key: str, make: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        """Return large arrays: without a folder what `make` gives, else read from files as they are needed."""
        if self.folder is None:
            return make()
        folder = self.folder / f"{name}-{key[:16]}"
        if not folder.exists():
            part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
            part.mkdir(exist_ok=True)
            for i, array in enumerate(make()):
                np.save(part / f"{i:03}.npy", array, allow_pickle=False)
            try:
                os.replace(part, folder)
            except OSError:  # another run was first
                shutil.rmtree(part)
        try:
            return [np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(folder.glob("*.npy"))]
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"The stored result {folder.name} cannot be read ({error}): delete it to compute it again."
            ) from error

    def put(self, name: str, key: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keep arrays and facts; in a folder, a file is there whole or not at all."""
        if self.folder is None:
            return
        path = self._path(name, key)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, about=np.array(json.dumps(dict(about))), **arrays)
        os.replace(part, path)
