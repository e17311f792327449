"""Features at several depths while a call runs: in memory, or in temporary files from which one depth is read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from pekasc.models.encoders import ArraysOnAccess, Depth, depth_name
from pekasc.tiling import check_temporary_room


@dataclass
class _Part:
    """Features of one field of view, in the order in which tiles were embedded."""

    file: IO[bytes]
    width: int
    rows: list[np.ndarray] = field(default_factory=list)


class FeatureFiles(ArraysOnAccess[Depth]):
    """Features by depth, (n, fields * d), kept in half precision in temporary files, deleted with this object.

    Every access reads those of one depth into memory, as float32.

    Parameters
    ----------
    n
        Number of tiles.
    depths
        The depths.
    folder
        Where the files are made; the system's temporary folder by default.
    """

    def __init__(self, n: int, depths: Sequence[Depth], folder: Path | None = None) -> None:
        super().__init__(depths, self._read)
        self._n, self._folder = n, folder
        self._parts: dict[Depth, list[_Part]] = {depth: [] for depth in depths}

    def put(self, depth: Depth, scale: int, rows: np.ndarray, values: np.ndarray) -> None:
        """Add features of some tiles, (rows, d), in a field of view; fields come one after the other.

        Raises
        ------
        ValueError
            If a value is beyond half precision.
        """
        parts = self._parts[depth]
        if scale == len(parts):
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            parts.append(_Part(tempfile.TemporaryFile(prefix="pekasc-features-", dir=self._folder), values.shape[1]))
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(values, dtype=np.float16)
        if np.isinf(half).any() and np.isfinite(values).all():
            raise ValueError(
                f"Features at depth {depth_name(depth)} reach {np.abs(values).max():.3g}, and files keep them in half "
                f"precision, up to {np.finfo(np.float16).max:.0f}: raise `Compute.max_memory`, so that they stay in "
                "memory."
            )
        parts[scale].rows.append(np.array(rows))
        parts[scale].file.write(half.tobytes())

    def _read(self, depth: Depth) -> np.ndarray:
        parts = self._parts[depth]
        out = np.empty((self._n, sum(part.width for part in parts)), dtype=np.float32)
        start = 0
        for part in parts:
            part.file.seek(0)
            values = np.fromfile(part.file, dtype=np.float16).reshape(-1, part.width)
            part.file.seek(0, os.SEEK_END)
            out[np.concatenate(part.rows), start : start + part.width] = values
            start += part.width
        return out


class FeatureArrays(dict[Depth, np.ndarray]):
    """Features by depth, (n, fields * d) float32.

    Parameters
    ----------
    n
        Number of tiles.
    fields
        Number of fields of view.
    in_memory
        Otherwise, arrays are mapped from temporary files, deleted with them.
    """

    def __init__(self, n: int, fields: int, *, in_memory: bool) -> None:
        super().__init__()
        self._n, self._fields, self._in_memory = n, fields, in_memory

    def put(self, depth: Depth, scale: int, rows: np.ndarray, values: np.ndarray) -> None:
        """See :meth:`FeatureFiles.put`."""
        width = values.shape[1]
        if depth not in self:
            shape = (self._n, self._fields * width)
            if self._in_memory:
                self[depth] = np.empty(shape, dtype=np.float32)
            else:
                file = tempfile.TemporaryFile(prefix="pekasc-features-")
                self[depth] = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        self[depth][rows, scale * width : (scale + 1) * width] = values


def room_for(
    n: int, widths: Sequence[int], depths: Sequence[Depth], fields: int, max_memory: int | None, *,
    folder: Path | None = None, half: bool = False,
) -> FeatureArrays | FeatureFiles:  # fmt: skip
    """Return an object to put features in: of more than `max_memory` bytes in files.

    With `half`, these are in half precision, in `folder`.

    Raises
    ------
    OSError
        If the folder has not enough disk space.
    """
    width = fields * sum(widths)
    in_memory = max_memory is None or 4 * n * width <= max_memory
    what = f"Features of {n} tiles"
    if in_memory or not half:
        if not in_memory:
            check_temporary_room(4 * n * width, what)
        return FeatureArrays(n, fields, in_memory=in_memory)
    check_temporary_room(2 * n * width, what, folder)
    return FeatureFiles(n, depths, folder)
