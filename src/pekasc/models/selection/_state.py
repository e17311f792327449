"""Checkpoints of a fit in a folder, from which a later run of the same call continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from pekasc._settings import get_logger
from pekasc.models.runtime import (
    READ_ONLY,
    check_sealed,
    explained,
    processes,
    read_sealed_array,
    read_sealed_json,
    replace_sealed,
    write_json,
    write_sealed_array,
    write_sealed_json,
)

logger = get_logger(__name__)

_SETTINGS = "settings.json"
_LOCK = "in-use.lock"
_WHAT = "The checkpoint of the fit"
_ROWS = 4096  # read at once to be checked


class Resume:
    """Finished parts of one fit, kept in a folder.

    Parameters
    ----------
    folder
        Folder of the checkpoints, created if it does not exist; None keeps nothing.
    settings
        Settings and digests of the data that the result depends on; they must match those in the folder.

    Raises
    ------
    ValueError
        If the folder has checkpoints of other settings, or holds something else.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = folder
        self.writable = True
        if folder is None:
            return
        now = json.loads(json.dumps(dict(settings)))
        problem = None
        with processes.raise_together():
            if processes.rank() == 0:
                problem = _check(folder, now)
        problem = processes.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder against other runs.

        Raises
        ------
        ValueError
            If another run is using it.
        """
        with ExitStack() as stack:
            problem = None
            if self.path is not None and processes.rank() == 0:
                lock = FileLock(self.path / _LOCK)
                try:
                    stack.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    problem = (
                        f"`resume={str(self.path)!r}` is in use: another run of this fit is going on. Wait for it, or "
                        "give another folder."
                    )
                except OSError as error:
                    if error.errno not in READ_ONLY:
                        raise explained(error, self.path, _WHAT) from error
                    self.writable = False  # nor can another run write to it
                    logger.warning(
                        "The folder `resume=%r` cannot be written: what is finished is read from it, and no further "
                        "checkpoints are kept.", str(self.path),
                    )  # fmt: skip
            problem = processes.broadcast(problem)
            if problem is not None:
                raise ValueError(problem)
            self.writable = processes.broadcast(self.writable)
            yield

    def folder(self, name: str) -> Path | None:
        """Return the folder of a part, or None: without a folder, or where a new one cannot be made."""
        if self.path is None or not (self.writable or (self.path / name).is_dir()):
            return None
        return self.path / name

    def array(self, name: str, make: Callable[[], np.ndarray], n: int, width: int) -> np.ndarray:
        """Return the features of an earlier run, (n, width), memory-mapped; without one, make and keep them."""
        if self.path is None:
            return make()
        there = processes.broadcast((self.path / f"{name}.npy").exists())
        return self.finished(name, n, width) if there else self.put(name, make())

    def put(self, name: str, values: np.ndarray) -> np.ndarray:
        """Keep an array, replacing an earlier one; return it memory-mapped."""
        return self._read(name) if self._keep(f"{name}.npy", values, write_sealed_array) else values

    def finished(self, name: str, n: int, width: int) -> np.ndarray:
        """Return the array of an earlier run: features, (n, width).

        Raises
        ------
        ValueError
            If it is missing or damaged: it cannot be made again, since the weights behind it are gone.
        """
        found = self._read(name)
        if found.shape != (n, width) or found.dtype != np.float32:
            raise ValueError(
                self.damaged(
                    f"{name}.npy holds {found.dtype} of shape {found.shape}, not {width} features of {n} spots"
                )
            )
        if not all(np.isfinite(found[start : start + _ROWS]).all() for start in range(0, n, _ROWS)):
            raise ValueError(self.damaged(f"{name}.npy has features that are NaN or infinite"))
        return found

    def _read(self, name: str) -> np.ndarray:
        assert self.path is not None  # for the type checker: there was an earlier run
        file = self.path / f"{name}.npy"
        if not file.exists():
            raise ValueError(self.damaged(f"{name}.npy is missing"))
        try:
            return read_sealed_array(file)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(self.damaged(f"{name}.npy cannot be read ({error})")) from error

    def content(self, name: str) -> bytes:
        """Return the content of a file of an earlier run.

        Raises
        ------
        ValueError
            If it is missing or damaged.
        """
        assert self.path is not None  # for the type checker: there was an earlier run
        try:
            check_sealed(self.path / name)
            return (self.path / name).read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(self.damaged(f"{name} cannot be read ({error})")) from error

    def put_content(self, name: str, content: bytes) -> None:
        """Keep the content of a file for a later run."""
        self._keep(name, content, replace_sealed)

    def damaged(self, what: str) -> str:
        """Return the text of an error about a part."""
        return f"`resume={str(self.path)!r}` is damaged: {what}. Delete the folder."

    def facts(self, name: str) -> Any:
        """Return the plain values of an earlier run, or None."""
        if self.path is None:
            return None
        file = self.path / f"{name}.json"
        try:
            return processes.broadcast(read_sealed_json(file) if file.exists() else None)
        except (OSError, ValueError) as error:
            raise ValueError(self.damaged(f"{name}.json cannot be read ({error})")) from error

    def put_facts(self, name: str, facts: Any) -> None:
        """Keep plain values as JSON for a later run."""
        self._keep(f"{name}.json", facts, write_sealed_json)

    def _keep(self, name: str, value: Any, write: Callable[[Path, Any, str], None]) -> bool:
        """Write a file in one process, if there is a folder that can be written; return whether it was."""
        if self.path is None or not self.writable:
            return False
        with processes.raise_together():
            if processes.rank() == 0:
                write(self.path / name, value, _WHAT)
        return True


def _check(folder: Path, now: dict[str, Any]) -> str | None:
    """Return why a folder cannot be used, or None; write the settings into an empty one."""
    if folder.exists() and not folder.is_dir():
        return f"`resume={str(folder)!r}` is a file: give a folder."
    file = folder / _SETTINGS
    if not file.exists():
        if folder.exists() and any(not p.name.startswith(f".{_SETTINGS}.") for p in folder.iterdir()):
            return (
                f"`resume={str(folder)!r}` exists and holds no checkpoints of a fit ({_SETTINGS} is missing): give "
                "a new or empty folder."
            )
        write_json(file, now, _WHAT, indent=1)
        return None
    try:
        stored = json.loads(file.read_text())
        if not isinstance(stored, dict):
            raise ValueError(f"it holds {type(stored).__name__}")
    except (ValueError, RecursionError) as error:
        return f"`resume={str(folder)!r}` is damaged: {_SETTINGS} is no JSON of ours ({error}). Delete the folder."
    now, stored = _flattened(now), _flattened(stored)
    other = sorted(name for name in {*now, *stored} if now.get(name) != stored.get(name))
    if not other:
        return None
    shown = "; ".join(f"{name}: {_short(stored.get(name))} there, {_short(now.get(name))} now" for name in other[:6])
    return (
        f"`resume={str(folder)!r}` holds checkpoints of a fit with other settings or data ({shown}). Give the same "
        "call, or another folder."
    )


def _flattened(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names, such as ``recipe.learning_rate``."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= _flattened(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
