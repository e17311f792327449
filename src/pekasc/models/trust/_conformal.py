"""Conformal quantiles over groups: spots of one group are not exchangeable with those of another. Pure arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

_jit: Any = numba.njit(cache=True, nogil=True, error_model="numpy")

# edges of the cumulative scores that a fit keeps: finest where intervals are wide
EDGES = 1 - np.linspace(1, 0, 129) ** 2


def reachable(n_groups: int) -> float:
    """Return the largest level that conformal intervals over so many groups can promise, K / (K + 1)."""
    return n_groups / (n_groups + 1)


def groups_needed(level: float) -> int:
    """Return the number of groups from which a level can be promised."""
    return math.ceil(level / (1 - level) - 1e-9)


def group_quantiles(scores: Sequence[np.ndarray], level: float, *, exact: bool = True) -> np.ndarray:
    """Return per gene the score that a spot of another group stays below with probability `level`, (genes,).

    Every group has a share of 1 / (K + 1), spread evenly over its spots, and the rest of 1 is the group to come, whose
    score may be anything: hierarchical conformal prediction (Lee, Barber, Willett. Distribution-free inference with
    hierarchical data. arXiv:2306.06342). With one spot a group, this is split conformal prediction.

    Parameters
    ----------
    scores
        Of every group, (spots, genes); a gene that a group did not measure is NaN in all of its spots.
    level
        The level, in (0, 1).
    exact
        Whether the group to come has its share; without, groups share 1 alike, and nothing is promised.

    Returns
    -------
    The quantile, infinite where the groups that measured a gene are too few for the level; NaN where none did.
    """
    n_genes = scores[0].shape[1]
    out = np.full(n_genes, np.nan)
    for gene in range(n_genes):
        own = [group[:, gene] for group in scores]
        own = [values[np.isfinite(values)] for values in own]
        own = [values for values in own if values.size]
        if not own:
            continue
        share = 1 / (len(own) + exact)
        values = np.concatenate(own)
        weights = np.concatenate([np.full(part.size, share / part.size) for part in own])
        order = np.argsort(values, kind="stable")
        reached = np.flatnonzero(
            np.cumsum(weights[order]) >= level * (1 - 1e-9)
        )  # sums of thousands of shares are rounded
        out[gene] = values[order[reached[0]]] if reached.size else np.inf
    return out


def quantiles_of_cumulative(cumulative: np.ndarray, level: float) -> np.ndarray:
    """Return the score at which cumulative shares, (genes, edges), reach a level, (genes,); NaN where there are none.

    Between two of the ``EDGES``, scores are spread evenly.
    """
    known = np.isfinite(cumulative).all(axis=1)
    filled = np.where(known[:, None], cumulative, 1.0)
    right = np.minimum((filled < level).sum(axis=1), len(EDGES) - 1)
    left = np.maximum(right - 1, 0)
    rows = np.arange(len(filled))
    low, high = filled[rows, left], filled[rows, right]
    part = np.divide(level - low, high - low, out=np.ones_like(low), where=high > low)
    score = EDGES[left] + np.clip(part, 0, 1) * (EDGES[right] - EDGES[left])
    return np.where(known, score, np.nan)


@_jit
def _cumulative(low: np.ndarray, high: np.ndarray, edges: np.ndarray, out: np.ndarray) -> None:
    n, n_genes = low.shape
    for i in range(n):
        for j in range(n_genes):
            a, b = low[i, j], high[i, j]
            for k in range(len(edges)):
                # the central interval of probability e is from (1 - e) / 2 to (1 + e) / 2
                left, right = (1 - edges[k]) / 2, (1 + edges[k]) / 2
                if b > a:
                    share = (min(b, right) - max(a, left)) / (b - a)
                else:
                    share = 1.0 if left <= a <= right else 0.0
                out[j, k] += min(max(share, 0.0), 1.0)


def cumulative(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return how many scores are up to every edge, (genes, edges) float64.

    Parameters
    ----------
    low, high
        Ends of what the distribution function is drawn from, (n, genes) each.
    """
    out = np.zeros((low.shape[1], len(EDGES)))
    _cumulative(low, high, EDGES, out)
    return out
