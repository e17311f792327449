"""Inputs of a fit: training spots, options and heads. Pure arrays."""

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
    """The training spots, all arrays in the same order.

    Parameters
    ----------
    tiles
        The tiles.
    expression
        Target of the head, spots x genes.
    genes
        Names of the genes.
    groups, sections
        Group and section of every spot.
    coords_um
        Positions within the section in um, (n, 2).
    further
        The same tiles at the other scales.
    local
        Indices of the tiles of this process; all by default.
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
    """Resolved options of a fit.

    Parameters
    ----------
    method
        PEFT method; None is the frozen encoder.
    recipe, readout, compute
        The option objects. Of the readout, only the fields that all heads share are used: depth, components, scales and
        orientations.
    device
        Device of this process.
    random_state
        Seed.
    progress
        Show progress bars.
    trainer
        Arguments of :class:`lightning.Trainer`, with devices filled in.
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
        """Bytes of memory for features, and as many for cached activations."""
        return self.compute.memory(FIT_MEMORY)

    @property
    def engine(self) -> Engine:
        """Settings of the trainings that do not change results."""
        c = self.compute
        return Engine(
            self.device, c.precision, self.progress, self.trainer, c.accumulate, c.gradient_checkpointing, c.compile,
            c.checkpoint_minutes,
        )  # fmt: skip


@dataclass(frozen=True)
class HeadSpec:
    """A head to fit, and its inputs in addition to the features. Several heads can share one training.

    Parameters
    ----------
    head
        Name of the head.
    context_um
        Radius of the spatial context in um; None without context.
    beside_frozen
        Whether frozen and adapted features are concatenated.
    """

    head: str = "ridge"
    context_um: float | None = None
    beside_frozen: bool = False

    @classmethod
    def from_readout(cls, readout: Readout, beside_frozen: bool = False) -> HeadSpec:
        """Return the head of a readout."""
        return cls(readout.head, readout.context_um, beside_frozen)
