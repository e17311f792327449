"""What a head is fitted on and judged by: the two sides of an inner fold."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Split(Protocol):
    """Training and held-out spots, as positions among all training spots."""

    @property
    def train(self) -> np.ndarray:
        """Positions of the spots that are trained on."""
        ...

    @property
    def held_out(self) -> np.ndarray:
        """Positions of the spots that are held out."""
        ...
