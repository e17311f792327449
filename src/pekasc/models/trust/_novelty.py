"""How unlike the training tiles a tile is: Mahalanobis distance of shallow features, and known faults. Pure arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.decomposition import PCA

from pekasc._sample import evenly_spaced
from pekasc.models.trust._faults import LEAST, Examples, Faults, faults_from, limits_of, no_faults

COMPONENTS = 64
_MOST_TILES = 5000  # that components are found from
_KEPT = 1024  # quantiles of the distances of an inner fold
_REACH = 0.95  # share of held-out tiles whose Mahalanobis distance is below that of a known fault
_FEWEST = 2  # examples of a fault


@dataclass(frozen=True, eq=False)
class Distance:
    """Squared Mahalanobis distance to training tiles, along their principal components and beside them.

    With known faults, the larger of that and of their scores, each over what held-out tiles reach.

    Parameters
    ----------
    centre
        Mean features, (d,) float32.
    axes
        Principal components, (k, d) float32, orthonormal.
    sd
        Standard deviation along each, (k,) float32.
    rest
        Mean squared distance from the space of the components.
    faults
        Scores of known faults, about 1 where held-out tiles end; none in adapters of formats 7 and 8.
    scale
        Mahalanobis distance that is as far as a score of 1; 1 without faults.
    """

    centre: np.ndarray
    axes: np.ndarray
    sd: np.ndarray
    rest: float
    faults: Faults
    scale: float = 1.0

    def mahalanobis(self, features: np.ndarray) -> np.ndarray:
        """Return the squared Mahalanobis distance of tiles, (n,) float32, from their features, (n, d)."""
        x = features - self.centre
        along = x @ self.axes.T
        beside = np.maximum(np.square(x).sum(axis=1) - np.square(along).sum(axis=1), 0)
        return np.asarray(np.square(along / self.sd).sum(axis=1) + beside / self.rest, dtype=np.float32)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return how far tiles are, (n,) float32, from their features, (n, d)."""
        far = self.mahalanobis(features) / np.float32(self.scale)
        return np.asarray(np.column_stack([far, self.faults(features)]).max(axis=1), dtype=np.float32)


def _most_components(n_tiles: int) -> int:
    return max(1, n_tiles // 3)


def distance_to(features: np.ndarray, n_components: int = COMPONENTS) -> Distance:
    """Return the distance to tiles with these features, (n, d); of many tiles, to some, evenly spaced.

    There are at most a third as many components as tiles, so that the variance along each is known.
    """
    x = np.asarray(features[evenly_spaced(len(features), _MOST_TILES)], dtype=np.float64)
    k = min(n_components, _most_components(len(x)), x.shape[1] - 1)
    model = PCA(k, svd_solver="randomized", random_state=0).fit(x)
    variance = np.maximum(model.explained_variance_, 1e-12)
    rest = np.square(x - model.mean_).sum(axis=1).mean() - variance.sum() * (len(x) - 1) / len(x)
    return Distance(
        model.mean_.astype(np.float32), model.components_.astype(np.float32), np.sqrt(variance).astype(np.float32),
        max(float(rest), 1e-9), no_faults(x.shape[1]),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Novelty:
    """Distance to the training tiles, as a p-value over spots of held-out training sections.

    A tile is as novel as it is beside the inner fold that it is least novel to: patients differ, and a tile that one
    held-out patient has many of is not novel.

    Parameters
    ----------
    depths
        Blocks after which features are taken, side by side.
    distance
        The distance to all training tiles.
    reference
        By inner fold, quantiles of the distances of its held-out tiles to those it was trained on, (folds, 1024)
        float32, ascending.
    n_tiles
        Number of held-out tiles of every inner fold.
    """

    depths: tuple[tuple[int, ...] | None, ...]
    distance: Distance
    reference: np.ndarray
    n_tiles: tuple[int, ...]

    def p_values(self, distances: np.ndarray) -> np.ndarray:
        """Return the share of held-out training tiles that are at least as far or as faulty, (n,) float32.

        Small is novel.

        Beyond the farthest of them, the share falls as a Pareto tail through the farthest tenth (Hill's estimator):
        few tiles were held out, and a white tile is far beyond all of them.
        """
        found = []
        for quantiles, n in zip(self.reference, self.n_tiles, strict=True):
            farther = 1 - np.searchsorted(quantiles, distances, side="left") / len(quantiles)
            beyond = np.maximum(distances / quantiles[-1], 1.0) ** (-1 / _tail_index(quantiles))
            found.append((1 + n * farther) / (1 + n) * beyond)
        return np.where(np.isfinite(distances), np.max(found, axis=0), np.nan).astype(np.float32)


def _tail_index(quantiles: np.ndarray) -> float:
    """Return how slowly the largest distances thin out: Hill's estimator on the farthest tenth."""
    tail = np.log(np.maximum(quantiles[-len(quantiles) // 10 :].astype(np.float64), 1e-12))
    return max(float((tail - tail[0]).mean()), 0.02)


def novelty_of(
    features: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    depths: Sequence[tuple[int, ...] | None],
    examples: Examples | None = None,
) -> Novelty:
    """Return the novelty of tiles beside training tiles.

    Discriminants of known faults are found on the training tiles of an inner fold, and their limits on the held-out
    ones, as distances are. Without two examples in every fold, novelty is the Mahalanobis distance alone.

    Parameters
    ----------
    features
        Frozen features of the training tiles, (n, d).
    folds
        Training and held-out tiles of every inner fold.
    depths
        Where the features are from.
    examples
        Of training tiles with known faults.
    """
    # as many components everywhere: distances along more of them are larger
    k = min([COMPONENTS, *(_most_components(len(train)) for train, _ in folds)])
    whole = distance_to(features, k)
    if examples is not None and any(len(examples.part(train).rows) < _FEWEST for train, _ in folds):
        examples = None
    apart: list[np.ndarray] = []
    by_fault: list[tuple[Faults, np.ndarray, Examples]] = []
    for train, out in folds:
        good, held_out = features[train], features[out]
        apart.append(distance_to(good, k).mahalanobis(held_out))
        if examples is not None:
            faults = faults_from(good, examples.part(train))
            by_fault.append((faults, faults(held_out), examples.part(out)))
    if examples is not None:
        limits = limits_of(by_fault)
        scale = max(*(float(np.quantile(far, _REACH)) for far in apart), LEAST)
        whole = replace(whole, faults=faults_from(features, examples).divided_by(limits), scale=scale)
        scores = [(found / limits).max(axis=1) for _, found, _ in by_fault]
        apart = [np.maximum(far / scale, score) for far, score in zip(apart, scores, strict=True)]
    quantiles = np.array([np.quantile(part, np.linspace(0, 1, _KEPT)) for part in apart], dtype=np.float32)
    return Novelty(tuple(depths), whole, quantiles, tuple(len(part) for part in apart))
