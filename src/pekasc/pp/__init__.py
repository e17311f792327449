"""Preprocessing: tiles around observations, folds by group."""

from __future__ import annotations

from pekasc.pp._split import split
from pekasc.pp._tile import tile

__all__ = ["split", "tile"]
