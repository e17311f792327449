"""Finished pieces of a comparison, kept in a folder so that none is computed twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pekasc.models.runtime import explained, unfinished, write_array, write_json

_ABOUT = "about.json"
_WHAT = "A result of the comparison"

Piece = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays, and plain facts about them


class Results:
    """Arrays and plain facts under a name and a fingerprint of everything that they depend on.

    A piece is a folder: it is there whole or not at all, and its arrays are mapped from their files.

    Parameters
    ----------
    folder
        Where they are kept; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def _path(self, name: str, key: str) -> Path:
        assert self.folder is not None  # for the type checker: callers asked
        return self.folder / f"{name}-{key[:16]}"

    def get(self, name: str, key: str) -> Piece | None:
        """Return what was put there, or None.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        if self.folder is None or not self._path(name, key).exists():
            return None
        path = self._path(name, key)
        try:
            record = json.loads((path / _ABOUT).read_text())
            arrays = {
                array: np.load(path / f"{array}.npy", mmap_mode="r", allow_pickle=False) for array in record["arrays"]
            }
            return arrays, record["about"]
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(
                f"The stored result {path.name} cannot be read ({error}): delete it to compute it again."
            ) from error

    def kept(self, name: str, key: str, make: Callable[[], Piece]) -> Piece:
        """Return what was put there; else what `make` gives, put there now."""
        found = self.get(name, key)
        if found is None:
            self.put(name, key, *(found := make()))
            found = self.get(name, key) or found  # mapped from its files, where there is a folder
        return found

    def put(self, name: str, key: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keep arrays and facts, unless another run was first.

        Raises
        ------
        OSError
            If there is no room, or the folder cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(name, key)
        part = unfinished(path)
        try:
            for array, values in arrays.items():
                write_array(part / f"{array}.npy", values, _WHAT)
            write_json(part / _ABOUT, {"arrays": list(arrays), "about": dict(about)}, _WHAT)
            part.rename(path)
        except OSError as error:
            if not path.exists():  # else another run was first
                raise explained(error, path, _WHAT) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
