"""Warnings that point to the line of the user's own code, however deep in the package they arise."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

_OURS = (str(Path(__file__).parent), contextlib.__file__)  # blocks of `with` go through contextlib


def warn_user(message: str) -> None:
    """Warn the user, at the first line above this call that is not the package's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
