"""The one rule by which anything is chosen inside training data: hold out groups, or contiguous tissue."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from sklearn.model_selection import GroupKFold

logger = logging.getLogger(__name__)

MAX_FOLDS = 3


@dataclass(frozen=True)
class InnerFold:
    """Training and held-out spots of one inner fold, as positions among the training spots.

    Parameters
    ----------
    train, held_out
        Positions, sorted.
    name
        The held-out groups' names, for logs and history.
    """

    train: np.ndarray
    held_out: np.ndarray
    name: str


def inner_folds(groups: np.ndarray, coords_um: np.ndarray, sections: np.ndarray, margin_um: float) -> list[InnerFold]:
    """Return at most three folds: groups held out in turn, or blocks of tissue where there is one group.

    Parameters
    ----------
    groups
        Group of every training spot (patient, donor, section), shape (n,).
    coords_um
        Position in its section in um, shape (n, 2).
    sections
        Section of every spot, shape (n,).
    margin_um
        With one group: training spots nearer than this to a held-out spot of their section are left out, so
        that no held-out tile shares tissue with a training tile.

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
            InnerFold(train, held_out, "+".join(str(g) for g in np.unique(groups[held_out])))
            for train, held_out in splits
        ]
    else:
        folds = _blocks(coords_um, sections, margin_um)
    short = [fold.name for fold in folds if len(fold.train) < 10 or len(fold.held_out) < 2]
    if short or not folds:
        raise ValueError(
            f"Too few training spots to choose anything on held-out ones: {len(groups)} spots in {len(names)} group(s) "
            f"leave too few in fold(s) {short}. Give more spots or sections, or other `groups=`."
        )
    return sorted(folds, key=lambda fold: fold.name)


def _blocks(coords_um: np.ndarray, sections: np.ndarray, margin_um: float) -> list[InnerFold]:
    """Cut every section into bands of equal spot number across its longest axis, with a margin."""
    band = np.empty(len(coords_um), dtype=np.int64)
    for section in np.unique(sections):
        rows = np.flatnonzero(sections == section)
        centred = coords_um[rows] - coords_um[rows].mean(axis=0)
        axis = np.linalg.svd(centred, full_matrices=False)[2][0]
        # the sign of a singular vector follows the order of rows; the blocks' numbers must not
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        rank = np.argsort(np.argsort(centred @ axis, kind="stable"), kind="stable")
        band[rows] = rank * MAX_FOLDS // len(rows)
    folds = []
    for i in range(MAX_FOLDS):
        held_out = np.flatnonzero(band == i)
        keep = band != i
        for section in np.unique(sections):
            inside = held_out[sections[held_out] == section]
            rest = np.flatnonzero(keep & (sections == section))
            if inside.size and rest.size:
                distance = cKDTree(coords_um[inside]).query(coords_um[rest])[0]
                keep[rest[distance < margin_um]] = False
        folds.append(InnerFold(np.flatnonzero(keep), held_out, f"block{i + 1}"))
    logger.info("One training group: choices are made on %d contiguous blocks of its tissue.", MAX_FOLDS)
    return folds
