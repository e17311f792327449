"""Some of many, evenly spaced: what is enough to measure on, the same in every run."""

from __future__ import annotations

import numpy as np


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """Return at most `most` of the indices from 0 to `n` - 1, evenly spaced, ascending, (k,) int64."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
