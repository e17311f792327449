"""SHA-256 of files, arrays and plain values, to name cached results and to detect changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def sha256(*parts: str | bytes | np.ndarray | Iterable[np.ndarray]) -> str:
    """Return the SHA-256 of the concatenation of texts, bytes and array values."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            sha.update(part.encode())
        elif isinstance(part, bytes):
            sha.update(part)
        else:
            for array in [part] if isinstance(part, np.ndarray) else part:
                sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 of arrays, including dtype and shape, and of plain values."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part.astype("U") if part.dtype == object else part)
            sha.update(f"{array.dtype} {array.shape}".encode())
            sha.update(array.view(np.uint8).data if array.size else b"")
        else:
            sha.update(json.dumps(part, sort_keys=True, default=plain).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def plain(value: Any) -> Any:
    """Convert a value that JSON cannot write, with the same result in every process."""
    # the order of a set differs between processes
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
