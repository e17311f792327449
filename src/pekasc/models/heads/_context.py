"""Spatial context: mean features of the neighbours as additional features. Pure arrays."""

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
    """Return the matrix that averages over the neighbours of a spot, within `radius_um` and in the same section.

    A spot without neighbours is its own neighbour, so that its context repeats its features.

    Parameters
    ----------
    coords_um
        Positions within the section in um, shape (n, 2).
    sections
        Section of every spot, shape (n,).
    radius_um
        Radius in um; centres on the circle count as neighbours.
    include_self
        Whether a spot is one of its neighbours.

    Returns
    -------
    Shape (n, n), rows sum to 1.
    """
    rows, columns = [], []
    for section in np.unique(sections):
        at = np.flatnonzero(sections == section)
        # a pitch stored as 200.01 um should still be within a radius of 200 um
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
    """Check that spots have neighbours within the radius of the spatial context.

    Raises
    ------
    ValueError
        If no spot has a neighbour within it.
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
    """Concatenate features with the mean features of the neighbours, (n, 2 * d) float32.

    Parameters
    ----------
    features
        Shape (n, d).
    coords_um, sections
        See :func:`neighbour_means`.
    radius_um
        Radius in um; None returns the features unchanged.
    fold
        An inner fold: training spots have only training neighbours, and held-out spots only held-out ones, so that no
        feature leaks between them.
    """
    if radius_um is None:
        return features
    if fold is not None:
        side = np.zeros(len(sections), dtype=np.int64)  # 0: the margin between training and held-out tissue
        side[fold.train], side[fold.held_out] = 1, 2
        sections = 3 * np.unique(sections, return_inverse=True)[1] + side
    mean = neighbour_means(coords_um, sections, radius_um) @ features
    return np.concatenate([features, mean.astype(np.float32)], axis=1)
