"""What a fit is given: spots, options and heads. Pure arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pekasc._expression import Matrix
from pekasc._options import FIT_MEMORY, Compute, Readout, Recipe
from pekasc.models.runtime import Profile
from pekasc.models.training import Engine, Method
from pekasc.tiling import TileSource


@dataclass(frozen=True)
class Data:
    """Everything about the training spots, in one order; nothing else is ever looked at.

    Parameters
    ----------
    tiles
        Their tiles.
    expression
        What the head learns, spots x genes.
    genes
        Names of those genes.
    groups, sections
        Group and section of every spot.
    coords_um
        Positions in the section, (n, 2).
    further
        The same tiles at every further scale.
    mine
        Numbers of the tiles that this process has; all by default.
    """

    tiles: TileSource
    expression: Matrix
    genes: Sequence[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray
    further: Sequence[TileSource] = ()
    local: np.ndarray | None = None


@dataclass(frozen=True)
class Options:
    """How to fit: the three option objects, checked, and what was decided from them.

    Parameters
    ----------
    method
        PEFT method; None is the frozen encoder.
    recipe, readout, compute
        The option objects. Of the readout only what all heads share is read here: depth, components, scales and
        orientations.
    device
        The device of this process.
    random_state
        Seed.
    progress
        Show progress bars.
    trainer
        Arguments of :class:`lightning.Trainer`, completed.
    profile
        Collects seconds and memory.
    """

    method: Method
    recipe: Recipe
    readout: Readout
    compute: Compute
    device: torch.device
    random_state: int = 0
    progress: bool = False
    trainer: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile = field(default_factory=Profile)

    @property
    def precision(self) -> str:
        """Precision of the forward passes."""
        return self.compute.precision

    @property
    def max_memory(self) -> int:
        """Bytes for features, and as many for cached activations."""
        return self.compute.memory(FIT_MEMORY)

    @property
    def engine(self) -> Engine:
        """How trainings run."""
        c = self.compute
        return Engine(
            self.device, c.precision, self.progress, self.trainer, c.accumulate, c.gradient_checkpointing, c.compile,
            c.checkpoint_minutes,
        )  # fmt: skip


@dataclass(frozen=True)
class HeadSpec:
    """A head to be fitted, and what it reads beside the features. Several can share one training.

    Parameters
    ----------
    head
        Name of the head.
    context_um
        Radius of the spatial context in um; None without.
    beside_frozen
        Whether it reads the frozen features beside the adapted ones.
    """

    head: str = "ridge"
    context_um: float | None = None
    beside_frozen: bool = False

    @classmethod
    def from_readout(cls, readout: Readout, beside_frozen: bool = False) -> HeadSpec:
        """Return the head that a readout asks for."""
        return cls(readout.head, readout.context_um, beside_frozen)
