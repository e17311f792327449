"""Simple kriging of many genes with one kernel: a single eigendecomposition serves all genes and all nuggets.

With the correlation K between spots and the relative noise D of their measurements, the weights of a gene of nugget v
are k (K + v D)^-1. With D^-1/2 K D^-1/2 = U L U', that is (k D^-1/2 U) (L + v)^-1 (U' D^-1/2): only the middle one
differs between genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import eigh
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

MOST_SPOTS = 1500  # in one system of equations
_CORE = 4  # a window's share of the spots whose surroundings it knows
_PLACES = 2048  # at once
_AT_RANGE = 4.743865  # where (1 + x) exp(-x) is 0.05


def correlation(distances: np.ndarray, range_um: float) -> np.ndarray:
    """Return the Matérn correlation of smoothness 3/2, which falls to 0.05 at `range_um`."""
    scaled = distances * (_AT_RANGE / range_um)
    return (1 + scaled) * np.exp(-scaled)


@dataclass(frozen=True, eq=False)
class System:
    """The equations of some spots, solved but for the nugget.

    Parameters
    ----------
    coords_um
        Positions of the spots, (n, 2).
    range_um
        Range of the kernel.
    scaled
        Eigenvectors, (n, n), each row over the root of the spot's noise.
    values
        Eigenvalues, (n,).
    """

    coords_um: np.ndarray
    range_um: float
    scaled: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, coords_um: np.ndarray, noise: np.ndarray, range_um: float) -> System:
        """Return the system of spots with the relative noise `noise`, (n,)."""
        root = np.sqrt(noise)
        values, vectors = eigh(correlation(cdist(coords_um, coords_um), range_um) / np.outer(root, root))
        return cls(coords_um, range_um, (vectors / root[:, None]).astype(np.float32), np.maximum(values, 0))

    def places(self, coords_um: np.ndarray) -> np.ndarray:
        """Return what places of (m, 2) have to do with the spots, (m, n), to be combined by :meth:`inverse`."""
        near = correlation(cdist(coords_um, self.coords_um), self.range_um)
        return np.asarray(near.astype(np.float32) @ self.scaled)

    def inverse(self, nuggets: np.ndarray) -> np.ndarray:
        """Return the middle factor for each nugget, (n, nuggets); 0 for an infinite one."""
        return np.asarray((1 / (self.values[:, None] + nuggets)).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Kriging:
    """Residuals of one section's spots, to be interpolated.

    Parameters
    ----------
    coords_um
        Positions of the spots in um, (n, 2).
    residuals
        Measured less predicted values, (n, genes) float32.
    noise
        Variance of the noise of a spot, over that of a spot of median depth, (n,).
    range_um
        Distance at which the correlation has fallen to 0.05.
    nuggets
        Variance of the noise of a spot of median depth over that of the process, (genes,); infinite: there is no pull
        but the offset.
    offset
        Mean residual of the section that is added everywhere, (genes,); 0 without a pull.
    sd
        Standard deviation of the process, (genes,).
    sd_everywhere
        Standard deviation of what no spot knows of another place, (genes,): what varies at shorter distances, and all
        of a gene without a finite nugget.
    """

    coords_um: np.ndarray
    residuals: np.ndarray
    noise: np.ndarray
    range_um: float
    nuggets: np.ndarray
    offset: np.ndarray
    sd: np.ndarray
    sd_everywhere: np.ndarray

    @property
    def pulled(self) -> np.ndarray:
        """Whether a gene is pulled at all, (genes,) bool."""
        return np.isfinite(self.nuggets) | (self.offset != 0)

    def distance(self, coords_um: np.ndarray) -> np.ndarray:
        """Return the distance of places of (m, 2) to the nearest spot in um, (m,)."""
        return np.asarray(self._tree.query(coords_um)[0])

    def at(self, coords_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return interpolated residuals at places of (m, 2), and the deviation of their errors, (m, genes) float32."""
        pull = np.empty((len(coords_um), self.sd.size), dtype=np.float32)
        sd = np.empty_like(pull)
        window = self._centres.query(coords_um)[1]
        finite, of_gene = np.unique(self.nuggets, return_inverse=True)
        process, everywhere = (np.square(part).astype(np.float32) for part in (self.sd, self.sd_everywhere))
        for number in np.unique(window):
            system, weights = self._solved(int(number))
            inverse = system.inverse(finite)
            for rows in _parts(np.flatnonzero(window == number)):
                z = system.places(coords_um[rows])
                pull[rows] = z @ weights + self.offset.astype(np.float32)
                left = np.maximum(1 - np.square(z) @ inverse, 0)
                sd[rows] = np.sqrt(left[:, of_gene] * process + everywhere)
        return pull, sd

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.coords_um)

    @cached_property
    def _centres(self) -> cKDTree:
        return cKDTree(window_centres(self.coords_um))

    @cached_property
    def _last(self) -> dict[int, tuple[System, np.ndarray]]:
        return {}

    def _solved(self, number: int) -> tuple[System, np.ndarray]:
        """Return the system of a window and the weights of its components, (n, genes); one is kept."""
        if number not in self._last:
            spots = window_spots(self._tree, self._centres.data[number])
            system = System.of(self.coords_um[spots], self.noise[spots], self.range_um)
            components = system.scaled.T @ (self.residuals[spots] - self.offset.astype(np.float32))
            self._last.clear()
            self._last[number] = (system, components * system.inverse(self.nuggets))
        return self._last[number]


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, rows.size, _PLACES):
        yield rows[start : start + _PLACES]


def window_centres(coords_um: np.ndarray) -> np.ndarray:
    """Return the centres of windows, (w, 2): places are computed from the :data:`MOST_SPOTS` around the nearest one.

    One, if there are no more spots than that.
    """
    if len(coords_um) <= MOST_SPOTS:
        return coords_um.mean(axis=0, keepdims=True)
    parts = [coords_um]
    while max(len(part) for part in parts) > MOST_SPOTS // _CORE:
        parts = [half for part in parts for half in _halves(part)]
    return np.array([part.mean(axis=0) for part in parts])


def _halves(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = part[np.argsort(part[:, np.ptp(part, axis=0).argmax()], kind="stable")]
    return order[: len(order) // 2], order[len(order) // 2 :]


def window_spots(tree: cKDTree, centre: np.ndarray) -> np.ndarray:
    """Return the spots of a window, as sorted indices."""
    return np.sort(np.atleast_1d(tree.query(centre, k=min(MOST_SPOTS, tree.n))[1]))
