"""How an adapter reads features: the weighted mean of several heads, and what is left of it without context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pekasc.models.heads._context import neighbour_means
from pekasc.models.heads._linear import LinearHead, Source


@dataclass(frozen=True)
class Member:
    """One head of a reading.

    Parameters
    ----------
    name
        Network and head, such as ``"frozen:low-rank"``. Several radii of spatial context have a member each.
    weight
        Its weight in the mean.
    head
        The fitted head.
    variant
        Members of one name are fitted with all there is (0), and again with less: without wider fields of view, without
        spatial context. Of each name, those of the first variant that can be used are.
    """

    name: str
    weight: float
    head: LinearHead
    variant: int = 0

    @property
    def fields(self) -> set[int]:
        """Numbers of the fields of view that it reads, beyond the tile."""
        return {source.field for source in self.head.sources} - {0}


@dataclass(frozen=True)
class Reading:
    """Predict expression from features of several sources: the weighted mean of its members.

    Parameters
    ----------
    members
        The members.
    smooth_um, smooth_weight
        Radius in um within which predictions are averaged over neighbours, and the weight of that average; None and 0
        without smoothing.
    """

    members: tuple[Member, ...]
    smooth_um: float | None = None
    smooth_weight: float = 0.0

    def use(self, *, context: bool = True, fields: bool = True) -> Reading:
        """Return the members of every name that need no more than there is. Weights sum to 1."""
        found: list[Member] = []
        for name in dict.fromkeys(member.name for member in self.members):
            own = [member for member in self.members if member.name == name]
            for variant in sorted({member.variant for member in own}):
                part = [member for member in own if member.variant == variant]
                if all((context or m.head.context_um is None) and (fields or not m.fields) for m in part):
                    found += part
                    break
        total = sum(member.weight for member in found)
        members = tuple(replace(member, weight=member.weight / total) for member in found)
        return Reading(members, self.smooth_um, self.smooth_weight) if context else Reading(members)

    @property
    def radii_um(self) -> tuple[float, ...]:
        """Radii of the spatial context in um, ascending; empty without."""
        return tuple(sorted({m.head.context_um for m in self.members if m.head.context_um is not None}))

    @property
    def sources(self) -> list[Source]:
        """The features that its members read."""
        return list(dict.fromkeys(source for member in self.members for source in member.head.sources))

    @property
    def n_scores(self) -> int:
        """Number of scores of all members."""
        return sum(member.head.n_scores for member in self.members)

    @property
    def n_around(self) -> int:
        """Number of scores that a tile gives to its neighbours: those of members with spatial context."""
        return sum(member.head.n_scores for member in self.members if member.head.context_um is not None)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.members[0].head.intercept)

    def columns(self, radius_um: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of members with a radius, among all scores and among those given to neighbours."""
        own, around, start, given = [], [], 0, 0
        for member in self.members:
            k = member.head.n_scores
            if member.head.context_um == radius_um:
                own.append(np.arange(start, start + k))
                around.append(np.arange(given, given + k))
            start += k
            given += 0 if member.head.context_um is None else k
        return np.concatenate(own), np.concatenate(around)

    def scores(self, features: Mapping[Source, np.ndarray], *, around: bool = False) -> np.ndarray:
        """Return the scores of tiles, (n, n_scores) float32; see :meth:`LinearHead.scores`.

        With `around`, those that they give to their neighbours, (n, n_around).
        """
        members = [m for m in self.members if m.head.context_um is not None] if around else self.members
        return np.concatenate([member.head.scores(features, around=around) for member in members], axis=1)

    def expression(self, scores: np.ndarray, genes: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Predict expression, (n, genes) float32, from scores, for all genes or some of them."""
        out: np.ndarray | None = None
        start = 0
        for member in self.members:
            stop = start + member.head.n_scores
            part = np.float32(member.weight) * member.head.expression(scores[:, start:stop], genes)
            out = part if out is None else out + part
            start = stop
        assert out is not None  # for the type checker: there is a member
        return out

    def placed_scores(
        self, features: Mapping[Source, np.ndarray], coords_um: np.ndarray, sections: np.ndarray
    ) -> np.ndarray:
        """Return the scores of tiles with those of their neighbours, (n, n_scores) float32, for :meth:`expression`.

        Parameters
        ----------
        features
            By source, (n, d) each.
        coords_um, sections
            Positions in um, (n, 2), and sections, (n,).
        """
        around = self.scores(features, around=True) if self.radii_um else np.zeros((0, 0), dtype=np.float32)
        return self.joined(self.scores(features), around, self.neighbours(coords_um, sections))

    def neighbours(self, coords_um: np.ndarray, sections: np.ndarray) -> dict[float, Any]:
        """Return the matrices that average over neighbours within every radius of the reading, (n, n) each."""
        radii = {*self.radii_um, *([] if self.smooth_um is None else [self.smooth_um])}
        return {radius: neighbour_means(coords_um, sections, radius) for radius in radii}

    def joined(self, own: np.ndarray, around: np.ndarray, neighbours: Mapping[float, Any]) -> np.ndarray:
        """Return the scores of tiles with what their neighbours give, smoothed if the reading says so.

        Parameters
        ----------
        own, around
            Of all tiles, see :meth:`scores`.
        neighbours
            See :meth:`neighbours`.
        """
        own = self.with_context(own, around, neighbours)
        return own if self.smooth_um is None else self.smoothed(own, neighbours[self.smooth_um] @ own)

    def with_context(self, own: np.ndarray, around: np.ndarray, neighbours: Mapping[float, Any]) -> np.ndarray:
        """Return the scores of some tiles, (k, n_scores), with what tiles around them give, (n, n_around).

        The matrix of every radius is (k, n).
        """
        own = own.copy()
        for radius in self.radii_um:
            columns, given = self.columns(radius)
            own[:, columns] += (neighbours[radius] @ around[:, given]).astype(np.float32)
        return own

    def smoothed(self, scores: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return scores moved towards the mean of their neighbours: predictions are linear in them."""
        weight = np.float32(self.smooth_weight)
        return (1 - weight) * scores + weight * mean.astype(np.float32)


def share_weights(names: Sequence[str]) -> list[float]:
    """Return the weight of every member: networks share alike, and heads of one network alike."""
    networks = [name.partition(":")[0] for name in names]
    return [1 / (len(set(networks)) * networks.count(network)) for network in networks]
