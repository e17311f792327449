"""How an adapter reads features: the weighted mean of several heads, and what is left of it without context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pekasc.models.heads._linear import LinearHead, Source


@dataclass(frozen=True)
class Member:
    """One head of a reading.

    Parameters
    ----------
    name
        Network and head, such as ``"frozen:low-rank"``. Several members may have one name: fitted with and without
        spatial context, or wider fields of view; only the first that can be used is.
    weight
        Its weight in the mean.
    head
        The fitted head.
    """

    name: str
    weight: float
    head: LinearHead

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
        The members; of those with one name, the one that reads most comes first.
    """

    members: tuple[Member, ...]

    def use(self, *, context: bool = True, fields: bool = True) -> Reading:
        """Return one member of every name: the first that needs no more than there is. Weights sum to 1."""
        found: dict[str, Member] = {}
        for member in self.members:
            fits = (context or member.head.context_um is None) and (fields or not member.fields)
            if fits and member.name not in found:
                found[member.name] = member
        total = sum(member.weight for member in found.values())
        return Reading(tuple(replace(member, weight=member.weight / total) for member in found.values()))

    @property
    def context_um(self) -> float | None:
        """Radius of the spatial context in um; None without."""
        radii = [m.head.context_um for m in self.members if m.head.context_um is not None]
        return max(radii) if radii else None

    @property
    def sources(self) -> list[Source]:
        """The features that its members read."""
        return list(dict.fromkeys(source for member in self.members for source in member.head.sources))

    @property
    def n_scores(self) -> int:
        """Number of scores of all members."""
        return sum(member.head.n_scores for member in self.members)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.members[0].head.intercept)

    def scores(self, features: Mapping[Source, np.ndarray], *, around: bool = False) -> np.ndarray:
        """Return the scores of tiles, (n, n_scores) float32; see :meth:`LinearHead.scores`."""
        return np.concatenate([member.head.scores(features, around=around) for member in self.members], axis=1)

    def expression(self, scores: np.ndarray, genes: slice = slice(None)) -> np.ndarray:
        """Predict expression, (n, genes) float32, from scores, for all genes or a slice of them."""
        out: Any = 0
        start = 0
        for member in self.members:
            stop = start + member.head.n_scores
            out = out + np.float32(member.weight) * member.head.expression(scores[:, start:stop], genes)
            start = stop
        return out

    def predict(self, features: Mapping[Source, np.ndarray], around: Any = None) -> np.ndarray:
        """Predict expression, (n, genes) float32, from features by source.

        Parameters
        ----------
        features
            Shape (n, d) each.
        around
            Matrix that averages over the neighbours of every tile, (n, n); needed for spatial context.
        """
        scores = self.scores(features)
        if around is not None:
            scores += np.asarray(around @ self.scores(features, around=True), dtype=np.float32)
        return self.expression(scores)


def share_weights(names: Sequence[str]) -> list[float]:
    """Return the weight of every member: networks share alike, and heads of one network alike."""
    networks = [name.partition(":")[0] for name in names]
    return [1 / (len(set(networks)) * networks.count(network)) for network in networks]
