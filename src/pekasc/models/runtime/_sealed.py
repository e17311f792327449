"""Files that carry the SHA-256 of their content, which is checked before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pekasc._digests import file_sha256, fingerprint, sha256
from pekasc.models.runtime._files import write_json, write_whole

_SIZE = hashlib.sha256().digest_size
_BLOCK = 2**20


class _Hashed:
    """A file that numpy writes through Python, with the digest of what was written."""

    def __init__(self, out: BinaryIO) -> None:
        self.out, self.sha = out, hashlib.sha256()

    def write(self, part: bytes) -> int:
        self.sha.update(part)
        return self.out.write(part)


def write_sealed_array(path: Path, values: np.ndarray, what: str) -> None:
    """Write an array as ``.npy`` with the SHA-256 of the file at its end, which readers of ``.npy`` ignore.

    Parameters
    ----------
    path, what
        See :func:`pekasc.models.runtime.write_whole`.
    values
        The array.
    """

    def write(out: BinaryIO) -> None:
        hashed = _Hashed(out)
        np.save(hashed, values, allow_pickle=False)
        out.write(hashed.sha.digest())

    write_whole(path, write, what)


def read_sealed_array(path: Path) -> np.ndarray:
    """Return an array that :func:`write_sealed_array` wrote, memory-mapped.

    Raises
    ------
    ValueError
        If it is not the file that was written.
    OSError
        If it cannot be read.
    """
    sha, left = hashlib.sha256(), path.stat().st_size - _SIZE
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            sha.update(block)
            left -= len(block)
        whole = left == 0 and file.read() == sha.digest()
    if not whole:
        raise ValueError(f"{path.name} is not the file that was written")
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def write_sealed_json(path: Path, value: Any, what: str) -> None:
    """Write plain values as JSON, with their SHA-256 beside them."""
    value = json.loads(json.dumps(value))  # as it will be read back
    write_json(path, {"value": value, "sha256": fingerprint(value)}, what)


def read_sealed_json(path: Path) -> Any:
    """Return values that :func:`write_sealed_json` wrote.

    Raises
    ------
    ValueError
        If they are no JSON, or not the values that were written.
    OSError
        If the file cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from error
    if not isinstance(record, dict) or record.keys() != {"value", "sha256"}:
        raise ValueError(f"{path.name} has no SHA-256 of its values")
    if record["sha256"] != fingerprint(record["value"]):
        raise ValueError(f"{path.name} was changed after it was written")
    return record["value"]


def replace_sealed(path: Path, content: bytes, what: str) -> None:
    """Write a file whose SHA-256 is in a JSON file beside it, atomically: at any moment the two agree.

    The JSON file names the digests of the file that is there and of the one that replaces it, and is written first.
    """
    digests = [sha256(content), *([file_sha256(path)] if path.exists() else [])]
    write_json(path.with_suffix(".json"), {"sha256": digests}, what)
    write_whole(path, lambda out: out.write(content), what)


def check_sealed(path: Path) -> None:
    """Check a file that :func:`replace_sealed` wrote.

    Raises
    ------
    ValueError
        If it is not the file that was written, or its digest is missing.
    OSError
        If it cannot be read.
    """
    beside = path.with_suffix(".json")
    try:
        digests = json.loads(beside.read_text())["sha256"] if beside.exists() else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{beside.name}, which has its SHA-256, cannot be read") from error
    if not isinstance(digests, list):
        raise ValueError(f"{beside.name}, which has its SHA-256, is missing or damaged")
    if file_sha256(path) not in digests:
        raise ValueError("it is not the file that was written")
