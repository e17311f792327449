"""Choose the range, every gene's nugget, and whether it is pulled at all, on held-out blocks of spots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from pekasc._sample import evenly_spaced
from pekasc.models.kriging._kriging import Kriging, System, window_centres, window_spots

LEAST_SPOTS = 25
NUGGETS = np.array([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
RANGES = (1.5, 3.0, 6.0, 12.0)  # in pitches
_BLOCK = 3  # side of a block, in pitches
_FOLDS = 5
_WINDOWS = 3  # of a large section, on which is chosen


class TooFewSpots(ValueError):
    """There are too few spots to hold any out."""


@dataclass(frozen=True, eq=False)
class _Fold:
    """Spots of a fold: sorted indices, and the block of every held-out one."""

    train: np.ndarray
    held_out: np.ndarray
    block: np.ndarray


def fit_kriging(
    coords_um: np.ndarray, residuals: np.ndarray, noise: np.ndarray, counting: np.ndarray | None = None
) -> Kriging:
    """Return residuals to interpolate, with range, nuggets and offsets by the error on held-out blocks of spots.

    All genes share the range; each has its nugget. Blocks are squares of three times the distance between spots. A gene
    is left alone unless the error of its held-out blocks falls by more than its standard error.

    Parameters
    ----------
    coords_um
        Positions in um, (n, 2).
    residuals
        Measured less predicted values, (n, genes).
    noise
        Relative variance of the noise of every spot, (n,), above 0.
    counting
        Variance of counting noise in the residuals, (n, genes): the deviation is then that of the error about what
        would be measured without it. None: nothing is known of it, and the deviation is that of a measurement.

    Raises
    ------
    TooFewSpots
        If there are fewer than :data:`LEAST_SPOTS`, most share their position, or no block can be held out.
    """
    pitch = _pitch(coords_um)
    residuals = np.asarray(residuals, dtype=np.float32)
    noise = np.asarray(noise, dtype=np.float64)
    folds = [fold for part in _on_which(coords_um) for fold in _folds(coords_um, part, pitch)]
    if len(folds) < 2:
        raise TooFewSpots(f"no block of {_BLOCK * pitch:.4g} um can be held out from the others")
    none, offset_alone, errors = _errors(coords_um, residuals, noise, folds, pitch)
    of_range, nugget = _chosen(none, offset_alone, errors)
    range_um = RANGES[of_range] * pitch
    gain, gain_se, errors_left = _judged(coords_um, residuals, noise, folds, range_um, nugget, counting)
    pulled = gain > gain_se
    nugget = np.where(pulled, nugget, np.inf)
    mean = _means(residuals, noise)
    return Kriging(
        np.asarray(coords_um, dtype=np.float64), residuals, noise, float(range_um), nugget,
        np.where(pulled, mean, 0.0), np.sqrt(np.where(np.isfinite(nugget), errors_left[0], 0.0)),
        np.sqrt(np.where(np.isfinite(nugget), errors_left[1], np.where(pulled, errors_left[2], errors_left[3]))),
    )  # fmt: skip


def _pitch(coords_um: np.ndarray) -> float:
    """Return the median distance between neighbours."""
    if len(coords_um) < LEAST_SPOTS:
        raise TooFewSpots(f"kriging needs at least {LEAST_SPOTS} spots")
    pitch = float(np.median(cKDTree(coords_um).query(coords_um, k=2)[0][:, 1]))
    if not pitch > 0:
        raise TooFewSpots("more than half of the spots share their position with another")
    return pitch


def _on_which(coords_um: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the spots that settings are chosen on: all, or some windows of a large section."""
    centres, tree = window_centres(coords_um), cKDTree(coords_um)
    for at in evenly_spaced(len(centres), _WINDOWS):
        yield window_spots(tree, centres[at])


def _folds(coords_um: np.ndarray, spots: np.ndarray, pitch: float) -> Iterator[_Fold]:
    """Yield folds of square blocks, of which no two neighbours are in the same."""
    local = coords_um[spots]
    # half a spot off, so that no rounding decides between two blocks
    col, row = np.floor((local - local.min(axis=0) + pitch / 2) / (_BLOCK * pitch)).astype(int).T
    fold = (col + 2 * row) % _FOLDS
    block = np.unique(np.stack([col, row]), axis=1, return_inverse=True)[1].ravel()
    for number in range(_FOLDS):
        held_out = fold == number
        if held_out.any() and not held_out.all():
            yield _Fold(spots[~held_out], spots[held_out], block[held_out])


def _means(residuals: np.ndarray, noise: np.ndarray) -> np.ndarray:
    weights = 1 / noise
    return np.asarray(weights @ residuals / weights.sum())


def _errors(
    coords_um: np.ndarray, residuals: np.ndarray, noise: np.ndarray, folds: list[_Fold], pitch: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return squared errors on held-out spots, weighted by their depth: without pull, with the offset alone, and all.

    The last are (ranges, nuggets, genes).
    """
    n_genes = residuals.shape[1]
    none, offset_alone = np.zeros(n_genes), np.zeros(n_genes)
    errors = np.zeros((len(RANGES), NUGGETS.size, n_genes))
    for fold in folds:
        weights = 1 / noise[fold.held_out]
        mean = _means(residuals[fold.train], noise[fold.train]).astype(np.float32)
        truth = residuals[fold.held_out]
        none += weights @ np.square(truth)
        offset_alone += weights @ np.square(truth - mean)
        for i, pitches in enumerate(RANGES):
            system = System.of(coords_um[fold.train], noise[fold.train], pitches * pitch)
            z, components = system.places(coords_um[fold.held_out]), system.scaled.T @ (residuals[fold.train] - mean)
            for j, column in enumerate(system.inverse(NUGGETS).T):
                errors[i, j] += weights @ np.square(truth - mean - (z * column) @ components)
    return none, offset_alone, errors


def _chosen(none: np.ndarray, offset_alone: np.ndarray, errors: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the range, by its place, and every gene's nugget: infinite where the offset alone is best."""
    known = none > 0
    least = np.minimum(errors.min(axis=1), offset_alone)
    relative = np.minimum(least[:, known] / none[known], 1)
    at = int(relative.mean(axis=1).argmin()) if known.any() else 0
    nugget = NUGGETS[errors[at].argmin(axis=0)]
    return at, np.where(errors[at].min(axis=0) < offset_alone, nugget, np.inf)


def _judged(
    coords_um: np.ndarray, residuals: np.ndarray, noise: np.ndarray, folds: list[_Fold], range_um: float,
    nugget: np.ndarray, counting: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return the gain of a pull on held-out blocks and its standard error, (genes,), and the variance of errors.

    The variances are such that those of held-out errors, less counting noise, are in the mean what they say: that of
    the process, which the spots know in part, and the same everywhere beside it, at a finite nugget; the same
    everywhere with the offset alone, and without a pull, (4, genes).
    """
    n_genes = residuals.shape[1]
    gains = []
    process, unknown, pulled, plain, counted = np.zeros((5, n_genes))
    finite = np.where(np.isfinite(nugget), nugget, 0.0)
    total, n_held_out = 0.0, 0
    for fold in folds:
        weights = 1 / noise[fold.held_out]
        mean = _means(residuals[fold.train], noise[fold.train]).astype(np.float32)
        truth = residuals[fold.held_out]
        system = System.of(coords_um[fold.train], noise[fold.train], range_um)
        z = system.places(coords_um[fold.held_out])
        components = system.scaled.T @ (residuals[fold.train] - mean)
        error = truth - mean - z @ (components * system.inverse(nugget))
        left = 1 - np.minimum(np.square(z) @ system.inverse(nugget), 1)
        process += weights @ (np.square(error) / (left + finite * noise[fold.held_out, None]))
        unknown += weights @ left
        pulled += weights @ np.square(error)
        plain += weights @ np.square(truth)
        if counting is not None:
            counted += weights @ counting[fold.held_out]
        total += weights.sum()
        n_held_out += fold.held_out.size
        gain = weights[:, None] * (np.square(truth) - np.square(error))
        order = np.argsort(fold.block, kind="stable")
        starts = np.unique(fold.block[order], return_index=True)[1]
        gains.append(np.add.reduceat(gain[order], starts, axis=0))
    by_block = np.concatenate(gains)
    n = len(by_block)
    # no variance is known to be smaller than the standard error of its estimate
    least = np.sqrt(2 / n_held_out)
    of_pulled, of_plain = (np.maximum(found - counted, least * found) / total for found in (pulled, plain))
    unknown /= total
    process = np.minimum(process / total, of_pulled / np.maximum(unknown, 1e-6))
    variances = np.stack([process, np.maximum(of_pulled - process * unknown, 0), of_pulled, of_plain])
    return by_block.sum(axis=0), by_block.std(axis=0, ddof=1) * np.sqrt(n), variances
