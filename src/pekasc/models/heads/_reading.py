"""How an adapter reads features: the weighted mean of several heads, and what is left of it without context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pekasc.models.heads._context import neighbour_means
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
    smooth_um, smooth_weight
        Radius in um within which predictions are averaged over neighbours, and the weight of that average; None and 0
        without smoothing.
    """

    members: tuple[Member, ...]
    smooth_um: float | None = None
    smooth_weight: float = 0.0

    def use(self, *, context: bool = True, fields: bool = True) -> Reading:
        """Return one member of every name: the first that needs no more than there is. Weights sum to 1."""
        found: dict[str, Member] = {}
        for member in self.members:
            fits = (context or member.head.context_um is None) and (fields or not member.fields)
            if fits and member.name not in found:
                found[member.name] = member
        total = sum(member.weight for member in found.values())
        members = tuple(replace(member, weight=member.weight / total) for member in found.values())
        return Reading(members, self.smooth_um, self.smooth_weight) if context else Reading(members)

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
        around = self.scores(features, around=True) if self.context_um is not None else None
        return self.joined(self.scores(features), around, coords_um, sections)

    def joined(
        self, own: np.ndarray, around: np.ndarray | None, coords_um: np.ndarray, sections: np.ndarray
    ) -> np.ndarray:
        """Return the scores of tiles with those that their neighbours give, smoothed if the reading says so."""
        if self.context_um is not None:
            assert around is not None  # for the type checker
            own = own + (neighbour_means(coords_um, sections, self.context_um) @ around).astype(np.float32)
        if self.smooth_um is not None:
            own = self.smoothed(own, neighbour_means(coords_um, sections, self.smooth_um) @ own)
        return own

    def smoothed(self, scores: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return scores moved towards the mean of their neighbours: predictions are linear in them."""
        weight = np.float32(self.smooth_weight)
        return (1 - weight) * scores + weight * mean.astype(np.float32)


def share_weights(names: Sequence[str]) -> list[float]:
    """Return the weight of every member: networks share alike, and heads of one network alike."""
    networks = [name.partition(":")[0] for name in names]
    return [1 / (len(set(networks)) * networks.count(network)) for network in networks]
