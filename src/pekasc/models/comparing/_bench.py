"""What a comparison is made on: all spots with their folds, and a fold with its genes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pekasc._ceiling import noise_ceiling
from pekasc._digests import fingerprint
from pekasc._expression import Matrix
from pekasc._sections import stain_of
from pekasc.models.comparing._fold import Fold
from pekasc.models.teachers import TeacherModel
from pekasc.tiling import Stain, StainedTiles, StainMap, TileSource, TileSpec, mean_stain


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
    stain, coarse
        Method of the stain map, and all tiles at about 8 um per pixel, (n, side, side, 3) uint8, on which colours are
        measured; None takes tiles as they are.
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
    stain: str | None = None
    coarse: np.ndarray | None = None

    def stained(self, fold: str) -> tuple[Sequence[TileSource], str]:
        """Return the tiles as a fold reads them, and a fingerprint of their stain maps, "" without.

        The reference is the mean of the training sections. The colours of a section are measured on its spots of one
        side of the fold, so that training tiles do not depend on test spots, even where a fold cuts a section.
        """
        if self.stain is None or self.coarse is None:
            return self.tiles, ""
        which = np.full(self.sections.size, -1)
        own: list[Stain] = []
        train, test = self.folds[fold]
        for side, at in (("training", train), ("test", test)):
            for name in np.unique(self.sections[at]):
                rows = at[self.sections[at] == name]
                which[rows] = len(own)
                where = f"Fold {fold!r}, section {str(name)!r} ({rows.size} {side} spots)"
                own.append(stain_of(self.coarse[rows], self.stain, where))
        reference = mean_stain(own[: np.unique(self.sections[train]).size])
        maps = [StainMap(stain, reference) for stain in own]
        return [StainedTiles(source, maps, which) for source in self.tiles], fingerprint(
            [each.digest for each in maps], which
        )


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
    stain
        Fingerprint of the stain maps of the fold; "" where tiles are taken as they are.
    """

    fold: Fold
    sets: dict[str, np.ndarray]
    measured: np.ndarray
    expressed: np.ndarray
    counts: Matrix | None
    totals: np.ndarray
    stain: str = ""

    def ceilings(self, at: np.ndarray) -> np.ndarray:
        """Return the noise ceilings of the predicted genes on some of the test spots, (genes,); NaN without counts."""
        if self.counts is None:
            return np.full(self.measured.shape[1], np.nan)
        return noise_ceiling(self.counts[at], self.totals[at])
