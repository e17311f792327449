"""Interface of an inner fold: training and held-out spots."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Split(Protocol):
    """Training and held-out spots of an inner fold, as indices among all training spots."""

    @property
    def train(self) -> np.ndarray:
        """Indices of the training spots."""
        ...

    @property
    def held_out(self) -> np.ndarray:
        """Indices of the held-out spots."""
        ...
