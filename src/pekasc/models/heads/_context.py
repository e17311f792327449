"""Spatial context: mean features of the neighbours as additional features. Pure arrays."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from pekasc._settings import get_logger
from pekasc.models.heads._split import Split

logger = get_logger(__name__)

_OFF_LATTICE = 0.25  # of the pitch
_ON_LATTICE = 0.9  # of all pairs of neighbours
_COLUMNS = 128
_COARSE = 0.5  # of the training pitch: a finer grid has a tile near every place of the lattice
_SAME_PITCH = 0.02


def neighbour_means(coords_um: np.ndarray, sections: np.ndarray, radius_um: float) -> sparse.csr_matrix:
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
    return _means(np.concatenate(rows), np.concatenate(columns), len(coords_um))


def _means(i: np.ndarray, j: np.ndarray, n: int) -> sparse.csr_matrix:
    """Return the matrix that averages, for every row in `i`, over its columns in `j`; one without any, over itself."""
    alone = np.setdiff1d(np.arange(n), i)
    i, j = np.concatenate([i, alone]), np.concatenate([j, alone])
    degree = np.bincount(i, minlength=n)
    return sparse.csr_matrix((1 / degree[i], (i, j)), shape=(n, n))


def _nearest_um(coords_um: np.ndarray, sections: np.ndarray) -> np.ndarray:
    """Return the distance to the nearest neighbour in the same section, (n,); infinite for a spot alone in it."""
    nearest = np.full(len(coords_um), np.inf)
    for section in np.unique(sections):
        at = np.flatnonzero(sections == section)
        if at.size > 1:
            nearest[at] = cKDTree(coords_um[at]).query(coords_um[at], k=2)[0][:, 1]
    return nearest


def pitch_um(coords_um: np.ndarray, sections: np.ndarray) -> float:
    """Return the median distance to the nearest neighbour in the same section; NaN where no spot has one."""
    nearest = _nearest_um(coords_um, sections)
    known = nearest[np.isfinite(nearest)]
    return float(np.median(known)) if known.size else float("nan")


def coarse_stride(coords_um: np.ndarray, pitch: float | None, radius_um: float | None) -> str | None:
    """Say of tiles of one section that they are too far apart for the places of neighbours, else None.

    Parameters
    ----------
    coords_um
        Centres of the tiles, (n, 2).
    pitch
        Distance between training spots.
    radius_um
        Radius of the spatial context.
    """
    if radius_um is None or pitch is None:
        return None
    stride = pitch_um(coords_um, np.zeros(len(coords_um)))
    if not stride > _COARSE * (1 + _SAME_PITCH) * pitch or abs(stride / pitch - 1) <= _SAME_PITCH:
        return None
    return (
        f"are {stride:.4g} um apart, and the training spots, whose neighbours within {radius_um:g} um are the head's "
        f"context, {pitch:.4g} um: places of neighbours are off by up to {stride / np.sqrt(2):.3g} um. A stride of at "
        f"most {_COARSE * pitch:.4g} um, or of {pitch:.4g}, is better."
    )


def lattice_offsets(coords_um: np.ndarray, sections: np.ndarray, radius_um: float) -> np.ndarray | None:
    """Return the offsets of a spot's neighbours within a radius on the lattice of the largest section, (m, 2) in um.

    None where spots lie on no lattice, such as cells.
    """
    names, counts = np.unique(sections, return_counts=True)
    at = np.flatnonzero(sections == names[np.argmax(counts)])
    pitch = pitch_um(coords_um[at], sections[at])
    tree = cKDTree(coords_um[at])
    pairs = tree.query_pairs(radius_um * (1 + 1e-3), output_type="ndarray")
    if not len(pairs):
        return None
    steps = coords_um[at][pairs[:, 1]] - coords_um[at][pairs[:, 0]]
    steps = np.concatenate([steps, -steps])
    # the spot with most neighbours has all of the lattice around it
    i = int(np.bincount(pairs.ravel()).argmax())
    around = np.setdiff1d(tree.query_ball_point(coords_um[at][i], radius_um * (1 + 1e-3)), i)
    seeds = coords_um[at][around] - coords_um[at][i]
    distance, nearest = cKDTree(seeds).query(steps)
    close = distance < _OFF_LATTICE * pitch
    if close.mean() < _ON_LATTICE:
        return None
    return np.array([steps[close & (nearest == k)].mean(axis=0) for k in range(len(seeds))])


def offset_means(
    coords_um: np.ndarray, sections: np.ndarray, offsets_um: np.ndarray, tolerance_um: float
) -> sparse.csr_matrix:
    """Return the matrix that averages, for every tile, over the tiles nearest to given offsets from it.

    However dense a grid of tiles is, a tile's context is then what a training spot's was: the mean over the places of
    the training lattice. Places without a tile within the tolerance are left out, as at the edge of a section; the tile
    itself does not count; a tile without any is its own context.

    Parameters
    ----------
    coords_um, sections
        See :func:`neighbour_means`.
    offsets_um
        Offsets of the training lattice, (m, 2).
    tolerance_um
        Largest distance between a place and its nearest tile.

    Returns
    -------
    Shape (n, n), rows sum to 1.
    """
    n = len(coords_um)
    pairs = []
    for section in np.unique(sections):
        at = np.flatnonzero(sections == section)
        tree = cKDTree(coords_um[at])
        for offset in offsets_um:
            distance, nearest = tree.query(coords_um[at] + offset, distance_upper_bound=tolerance_um)
            found = np.flatnonzero(np.isfinite(distance))
            pairs.append(at[found] * n + at[nearest[found]])
    i, j = np.divmod(np.unique(np.concatenate(pairs)), n) if pairs else np.empty((2, 0), np.int64)
    others = i != j
    return _means(i[others], j[others], n)


def check_radius(coords_um: np.ndarray, sections: np.ndarray, radius_um: float | None) -> None:
    """Check that spots have neighbours within the radius of the spatial context.

    Raises
    ------
    ValueError
        If no spot has a neighbour within it.
    """
    if radius_um is None:
        return
    nearest = _nearest_um(coords_um, sections)
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


def cuts_sections(sections: np.ndarray, fold: Split) -> bool:
    """Return whether some section has spots on two sides of a fold: training, held out, or the margin between them."""
    side = _sides(len(sections), fold)
    number = np.unique(sections, return_inverse=True)[1]
    return len(np.unique(3 * number + side)) > number.max() + 1


def _sides(n: int, fold: Split) -> np.ndarray:
    side = np.zeros(n, dtype=np.int64)  # 0: the margin between training and held-out tissue
    side[fold.train], side[fold.held_out] = 1, 2
    return side


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
        sections = 3 * np.unique(sections, return_inverse=True)[1] + _sides(len(sections), fold)
    mean, d = neighbour_means(coords_um, sections, radius_um), features.shape[1]
    out = np.empty((len(features), 2 * d), dtype=np.float32)
    out[:, :d] = features
    for start in range(0, d, _COLUMNS):  # products are in double precision, and few at a time
        out[:, d + start : d + start + _COLUMNS] = mean @ features[:, start : start + _COLUMNS]
    return out
