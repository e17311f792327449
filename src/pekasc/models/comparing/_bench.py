"""What a comparison is made on: all spots with their folds, and a fold with its genes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pekasc._ceiling import noise_ceiling
from pekasc._expression import Matrix
from pekasc.models.comparing._fold import Fold
from pekasc.models.teachers import TeacherModel
from pekasc.tiling import TileSource, TileSpec


@dataclass(frozen=True)
class Bench:
    """All spots of a comparison, with its folds and teacher.

    Parameters
    ----------
    tiles
        The tiles, and those of wider fields of view.
    spec
        Size of the tiles.
    log, counts, genes
        Log-normalised expression and counts, spots x genes, and the names of the genes.
    groups, sections, coords_um, totals
        Group, section, position and total count of every spot.
    default_groups
        Whether the groups were chosen by default.
    folds
        Training and test spots by name of the fold.
    leaky
        Folds with spots of one section, patient or group in training and in test.
    teacher
        Name of the teacher.
    make_teacher
        Function from the indices of the expressed genes and a seed to the teacher; None if no method needs one.
    draws
        Whether the teacher depends on the seed.
    teacher_fingerprint, tiles_fingerprint, fingerprint
        Fingerprint of the stored embedding, of the tiles, and of everything else.
    """

    tiles: Sequence[TileSource]
    spec: TileSpec
    log: Matrix
    counts: Matrix
    genes: list[str]
    groups: np.ndarray
    sections: np.ndarray
    coords_um: np.ndarray
    totals: np.ndarray
    default_groups: bool
    folds: Mapping[str, tuple[np.ndarray, np.ndarray]]
    leaky: frozenset[str]
    teacher: str
    make_teacher: Callable[[np.ndarray, int], TeacherModel] | None
    draws: bool
    teacher_fingerprint: str
    tiles_fingerprint: str
    fingerprint: str


@dataclass(frozen=True)
class FoldGenes:
    """A fold with its gene sets, and the expression of its test spots.

    Parameters
    ----------
    fold
        The fold.
    sets
        Gene sets by name, as indices among the predicted genes.
    measured
        The target of the test spots, (test spots, predicted genes).
    expressed
        Indices, among all genes, of those that a teacher is fitted on.
    counts, totals
        Counts, (test spots, predicted genes), and totals, (test spots,), that the target is log1p of; counts are None
        if it is something else.
    """

    fold: Fold
    sets: dict[str, np.ndarray]
    measured: np.ndarray
    expressed: np.ndarray
    counts: Matrix | None
    totals: np.ndarray

    def ceilings(self, at: np.ndarray) -> np.ndarray:
        """Return the noise ceilings of the predicted genes on some of the test spots, (genes,); NaN without counts."""
        if self.counts is None:
            return np.full(self.measured.shape[1], np.nan)
        return noise_ceiling(self.counts[at], self.totals[at])
