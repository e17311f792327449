"""How much the features of a tile look like those of tiles with a known fault: linear discriminants. Pure arrays.

Outlier exposure: what a distance to good tiles hardly shows, such as another pixel size, plain examples of it do.
Source: Hendrycks, Mazeika, Dietterich, Deep Anomaly Detection with Outlier Exposure, ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import solve
from sklearn.covariance import ledoit_wolf

from pekasc._sample import evenly_spaced

_MOST_TILES = 500  # good ones that they are found from: more would outweigh what is tolerated
LEAST = 1e-3  # of a limit
_LIMIT, _TOLERATED = 0.99, 0.9  # shares of held-out tiles, and of what is tolerated in them, that score below 1


@dataclass(frozen=True, eq=False)
class Examples:
    """Features of some training tiles that were given known faults.

    Parameters
    ----------
    rows
        Which of the training tiles, (k,), ascending.
    columns
        Which of their features tell faults.
    faults
        By fault, those features, (k, w).
    tolerated
        Those of the same tiles with what is no fault, (k, w) each.
    """

    rows: np.ndarray
    columns: slice
    faults: Mapping[str, np.ndarray]
    tolerated: tuple[np.ndarray, ...]

    def part(self, rows: np.ndarray) -> Examples:
        """Return those of some of the training tiles."""
        own = np.isin(self.rows, rows)
        faults = {name: x[own] for name, x in self.faults.items()}
        return replace(self, rows=self.rows[own], faults=faults, tolerated=tuple(x[own] for x in self.tolerated))


@dataclass(frozen=True, eq=False)
class Faults:
    """Scores of known faults: 0 for what training tiles look like on average.

    Parameters
    ----------
    names
        The faults.
    weights
        (faults, d) float32.
    offset
        (faults,) float32.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    offset: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the scores of tiles, (n, faults) float32, from their features, (n, d)."""
        return features @ self.weights.T + self.offset

    def divided_by(self, limits: np.ndarray) -> Faults:
        """Return the same with scores that are 1 at `limits`, (faults,)."""
        by = limits.astype(np.float32)
        return replace(self, weights=self.weights / by[:, None], offset=self.offset / by)


def no_faults(d: int) -> Faults:
    """Return the scores of no fault."""
    return Faults((), np.zeros((0, d), np.float32), np.zeros(0, np.float32))


def faults_from(features: np.ndarray, examples: Examples) -> Faults:
    """Return scores of faults that are 1 for the average example.

    Linear discriminants of all faults with one covariance within classes, shrunk (Ledoit and Wolf), since examples are
    few beside features. Of many good tiles, some are taken, evenly spaced.

    Parameters
    ----------
    features
        Of good tiles, (n, d).
    examples
        Of faults, at least two.
    """
    some = features[evenly_spaced(len(features), _MOST_TILES)]
    good = np.concatenate([some[:, examples.columns], *examples.tolerated]).astype(np.float64)
    centre, sd = good.mean(axis=0), good.std(axis=0)
    sd[sd < 1e-6 * max(sd.max(), 1e-12)] = 1.0  # the same in all tiles
    classes = [(x - centre) / sd for x in (good, *examples.faults.values())]
    within = np.concatenate([x - x.mean(axis=0) for x in classes])
    means = np.array([x.mean(axis=0) for x in classes[1:]])
    covariance = ledoit_wolf(within, assume_centered=True)[0] + 1e-6 * np.eye(within.shape[1])
    along = solve(covariance, means.T, assume_a="pos").T
    along /= np.maximum(np.einsum("ij,ij->i", along, means), 1e-12)[:, None]
    along /= sd
    weights = np.zeros((len(along), features.shape[1]), np.float32)
    weights[:, examples.columns] = along
    return Faults(tuple(examples.faults), weights, (-along @ centre).astype(np.float32))


def limits_of(folds: Sequence[tuple[Faults, np.ndarray, Examples]]) -> np.ndarray:
    """Return the score that good held-out tiles stay below in every inner fold, (faults,).

    That is 99 % of them, and 90 % of those with what is tolerated, however many more the former are.

    Parameters
    ----------
    folds
        By inner fold, its discriminants, and scores and examples of its held-out tiles.
    """
    found = []
    for faults, scores, examples in folds:
        found.append(np.quantile(scores, _LIMIT, axis=0))
        if len(examples.rows):
            x = np.concatenate(examples.tolerated)
            found.append(np.quantile(x @ faults.weights[:, examples.columns].T + faults.offset, _TOLERATED, axis=0))
    return np.maximum(np.max(found, axis=0), LEAST)
