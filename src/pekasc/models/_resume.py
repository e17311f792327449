"""What a fit has finished so far, in a folder that a later run of the same call goes on from."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pekasc.models import _ranks

_SETTINGS = "settings.json"


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
        mine = json.loads(json.dumps(dict(settings)))
        problem = None
        if _ranks.rank() == 0:
            problem = _check(folder, mine)
        problem = _ranks.agreed(problem)
        if problem is not None:
            raise ValueError(problem)

    def folder(self, name: str) -> Path | None:
        """Return the folder of a piece."""
        return None if self.path is None else self.path / name

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return an array that an earlier run left, mapped from its file; else make it and leave it."""
        if self.path is None:
            return make()
        file = self.path / f"{name}.npy"
        if not _ranks.agreed(file.exists()):
            values = make()
            if _ranks.rank() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".partial")
                try:
                    with partial.open("wb") as out:
                        np.save(out, values)
                    os.replace(partial, file)
                except OSError as error:
                    raise _explained(error, file) from error
            _ranks.barrier()
        return np.load(file, mmap_mode="r")

    def finished(self, name: str) -> np.ndarray:
        """Return an array that an earlier run left.

        Raises
        ------
        ValueError
            If it is gone: the weights that it was made with are, too.
        """
        assert self.path is not None  # for the type checker: there was an earlier run
        file = self.path / f"{name}.npy"
        if not file.exists():
            raise ValueError(f"`resume={str(self.path)!r}` is damaged: {name}.npy is missing. Delete the folder.")
        return np.load(file, mmap_mode="r")

    def facts(self, name: str) -> Any:
        """Return plain facts that an earlier run left, or None."""
        if self.path is None:
            return None
        file = self.path / f"{name}.json"
        return _ranks.agreed(json.loads(file.read_text()) if file.exists() else None)

    def leave(self, name: str, facts: Any) -> None:
        """Leave plain facts for a later run."""
        if self.path is None or _ranks.rank() != 0:
            return
        file = self.path / f"{name}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(facts))
            os.replace(partial, file)
        except OSError as error:
            raise _explained(error, file) from error


def _check(folder: Path, mine: dict[str, Any]) -> str | None:
    """Return what is wrong with a folder, or None; an empty one is marked as this fit's."""
    if folder.exists() and not folder.is_dir():
        return f"`resume={str(folder)!r}` is a file: give a folder."
    file = folder / _SETTINGS
    if not file.exists():
        if folder.exists() and any(p.name != f"{_SETTINGS}.partial" for p in folder.iterdir()):
            return (
                f"`resume={str(folder)!r}` is there and holds no state of a fit ({_SETTINGS} is missing): give a "
                "folder of its own."
            )
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_SETTINGS}.partial"
        partial.write_text(json.dumps(mine, indent=1))
        os.replace(partial, file)
        return None
    try:
        theirs = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"`resume={str(folder)!r}` is damaged: {_SETTINGS} is no JSON ({error}). Delete the folder."
    other = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if not other:
        return None
    shown = "; ".join(f"{name}: {_short(theirs.get(name))} there, {_short(mine.get(name))} now" for name in other[:6])
    return (
        f"`resume={str(folder)!r}` holds the state of a fit with other settings or data ({shown}). Give the same "
        "call, or another folder."
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _explained(error: OSError, file: Path) -> OSError:
    room = "No room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
    return OSError(error.errno, f"The state of the fit cannot be written to {str(file)!r}: {room}.")
