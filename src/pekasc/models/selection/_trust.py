"""What a fit keeps to say how far it can be trusted: predictions of held-out groups, and how its tiles look."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

from pekasc._expression import Matrix, dense
from pekasc._sample import evenly_spaced
from pekasc._settings import get_logger
from pekasc.models.encoders import Depth
from pekasc.models.features import embed
from pekasc.models.heads import Source
from pekasc.models.runtime import processes
from pekasc.models.selection._inputs import Data
from pekasc.models.selection._job import Job
from pekasc.models.selection._readout import Features, Fitted
from pekasc.models.trust import (
    FAULTS,
    MOST_SPOTS,
    N_TOLERATED,
    Block,
    Examples,
    HeldOut,
    Novelty,
    corrupted,
    counts_of,
    held_out,
    novelty_of,
)
from pekasc.tiling import ArrayTiles

logger = get_logger(__name__)

_SHALLOW = (1 / 6, 1 / 3, 1 / 2)  # of the blocks: deeper features hardly tell blur, stain and scale from tissue
_EXAMPLES = 20  # training tiles that are given every known fault, shared by the inner folds


def held_out_of(job: Job, fitted: Fitted, held_out_scores: Sequence[np.ndarray]) -> HeldOut:
    """Return the noise and the scores of predictions of held-out groups, each by the reading fitted without them.

    `held_out_scores` are the scores of the held-out spots by fold, see :meth:`Reader.held_out`.
    """
    data, blocks = job.data, list[Block]()
    parts = zip(fitted.folds, job.folds, held_out_scores, strict=True)
    for number, (reading, fold, scores) in enumerate(parts):
        learned = None if data.panels is None else data.panels.learned(fold.train)
        for group, at in _parts(data, fold.held_out):
            rows = fold.held_out[at]
            known = np.ones(len(data.genes), dtype=bool)
            if data.panels is not None:
                known = data.panels.of(rows[:1])[0] & learned
            totals = _totals(data, rows)
            blocks.append(
                Block(
                    group=group,
                    fold=number,
                    predicted=partial(reading.expression, scores[at]),
                    measured=partial(_measured, _by_column(data.expression[rows]), totals),
                    totals=totals,
                    known=known,
                )
            )
    return held_out(blocks, len(data.genes))


def _totals(data: Data, rows: np.ndarray) -> np.ndarray | None:
    if not data.counts:
        return None
    assert data.totals is not None  # for the type checker: counts have totals
    return data.totals[rows]


def _parts(data: Data, rows: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return group and places, section by section, of held-out spots; of a group with many, evenly spaced ones."""
    out = []
    for group in np.unique(data.groups[rows]):
        own = np.flatnonzero(data.groups[rows] == group)
        own = own[evenly_spaced(own.size, MOST_SPOTS)]
        for section in np.unique(data.sections[rows[own]]):
            out.append((str(group), own[data.sections[rows[own]] == section]))
    return out


def _by_column(values: Matrix) -> Matrix:
    return values.tocsc() if sparse.issparse(values) else values


def _measured(values: Any, totals: np.ndarray | None, part: slice) -> np.ndarray:
    found = dense(values[:, part])
    return found if totals is None else counts_of(found, totals)


def tile_novelty(job: Job, features: Features) -> Novelty:
    """Return how unlike the training tiles a tile is, from shallow frozen features; see :class:`Novelty`."""
    depths = _shallow(list(features.frozen), job.model.n_blocks)
    looks = [features.of(Source("frozen", 0, depth), None) for depth in depths]
    edges = np.cumsum([0, *(x.shape[1] for x in looks)])
    middle = (len(depths) - 1) // 2  # the deepest tells a pixel size from tissue less well
    examples = _examples(job, depths[middle], slice(int(edges[middle]), int(edges[middle + 1])))
    parts = [(fold.train, fold.held_out) for fold in job.folds]
    novelty = novelty_of(np.concatenate(looks, axis=1), parts, depths, examples)
    if not novelty.distance.faults.names:
        logger.hint("Too few training tiles to show faults to: novelty is the distance to them alone.")
    return novelty


def _examples(job: Job, depth: Depth, columns: slice) -> Examples:
    """Return features of some tiles of every inner fold with known faults: a pass through the first blocks for each.

    Every process embeds those of its own tiles. No adapter is attached to the encoder by now.
    """
    per_fold = -(-_EXAMPLES // len(job.folds))
    some = [fold.held_out[evenly_spaced(len(fold.held_out), per_fold)] for fold in job.folds]
    rows = np.unique(np.concatenate(some))
    own, width = np.flatnonzero(job.local[rows]), columns.stop - columns.start
    names: list[str | None] = [*FAULTS, *[None] * N_TOLERATED]
    found = np.zeros((len(rows), len(names), width), dtype=np.float32)
    with processes.raise_together():
        for at, (_, tiles) in enumerate(corrupted(job.data.tiles.read(rows[own]), rows[own]) if own.size else ()):
            found[own, at] = embed(job.model, ArrayTiles(tiles), [depth], **job.how)[depth]
    if processes.n_ranks() > 1:
        found = processes.gather_rows(found.reshape(len(rows), -1), job.options.device).reshape(found.shape)
    faults = {name: found[:, at] for at, name in enumerate(names) if name is not None}
    return Examples(rows, columns, faults, tuple(found[:, len(FAULTS) :].transpose(1, 0, 2)))


def _shallow(depths: Sequence[Depth], n_blocks: int) -> list[Depth]:
    """Return the depths nearest to a sixth, a third and half of the blocks among those whose features there are."""

    def block(depth: Depth) -> int:
        return n_blocks if depth is None else max(depth)

    return list(dict.fromkeys(min(depths, key=lambda d: abs(block(d) - part * n_blocks)) for part in _SHALLOW))
