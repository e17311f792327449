"""Spatial context: what the tissue around a spot looks like, as further features. Pure arrays."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from pekasc._settings import get_logger
from pekasc.models.heads._split import Split

logger = get_logger(__name__)


def neighbour_means(
    coords_um: np.ndarray, sections: np.ndarray, radius_um: float, *, include_self: bool = False
) -> sparse.csr_matrix:
    """Return the matrix that averages over the neighbours within `radius_um` of the same section.

    A spot without neighbours is its own: its context says nothing new, and no number is made up.

    Parameters
    ----------
    coords_um
        Positions in their section in um, shape (n, 2).
    sections
        Section of every spot, shape (n,).
    radius_um
        Radius in um; centres on the circle count.
    include_self
        Whether a spot is among its neighbours.

    Returns
    -------
    Shape (n, n), rows sum to 1.
    """
    rows, columns = [], []
    for section in np.unique(sections):
        at = np.flatnonzero(sections == section)
        # a pitch that is stored as 199.99 or 200.01 um is meant to be on the circle
        pairs = cKDTree(coords_um[at]).query_pairs(radius_um * (1 + 1e-3), output_type="ndarray")
        rows += [at[pairs[:, 0]], at[pairs[:, 1]]]
        columns += [at[pairs[:, 1]], at[pairs[:, 0]]]
    i, j = np.concatenate(rows), np.concatenate(columns)
    n = len(coords_um)
    alone = np.arange(n) if include_self else np.setdiff1d(np.arange(n), i)
    i, j = np.concatenate([i, alone]), np.concatenate([j, alone])
    degree = np.bincount(i, minlength=n)
    return sparse.csr_matrix((1 / degree[i], (i, j)), shape=(n, n))


def check_radius(coords_um: np.ndarray, sections: np.ndarray, radius_um: float | None) -> None:
    """Check that a radius finds neighbours.

    Raises
    ------
    ValueError
        If no spot has any within it.
    """
    if radius_um is None:
        return
    nearest = np.full(len(coords_um), np.inf)
    for section in np.unique(sections):
        at = np.flatnonzero(sections == section)
        if at.size > 1:
            nearest[at] = cKDTree(coords_um[at]).query(coords_um[at], k=2)[0][:, 1]
    alone = int((nearest > radius_um * (1 + 1e-3)).sum())
    known = nearest[np.isfinite(nearest)]
    away = f"the nearest neighbour is {np.median(known):.4g} um away in the median" if known.size else "none has any"
    if alone == len(coords_um):
        raise ValueError(
            f"`context_um={radius_um:g}`: no spot has a neighbour within it; {away}. Give a larger radius in "
            "micrometers, or None."
        )
    if alone > len(coords_um) / 2:
        logger.warning(
            "context_um=%g: %d of %d spots have no neighbour within it, and no context; %s.",
            radius_um, alone, len(coords_um), away,
        )  # fmt: skip


def with_context(
    features: np.ndarray,
    coords_um: np.ndarray,
    sections: np.ndarray,
    radius_um: float | None,
    fold: Split | None = None,
) -> np.ndarray:
    """Return the features beside the mean features of the neighbours, (n, 2 * d) float32; unchanged without a radius.

    Parameters
    ----------
    features
        Shape (n, d).
    coords_um, sections, radius_um
        See :func:`neighbour_means`.
    fold
        Where a fold cuts sections, neighbours are those on a spot's own side of it: held-out tissue is as unseen from
        the training side as that of another section.
    """
    if radius_um is None:
        return features
    if fold is not None:
        side = np.zeros(len(sections), dtype=np.int64)  # the margin between the sides
        side[fold.train], side[fold.held_out] = 1, 2
        sections = 3 * np.unique(sections, return_inverse=True)[1] + side
    mean = neighbour_means(coords_um, sections, radius_um) @ features
    return np.concatenate([features, mean.astype(np.float32)], axis=1)
