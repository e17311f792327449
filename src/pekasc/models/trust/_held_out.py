"""What a fit keeps of its predictions of held-out groups: noise per gene, and how far off they were. Pure arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pekasc.models.trust._conformal import EDGES, cumulative
from pekasc.models.trust._counts import count_sums, mean_and_dispersion
from pekasc.models.trust._noise import COUNTS, FLOOR, RESIDUALS, Noise

GENES = 512  # per chunk
MOST_SPOTS = 2000  # of a group


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Predictions of held-out training groups against what was measured there.

    Parameters
    ----------
    noise
        Noise per gene, from all held-out spots.
    cumulative
        Share of scores up to every edge of ``EDGES``, (genes, edges) float32, the mean over groups; the noise of a
        group's scores is that of the other inner folds. NaN for genes that were never held out.
    curve
        The same, mean over genes, by group: (groups, edges) float32.
    groups
        Names of the groups.
    """

    noise: Noise
    cumulative: np.ndarray
    curve: np.ndarray
    groups: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Held-out spots of one group in one inner fold.

    Parameters
    ----------
    group
        Name of the group.
    fold
        Number of the inner fold.
    predicted
        Returns predictions of some genes, (n, k).
    measured
        Returns counts, or measured values of another target, of some genes, (n, k).
    totals
        Total count of every spot, (n,); None for targets that are no counts.
    known
        Which genes were measured and could be learned, (genes,) bool.
    """

    group: str
    fold: int
    predicted: Callable[[slice], np.ndarray]
    measured: Callable[[slice], np.ndarray]
    totals: np.ndarray | None
    known: np.ndarray


def held_out(blocks: Sequence[Block], n_genes: int) -> HeldOut:
    """Return the noise and the scores of held-out predictions.

    Parameters
    ----------
    blocks
        Held-out spots by group.
    n_genes
        Number of genes.
    """
    kind = COUNTS if all(block.totals is not None for block in blocks) else RESIDUALS
    n_folds = 1 + max(block.fold for block in blocks)
    parts = [slice(start, min(start + GENES, n_genes)) for start in range(0, n_genes, GENES)]
    floor = _floor(blocks, parts, n_genes) if kind == COUNTS else np.zeros(n_genes)
    plain = Noise(kind, np.ones(n_genes), np.ones(n_genes), floor)
    sums = np.zeros((n_folds, 5, n_genes))
    for block in blocks:
        for part in parts:
            sums[block.fold, :, part] += _sums(block, part, plain.take(part))
    noise = _noise(kind, sums.sum(axis=0), floor)
    # with one fold there is no other
    others = [_noise(kind, sums.sum(axis=0) - sums[fold] * (n_folds > 1), floor) for fold in range(n_folds)]
    groups = tuple(dict.fromkeys(block.group for block in blocks))
    total, count = np.zeros((n_genes, len(EDGES))), np.zeros(n_genes)
    curve = np.full((len(groups), len(EDGES)), np.nan, dtype=np.float32)
    for number, group in enumerate(groups):
        own = [block for block in blocks if block.group == group]
        shares = np.full((n_genes, len(EDGES)), np.nan)
        for part in parts:
            shares[part] = _shares(own, part, [others[block.fold].take(part) for block in own])
        there = np.isfinite(shares[:, 0])
        total[there] += shares[there]
        count += there
        if there.any():
            curve[number] = shares[there].mean(axis=0)
    seen = count[:, None] > 0
    cumulative = np.divide(total, count[:, None], out=np.full_like(total, np.nan), where=seen)
    return HeldOut(noise, cumulative.astype(np.float32), curve, groups)


def _floor(blocks: Sequence[Block], parts: Sequence[slice], n_genes: int) -> np.ndarray:
    """Return a share of the mean rate of every gene, in counts per 10,000."""
    counts, totals = np.zeros(n_genes), np.zeros(n_genes)
    for block in blocks:
        assert block.totals is not None  # for the type checker: counts have totals
        for part in parts:
            counts[part] += np.where(block.known[part], block.measured(part).sum(axis=0), 0.0)
        totals += np.where(block.known, block.totals.sum(), 0.0)
    rate = np.divide(1e4 * counts, totals, out=np.zeros(n_genes), where=totals > 0)
    return FLOOR * np.where(rate > 0, rate, rate[rate > 0].min(initial=1.0))


def _sums(block: Block, part: slice, plain: Noise) -> np.ndarray:
    known = np.broadcast_to(block.known[part], (1, part.stop - part.start))
    y, predicted = block.measured(part), block.predicted(part)
    if block.totals is not None:
        return count_sums(y, plain.means(predicted, block.totals), known)
    rest = np.where(known, y - predicted, 0.0)
    out = np.zeros((5, part.stop - part.start))
    out[0], out[2] = known * len(y), np.square(rest).sum(axis=0)
    return out


def _noise(kind: str, sums: np.ndarray, floor: np.ndarray) -> Noise:
    if kind == COUNTS:
        scale, spread = mean_and_dispersion(sums)
        return Noise(kind, scale, spread, floor)
    mean = np.divide(sums[2], sums[0], out=np.zeros(len(floor)), where=sums[0] > 0)
    return Noise(kind, np.ones(len(floor)), np.maximum(np.sqrt(mean), 1e-12), floor)


def _shares(blocks: Sequence[Block], part: slice, noises: Sequence[Noise]) -> np.ndarray:
    """Return the share of a group's scores up to every edge, (k, edges); NaN for genes that it does not know."""
    total, n = np.zeros((part.stop - part.start, len(EDGES))), np.zeros(part.stop - part.start)
    for block, noise in zip(blocks, noises, strict=True):
        ends = noise.scores(block.predicted(part), block.measured(part), block.totals)
        known = block.known[part]
        total[known] += cumulative(*noise.central(ends))[known]
        n += np.where(known, ends.shape[1], 0)
    return np.divide(total, n[:, None], out=np.full_like(total, np.nan), where=n[:, None] > 0)
