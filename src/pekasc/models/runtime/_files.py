"""Atomic writing of files, and errors that name the file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def unfinished(path: Path) -> Path:
    """Return a unique temporary name beside `path`; process ids would repeat between the machines of a cluster."""
    return path.with_name(f".{path.name}.{uuid4().hex}.part")


def write_whole(path: Path, write: Callable[[BinaryIO], Any], what: str) -> None:
    """Write a file atomically: under a temporary name first, then renamed.

    Parameters
    ----------
    path
        The file; its folder is created if it does not exist.
    write
        Function that writes the content to an open file.
    what
        What the file holds, for errors: ``"The checkpoint of the fit"``.

    Raises
    ------
    OSError
        If it cannot be written; the message names the file, and an earlier file stays.
    """
    part = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:
            write(out)
            out.flush()
            os.fsync(out.fileno())  # before the rename, so that a power failure leaves no empty file
        part.replace(path)
    except OSError as error:
        raise explained(error, path, what) from error
    finally:
        with suppress(OSError):  # another error would hide the first
            part.unlink()


class _Plain:
    """A file that numpy writes through Python, whose errors say why: its own writing leaves out the reason."""

    def __init__(self, out: BinaryIO) -> None:
        self.write = out.write


def write_array(path: Path, values: np.ndarray, what: str) -> None:
    """Write an array as ``.npy``; see :func:`write_whole`."""
    write_whole(path, lambda out: np.save(_Plain(out), values, allow_pickle=False), what)


def write_json(path: Path, value: Any, what: str, indent: int | None = None) -> None:
    """Write plain values as JSON; see :func:`write_whole`."""
    write_whole(path, lambda out: out.write(json.dumps(value, indent=indent).encode()), what)


def explained(error: OSError, path: Path, what: str) -> OSError:
    """Return the error with a message that names the content and the file."""
    room = "No room" if error.errno in NO_ROOM else error.strerror or str(error)
    text = f"{what} cannot be written to {str(path)!r}: {room}."
    return type(error)(text) if error.errno is None else type(error)(error.errno, text)
