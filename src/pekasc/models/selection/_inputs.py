"""Inputs of a fit: training spots, options and heads. Pure arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pekasc._expression import Matrix, spot_weights
from pekasc._options import FIT_MEMORY, Compute, Readout, Recipe
from pekasc._panels import Panels
from pekasc.models.runtime import Profile
from pekasc.models.training import Engine, Method
from pekasc.tiling import TileSource

MEMBERS = ("frozen:low-rank", "adapted:ridge", "adapted:low-rank")  # of a blend, by default


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
        Tiles of the wider fields of view, around the same centres.
    local
        Indices of the tiles of this process; all by default.
    every
        Expression of all expressed genes, spots x all genes, whose components a low-rank head predicts; by default
        `expression`.
    totals
        Total count of every spot, (n,), which sets its weight in a low-rank head; None weighs all alike.
    counts
        Whether the target is log1p(1e4 * count / total), or values as stored. None keeps nothing of what was predicted
        for held-out groups, as where methods are compared.
    panels
        Which spots measured which of the genes; None: all measured all. `expression` is 0 where a gene was not
        measured, and all of `every` were measured in all spots.
    """

    tiles: TileSource
    expression: Matrix
    genes: Sequence[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray
    further: Sequence[TileSource] = ()
    local: np.ndarray | None = None
    every: Matrix | None = None
    totals: np.ndarray | None = None
    counts: bool | None = None
    panels: Panels | None = None

    @cached_property
    def weights(self) -> np.ndarray | None:
        """Weight of every spot for a low-rank head, (n,)."""
        return None if self.totals is None else spot_weights(self.totals)

    def take(self, rows: np.ndarray, tiles: TileSource, further: Sequence[TileSource] = ()) -> Data:
        """Return some of the spots, whose tiles are given."""
        return Data(
            tiles,
            self.expression[rows],
            self.genes,
            self.groups[rows],
            self.sections[rows],
            self.coords_um[rows],
            further,
            every=None if self.every is None else self.every[rows],
            totals=None if self.totals is None else self.totals[rows],
            panels=None if self.panels is None else self.panels.take(rows),
        )


@dataclass(frozen=True)
class Options:
    """Resolved options of a fit.

    Parameters
    ----------
    method
        PEFT method; None is the frozen encoder.
    recipe, readout, compute
        The option objects. Of the readout, only the fields that all heads share are used: depth and orientations.
    fields_um
        Widths of the fields of view beyond the tile in um, those of ``Data.further``.
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
    fields_um: tuple[float, ...] = ()
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
    """A reading to fit. Several can share one training.

    Parameters
    ----------
    readout
        The option object; its fields of view are those of the data.
    beside_frozen
        Whether the frozen features are concatenated with adapted ones.
    """

    readout: Readout = field(default_factory=lambda: Readout.preset("ridge"))
    beside_frozen: bool = False

    def names(self, *, adapted: bool) -> list[str]:
        """Return network and head of every member; without an adapter, only the frozen ones of a blend are left."""
        if self.readout.head != "blend":
            return [f"{'adapted' if adapted else 'frozen'}:{self.readout.head}"]
        names = list(self.readout.members or MEMBERS)
        return names if adapted else [name for name in names if name.startswith("frozen:")]
