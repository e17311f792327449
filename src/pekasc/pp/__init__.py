"""Preprocessing: tiles around observations or on a grid, folds by group."""

from __future__ import annotations

from pekasc.pp._split import split
from pekasc.pp._tile import tile
from pekasc.pp._tile_grid import tile_grid

__all__ = ["split", "tile", "tile_grid"]
