"""Inner folds, on which everything is chosen inside the training data: held-out groups, or contiguous tissue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from sklearn.model_selection import GroupKFold

from pekasc._settings import get_logger

logger = get_logger(__name__)

MAX_FOLDS = 3


@dataclass(frozen=True)
class InnerFold:
    """Training and held-out spots of one inner fold.

    Parameters
    ----------
    train, held_out
        Indices among all training spots, sorted.
    name
        Names of the held-out groups, for logs and history.
    """

    train: np.ndarray
    held_out: np.ndarray
    name: str


def inner_folds(groups: np.ndarray, coords_um: np.ndarray, sections: np.ndarray, margin_um: float) -> list[InnerFold]:
    """Return at most three folds: leave-groups-out, or contiguous blocks of tissue if there is one group.

    Parameters
    ----------
    groups
        Group of every training spot (patient, donor, section), shape (n,).
    coords_um
        Position within the section in um, shape (n, 2).
    sections
        Section of every spot, shape (n,).
    margin_um
        Training spots closer than this to a held-out spot of the same section are left out, so that no held-out tile
        overlaps a training tile.

    Raises
    ------
    ValueError
        If there are too few spots to hold any out.
    """
    names = np.unique(groups)
    if len(names) > 1:
        n_folds = min(MAX_FOLDS, len(names))
        splits = GroupKFold(n_folds).split(np.zeros(len(groups)), groups=groups)
        folds = [
            InnerFold(
                _away(train, held_out, coords_um, sections, margin_um),
                held_out,
                "+".join(str(g) for g in np.unique(groups[held_out])),
            )
            for train, held_out in splits
        ]
    else:
        folds = _blocks(coords_um, sections, margin_um)
    short = [fold.name for fold in folds if len(fold.train) < 10 or len(fold.held_out) < 2]
    if short or not folds:
        raise ValueError(
            f"Too few training spots to choose anything on held-out ones: {len(groups)} spots in {len(names)} group(s) "
            f"leave too few in fold(s) {short}. Training spots within {margin_um:.4g} um of held-out ones (the "
            "diagonal of the largest tile) are left out. Give more spots or sections, other `groups=` or smaller tiles."
        )
    return sorted(folds, key=lambda fold: fold.name)


def _away(
    train: np.ndarray, held_out: np.ndarray, coords_um: np.ndarray, sections: np.ndarray, margin_um: float
) -> np.ndarray:
    """Return the training spots that are at least `margin_um` from every held-out spot of the same section."""
    keep = np.ones(len(train), dtype=bool)
    for section in np.intersect1d(sections[train], sections[held_out]):
        inside = held_out[sections[held_out] == section]
        rest = np.flatnonzero(sections[train] == section)
        keep[rest] = cKDTree(coords_um[inside]).query(coords_um[train[rest]])[0] >= margin_um
    return train[keep]


def _blocks(coords_um: np.ndarray, sections: np.ndarray, margin_um: float) -> list[InnerFold]:
    """Cut every section along its longest axis into bands with equal numbers of spots, with a margin between them."""
    band = np.empty(len(coords_um), dtype=np.int64)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        centred = coords_um[rows] - coords_um[rows].mean(axis=0)
        axis = np.linalg.svd(centred, full_matrices=False)[2][0]
        # the sign of a singular vector depends on the order of rows: fix it, so that the numbering does not
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        rank = np.argsort(np.argsort(centred @ axis, kind="stable"), kind="stable")
        band[rows] = rank * MAX_FOLDS // len(rows)
    folds = []
    for i in range(MAX_FOLDS):
        held_out = np.flatnonzero(band == i)
        train = _away(np.flatnonzero(band != i), held_out, coords_um, sections, margin_um)
        folds.append(InnerFold(train, held_out, f"block{i + 1}"))
    logger.info("One training group: settings are chosen on %d contiguous blocks of its tissue.", MAX_FOLDS)
    return folds
