"""Paths that users give: folders of a file system."""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path
from typing import Any

HUB = "hf-hub:"  # before the name of an adapter on the model hub
# `s3://bucket`, also as pathlib writes it, `s3:/bucket`
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_hub(path: Any) -> bool:
    """Tell whether a path names an adapter on the model hub."""
    return isinstance(path, str | Path) and str(path).startswith(HUB)


def is_address(value: Any) -> bool:
    """Tell whether a path is an address on the network, also as :mod:`pathlib` writes it."""
    return _ADDRESS.match(str(value)) is not None


def folder_path(name: str, value: Any, what: str = "folder") -> Path:
    """Check the path of a folder, or of a file, that a call reads or writes, and return it with ``~`` expanded.

    Parameters
    ----------
    name
        Name of the argument, for errors.
    value
        What was given. It need not exist.
    what
        ``"folder"`` or ``"file"``, for errors.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is empty, or an address on the network.
    """
    text = fspath(value) if isinstance(value, str | PathLike) else None
    if not isinstance(text, str):
        raise TypeError(f"`{name}={value!r}` must be the path of a {what}, got {type(value).__name__}.")
    if not text or "\0" in text:
        raise ValueError(f"`{name}={text!r}` is no path: give a {what}, such as `{name}='{what}'`.")
    if is_hub(text):
        raise ValueError(
            f"`{name}={text!r}` is the name of a repository, and a {what} is needed here: `adapter.push_to_hub` sends "
            "an adapter there, and `pekasc.Adapter.load` reads it."
        )
    if is_address(text):
        raise ValueError(
            f"`{name}={text!r}` is an address: a {what} of a file system is needed. What pekasc writes stays whole "
            "when a process is killed or several share it, by locks and by replacing files at once, which an object "
            f"store has not: write to a {what}, and copy it when it is done (`fsspec.filesystem('s3').put`)."
        )
    return Path(text).expanduser()


def check_no_file(name: str, path: Path) -> None:
    """Raise ValueError if there is a file where a call needs a folder."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"`{name}={str(path)!r}` is a file: give a folder.")


def is_zarr(path: Path) -> bool:
    """Tell whether a path is a zarr folder, of either format and of whatever."""
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray", ".zattrs"))
