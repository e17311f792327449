"""Depths at which features are taken: block numbers, their names in tables, and features by depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Depth = tuple[int, ...] | None  # block(s) whose features are taken; None is the encoder's own output
MAX_DEPTHS = 12


def depth_name(depth: Depth) -> str:
    """Return a depth as text for tables and logs: ``"6"``, ``"4+6"`` or ``"own"``."""
    return "own" if depth is None else "+".join(str(block) for block in depth)


def candidate_depths(n_blocks: int) -> list[Depth]:
    """Return the depths to choose from: every block, or twelve evenly spaced ones up to the last."""
    depths = np.unique(np.rint(np.linspace(n_blocks, 1, min(n_blocks, MAX_DEPTHS))).astype(int))
    return [(int(depth),) for depth in depths]


class FeaturesOfSome(Mapping[Depth, np.ndarray]):
    """Features by depth of a subset of the spots, indexed on access.

    No copy is made in advance: the features of a large data set at all depths hardly fit in memory once.
    """

    def __init__(
        self, features: Mapping[Depth, np.ndarray], rows: np.ndarray, depths: Sequence[Depth] | None = None
    ) -> None:
        self.features, self.rows = features, rows
        self.depths = list(features) if depths is None else list(depths)

    def __getitem__(self, depth: Depth) -> np.ndarray:
        return np.asarray(self.features[depth][self.rows])

    def __contains__(self, depth: object) -> bool:
        return depth in self.depths  # without reading features

    def __iter__(self) -> Iterator[Depth]:
        return iter(self.depths)

    def __len__(self) -> int:
        return len(self.depths)


def features_at(features: Mapping[Depth, np.ndarray], depth: Depth) -> np.ndarray:
    """Return the features of a depth; those of several blocks are concatenated."""
    if depth in features or depth is None:
        return features[depth]
    return np.concatenate([features[(block,)] for block in depth], axis=1)
