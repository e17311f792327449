"""What a fit has finished so far, in a folder that a later run of the same call goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from pekasc.models.runtime import processes, write_array, write_json

_SETTINGS = "settings.json"
_LOCK = "in-use.lock"
_WHAT = "The state of the fit"


class Resume:
    """Finished pieces of one fit; without a folder nothing is kept.

    Parameters
    ----------
    folder
        Made if it is not there.
    settings
        Plain facts that decide the result, and digests of the data: a folder of others is refused.

    Raises
    ------
    ValueError
        If the folder holds the state of other settings, or something else.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = folder
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
        """Keep other runs out of the folder.

        Raises
        ------
        ValueError
            If another one is in it.
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
            problem = processes.broadcast(problem)
            if problem is not None:
                raise ValueError(problem)
            yield

    def folder(self, name: str) -> Path | None:
        """Return the folder of a piece."""
        return None if self.path is None else self.path / name

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return an array that an earlier run left, mapped from its file; else make it and leave it."""
        if self.path is None:
            return make()
        there = processes.broadcast((self.path / f"{name}.npy").exists())
        return self.finished(name) if there else self.put(name, make())

    def put(self, name: str, values: np.ndarray) -> np.ndarray:
        """Leave an array, in place of an earlier one; return it, mapped from its file."""
        if self.path is None:
            return values
        with processes.raise_together():
            if processes.rank() == 0:
                write_array(self.path / f"{name}.npy", values, _WHAT)
        return self.finished(name)

    def finished(self, name: str) -> np.ndarray:
        """Return an array that an earlier run left.

        Raises
        ------
        ValueError
            If it is gone or damaged: the weights that it was made with are gone, too.
        """
        assert self.path is not None  # for the type checker: there was an earlier run
        file = self.path / f"{name}.npy"
        if not file.exists():
            raise ValueError(self._damaged(f"{name}.npy is missing"))
        try:
            return np.load(file, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(self._damaged(f"{name}.npy cannot be read ({error})")) from error

    def _damaged(self, what: str) -> str:
        return f"`resume={str(self.path)!r}` is damaged: {what}. Delete the folder."

    def facts(self, name: str) -> Any:
        """Return plain facts that an earlier run left, or None."""
        if self.path is None:
            return None
        file = self.path / f"{name}.json"
        try:
            return processes.broadcast(json.loads(file.read_text()) if file.exists() else None)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(self._damaged(f"{name}.json is no JSON ({error})")) from error

    def leave(self, name: str, facts: Any) -> None:
        """Leave plain facts for a later run."""
        if self.path is None:
            return
        with processes.raise_together():
            if processes.rank() == 0:
                write_json(self.path / f"{name}.json", facts, _WHAT)


def _check(folder: Path, now: dict[str, Any]) -> str | None:
    """Return what is wrong with a folder, or None; an empty one is marked as this fit's."""
    if folder.exists() and not folder.is_dir():
        return f"`resume={str(folder)!r}` is a file: give a folder."
    file = folder / _SETTINGS
    if not file.exists():
        if folder.exists() and any(not p.name.startswith(f".{_SETTINGS}.") for p in folder.iterdir()):
            return (
                f"`resume={str(folder)!r}` is there and holds no state of a fit ({_SETTINGS} is missing): give a "
                "folder of its own."
            )
        write_json(file, now, _WHAT, indent=1)
        return None
    try:
        stored = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"`resume={str(folder)!r}` is damaged: {_SETTINGS} is no JSON ({error}). Delete the folder."
    now, stored = _leaves(now), _leaves(stored)
    other = sorted(name for name in {*now, *stored} if now.get(name) != stored.get(name))
    if not other:
        return None
    shown = "; ".join(f"{name}: {_short(stored.get(name))} there, {_short(now.get(name))} now" for name in other[:6])
    return (
        f"`resume={str(folder)!r}` holds the state of a fit with other settings or data ({shown}). Give the same "
        "call, or another folder."
    )


def _leaves(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings by path, such as ``recipe.learning_rate``."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= _leaves(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
