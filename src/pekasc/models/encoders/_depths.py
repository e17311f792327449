"""Depths at which features are taken: block numbers, their names in tables, and features by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

Depth = tuple[int, ...] | None  # block(s) whose features are taken; None is the encoder's own output
MAX_DEPTHS = 12
Key = TypeVar("Key")


def depth_name(depth: Depth) -> str:
    """Return a depth as text for tables and logs: ``"6"``, ``"4+6"`` or ``"own"``."""
    return "own" if depth is None else "+".join(str(block) for block in depth)


def candidate_depths(n_blocks: int) -> list[Depth]:
    """Return the depths to choose from: every block, or twelve evenly spaced ones up to the last."""
    depths = np.unique(np.rint(np.linspace(n_blocks, 1, min(n_blocks, MAX_DEPTHS))).astype(int))
    return [(int(depth),) for depth in depths]


class ArraysOnAccess(Mapping[Key, np.ndarray]):
    """Arrays by key, each of which is made, or read, whenever it is asked for.

    None is made in advance: the features of a large data set at all depths hardly fit in memory once.

    Parameters
    ----------
    keys
        The keys, in their order.
    make
        Function from a key to its array.
    """

    def __init__(self, keys: Iterable[Key], make: Callable[[Key], np.ndarray]) -> None:
        self._keys, self._make = list(keys), make

    def __getitem__(self, key: Key) -> np.ndarray:
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # without making an array

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def features_of_some(
    features: Mapping[Depth, np.ndarray], rows: np.ndarray, depths: Sequence[Depth] | None = None
) -> ArraysOnAccess[Depth]:
    """Return the features of a subset of the spots, at all depths or at some."""
    return ArraysOnAccess(features if depths is None else depths, lambda depth: np.asarray(features[depth][rows]))


def features_at(features: Mapping[Depth, np.ndarray], depth: Depth) -> np.ndarray:
    """Return the features of a depth; those of several blocks are concatenated."""
    if depth in features or depth is None:
        return features[depth]
    return np.concatenate([features[(block,)] for block in depth], axis=1)
