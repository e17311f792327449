"""A fitted head as linear maps: features of a tile, and of its neighbours' mean, to a few scores, and these to genes.

Every head here is linear in the features, so that a tile's features can be reduced to its scores at once, before the
mean over its neighbours is taken and whatever the number of depths that are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """Features that a head reads.

    Parameters
    ----------
    network
        ``"frozen"`` or ``"adapted"``.
    field
        Number of the field of view; 0 is the tile itself.
    depth
        Block(s) after which they are taken, concatenated; None is the encoder's own output.
    adapter
        Number of the adapter among several, for ``"adapted"``.
    """

    network: str
    field: int
    depth: tuple[int, ...] | None
    adapter: int = 0


@dataclass(frozen=True)
class LinearMap:
    """From features of one source to scores.

    Parameters
    ----------
    centre
        Subtracted from the features, shape (d,): near their mean, so that no digits are lost.
    own
        For the tile's features, shape (d, k).
    around
        For the mean features of its neighbours, (d, k); None without spatial context.
    """

    centre: np.ndarray
    own: np.ndarray
    around: np.ndarray | None


@dataclass(frozen=True)
class Block:
    """Scores of some sources added up, and their map to genes.

    Parameters
    ----------
    maps
        From the features of every source to scores.
    offset
        Added to the scores, shape (k,).
    out
        From scores to genes, shape (k, genes).
    """

    maps: Mapping[Source, LinearMap]
    offset: np.ndarray
    out: np.ndarray


@dataclass(frozen=True)
class LinearHead:
    """From features to genes.

    Parameters
    ----------
    blocks
        Their predictions add up.
    intercept
        Shape (genes,): the mean over training spots.
    context_um
        Radius of the spatial context in um; None without.
    """

    blocks: tuple[Block, ...]
    intercept: np.ndarray
    context_um: float | None = None

    def __repr__(self) -> str:
        return f"LinearHead(n_scores={self.n_scores}, n_genes={len(self.intercept)}, context_um={self.context_um})"

    @property
    def sources(self) -> list[Source]:
        """The features that it reads."""
        return list(dict.fromkeys(source for block in self.blocks for source in block.maps))

    @property
    def n_scores(self) -> int:
        """Number of scores of all blocks."""
        return sum(len(block.offset) for block in self.blocks)

    def scores(self, features: Mapping[Source, np.ndarray], *, around: bool = False) -> np.ndarray:
        """Return the scores of tiles, (n, n_scores) float32, without the offset, from the features of some sources.

        Those of other sources add up. With `around`, the scores that a tile gives as a neighbour.
        """
        parts = []
        for block in self.blocks:
            n = len(next(iter(features.values())))
            total = np.zeros((n, len(block.offset)), dtype=np.float32)
            for source, linear in block.maps.items():
                matrix = linear.around if around else linear.own
                if source in features and matrix is not None:
                    total += _centred(features[source], linear.centre, source) @ matrix
            parts.append(total)
        return np.concatenate(parts, axis=1)

    def expression(self, scores: np.ndarray, genes: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Predict expression, (n, genes) float32, from scores, for all genes or some of them."""
        out = np.tile(self.intercept[genes].astype(np.float64), (len(scores), 1))
        start = 0
        for block in self.blocks:
            stop = start + len(block.offset)
            out += (scores[:, start:stop].astype(np.float64) + block.offset) @ block.out[:, genes]
            start = stop
        return out.astype(np.float32)


def _centred(features: np.ndarray, centre: np.ndarray, source: Source) -> np.ndarray:
    if features.shape[1] != len(centre):
        at = "own output" if source.depth is None else f"depth {'+'.join(map(str, source.depth))}"
        raise ValueError(
            f"The expression head takes {len(centre)} features of the encoder's {at}, and there are "
            f"{features.shape[1]}: it is of another encoder."
        )
    return features - centre


def linear_block(
    matrix: np.ndarray, mean: np.ndarray, out: np.ndarray, sources: Sequence[Source], *, context: bool
) -> Block:
    """Return the block that predicts ``(x - mean) @ matrix @ out`` from the concatenated features x of some sources.

    Parameters
    ----------
    matrix
        Shape (d, k); with `context`, (2 * d, k): the first half for a tile, the second for its neighbours' mean.
    mean
        Shape (d,) or (2 * d,).
    out
        Shape (k, genes).
    sources
        Their features have the same width.
    context
        Whether there is spatial context.
    """
    n = len(sources)
    width = len(matrix) // (2 * n if context else n)
    maps, offset = {}, np.zeros(matrix.shape[1])
    for i, source in enumerate(sources):
        own = slice(i * width, (i + 1) * width)
        centre, around = mean[own], None
        if context:
            near = slice((n + i) * width, (n + i + 1) * width)
            around = matrix[near]
            offset += (centre - mean[near]) @ around
            around = around.astype(np.float32, order="C")
        maps[source] = LinearMap(centre.astype(np.float32), matrix[own].astype(np.float32, order="C"), around)
    # precision and order in memory are those on disk: an adapter that is loaded again gives the same bits
    return Block(maps, offset.astype(np.float32), out.astype(np.float32, order="C"))


def merged(blocks: Sequence[Block]) -> Block:
    """Return the sum of blocks that share their map to genes and read different sources."""
    maps = {source: linear for block in blocks for source, linear in block.maps.items()}
    return Block(maps, np.sum([block.offset for block in blocks], axis=0), blocks[0].out)


def beside(parts: Sequence[tuple[Block, np.ndarray]], n_genes: int) -> Block:
    """Return one block of several that read the same sources and predict different genes, of `n_genes` altogether."""
    first = parts[0][0]
    out = np.zeros((sum(len(block.offset) for block, _ in parts), n_genes))
    maps = {}
    offsets = [block.offset.astype(np.float64) for block, _ in parts]
    start = 0
    for block, genes in parts:
        stop = start + len(block.offset)
        out[start:stop, genes] = block.out
        start = stop
    for source, linear in first.maps.items():
        own, around = [], []
        for i, (block, _) in enumerate(parts):
            other = block.maps[source]
            # their centres differ: features are centred once
            moved = linear.centre.astype(np.float64) - other.centre
            own.append(other.own)
            offsets[i] += moved @ other.own
            if other.around is not None:
                around.append(other.around)
                offsets[i] += moved @ other.around
        maps[source] = LinearMap(
            linear.centre, np.concatenate(own, axis=1), np.concatenate(around, axis=1) if around else None
        )
    return Block(maps, np.concatenate(offsets), out)
