"""Finished pieces of a comparison, kept in a folder so that none is computed twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np

_ABOUT = "about.json"


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
            part = _part_of(folder)
            part.mkdir()
            try:
                arrays = make()
                for i, array in enumerate(arrays):
                    np.save(part / f"{i:03}.npy", array, allow_pickle=False)
                (part / _ABOUT).write_text(json.dumps({"n_arrays": len(arrays)}))
                try:
                    part.rename(folder)
                except OSError:
                    if not folder.exists():  # else another run was first
                        raise
            finally:
                shutil.rmtree(part, ignore_errors=True)
        try:
            n_arrays = json.loads((folder / _ABOUT).read_text())["n_arrays"]
            return [np.load(folder / f"{i:03}.npy", mmap_mode="r", allow_pickle=False) for i in range(n_arrays)]
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise ValueError(
                f"The stored result {folder.name} cannot be read ({error}): delete it to compute it again."
            ) from error

    def put(self, name: str, key: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keep arrays and facts; in a folder, a file is there whole or not at all."""
        if self.folder is None:
            return
        path = self._path(name, key)
        part = _part_of(path)
        try:
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, about=np.array(json.dumps(dict(about))), **arrays)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    """Return a name to write under: process numbers repeat between the machines of a cluster."""
    return path.with_name(f".{path.name}.{uuid4().hex}.part")
