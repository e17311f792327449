"""From features to genes: choose or average depths, ranks and penalties on held-out groups, then fit on all spots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd

from pekasc._expression import dense
from pekasc._options import Readout
from pekasc._sample import evenly_spaced
from pekasc._settings import get_logger
from pekasc.models.encoders import Depth
from pekasc.models.heads import (
    HeadFits,
    Inputs,
    Member,
    Reading,
    Source,
    Target,
    Tried,
    cuts_sections,
    head_fits,
    linear_head,
    neighbour_means,
    pitch_um,
    setting_weights,
    share_weights,
    spread,
    with_context,
)
from pekasc.models.runtime import processes
from pekasc.models.selection._choice import Choice, choose, mean_error
from pekasc.models.selection._folds import InnerFold
from pekasc.models.selection._inputs import Data, HeadSpec

logger = get_logger(__name__)
T = TypeVar("T")

RADII_UM = (150.0, 300.0, 500.0)
_SMOOTH_WEIGHTS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_SMOOTH_GENES = 512
_NEIGHBOURS = (3, 300)  # median number within a radius that is tried: fewer say little, more cost much
_PITCH, _WIDEST = 1.05, 2.0  # radius of the nearest neighbours in pitches, and how much wider it may be than was meant


@dataclass(frozen=True)
class Features:
    """Features of the training spots by source.

    Parameters
    ----------
    frozen
        By depth, (n, fields * d): those of the tile first, then those of wider fields of view.
    depth
        Depth of the adapted features.
    adapted
        Features of the adapters that predict, (n, d) each; none without any.
    inner
        Features of every inner fold's adapter, which was not trained on the held-out spots.
    n_fields
        Number of fields of view, the tile included.
    """

    frozen: Mapping[Depth, np.ndarray]
    depth: Depth
    adapted: Sequence[np.ndarray] = ()
    inner: Sequence[np.ndarray] = ()
    n_fields: int = 1

    def of(self, source: Source, fold: int | None) -> np.ndarray:
        """Return the features of a source, (n, d), in an inner fold or in the final fit (None)."""
        if source.network == "adapted":
            return self.adapted[source.adapter] if fold is None else self.inner[fold]
        if source.depth is not None and len(source.depth) > 1 and source.depth not in self.frozen:
            # blocks are kept one by one, each with all of its fields; those of a CNN differ in width
            parts = [self.of(source._replace(depth=(block,)), fold) for block in source.depth]
            return np.concatenate(parts, axis=1)
        whole = self.frozen[source.depth]
        width = whole.shape[1] // self.n_fields
        return whole[:, source.field * width : (source.field + 1) * width]


@dataclass(frozen=True)
class Fitted:
    """A reading, with what is needed to score it on the inner folds.

    Parameters
    ----------
    reading
        Fitted on all training spots.
    folds
        The same settings, fitted on every inner fold's training spots: what :meth:`Reading.use` would take.
    table
        Settings with their held-out error and weight.
    """

    reading: Reading
    folds: Sequence[Reading]
    table: pd.DataFrame


def choose_depth(
    features: Mapping[Depth, np.ndarray],
    data: Data,
    folds: Sequence[InnerFold],
    n_components: int | None,
    context_um: float | None = None,
    n_depths: int = 1,
) -> Choice:
    """Return the depth with the smallest held-out error of plain ridge, the same in every process."""
    inputs = None
    if context_um is not None:

        def inputs(x: np.ndarray, fold: InnerFold) -> np.ndarray:
            return with_context(x, data.coords_um, data.sections, context_um, fold)

    return processes.broadcast(choose(features, data.expression, folds, n_components, inputs, n_depths, data.panels))


def fixed_radius(readout: Readout) -> float | None:
    """Return the radius of the spatial context with which plain ridge chooses: as given, none for ``"auto"``."""
    return None if isinstance(readout.context_um, str) else readout.context_um


@dataclass
class Reader:
    """Fit readings on the features of the training spots; targets of heads are prepared once for all of them.

    Parameters
    ----------
    data
        The training spots.
    folds
        Inner folds.
    features
        Their features.
    """

    data: Data
    folds: Sequence[InnerFold]
    features: Features
    _fits: dict[Any, HeadFits] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict)

    def fits(self, head: str, readout: Readout) -> HeadFits:
        """Return the head on the expression of these spots."""
        key = (head, readout.n_components, readout.head_rank if head == "low-rank" else None)
        if key not in self._fits:
            d = self.data
            target = Target(d.expression, self.folds, d.every, d.weights, readout.head_rank, d.panels)
            self._fits[key] = head_fits(head, target, readout.n_components)
        return self._fits[key]

    def fit(self, spec: HeadSpec, depths: Sequence[Depth], *, stand_in: bool = False) -> Fitted:
        """Fit a reading.

        Parameters
        ----------
        spec
            The reading.
        depths
            Depths of the frozen features.
        stand_in
            Whether frozen features at the adapted depth take the place of adapted ones.
        """
        blend = spec.readout.head == "blend"
        names = spec.names(adapted=(stand_in and blend) or bool(self.features.adapted))
        members: list[Member] = []
        folds: list[list[Member]] = [[] for _ in self.folds]
        tables = []
        for name, weight in zip(names, share_weights(names), strict=True):
            candidates = self._candidates(name, spec, depths, stand_in)
            for variant, (sources, radii) in enumerate(self._variants(candidates, self.radii(spec.readout))):
                made, inner, table = self._members(name, spec.readout, sources, radii, inner=variant == 0)
                members += [replace(m, weight=weight * m.weight, variant=variant) for m in made]
                if variant == 0:
                    for own, part in zip(folds, inner, strict=True):
                        own += [replace(m, weight=weight * m.weight) for m in part]
                    tables.append(table)
        fitted = Fitted(Reading(tuple(members)), [Reading(tuple(own)) for own in folds], pd.concat(tables))
        return self.smoothed(fitted, spec.readout)

    def _candidates(self, name: str, spec: HeadSpec, depths: Sequence[Depth], stand_in: bool) -> list[list[Source]]:
        """Return the sources that a member reads side by side: one list for each of its candidates."""
        f = self.features
        wide = range(1, f.n_fields)
        if name.startswith("frozen:"):
            return [[Source("frozen", i, depth) for i in range(f.n_fields)] for depth in depths]
        network = "frozen" if stand_in else "adapted"
        own = [Source(network, 0, f.depth)]
        if spec.beside_frozen:
            own = [Source("frozen", 0, f.depth), *own]
        beside = [*own, *(Source("frozen", i, f.depth) for i in wide)]
        # the frozen half of a blend has the wider fields; whether the adapted half wants them, held-out groups say
        return [own, beside] if spec.readout.head == "blend" and beside != own else [beside]

    def _variants(
        self, candidates: list[list[Source]], radii: Sequence[float | None]
    ) -> list[tuple[list[list[Source]], Sequence[float | None]]]:
        """Return sources and radii with all there is, then with less: without fields, then without context, too."""
        out: list[tuple[list[list[Source]], Sequence[float | None]]] = [(candidates, radii)]
        narrow = [list(t) for t in dict.fromkeys(tuple(s for s in sources if s.field == 0) for sources in candidates)]
        if narrow != candidates:
            out.append((narrow, radii))
        if any(radius is not None for radius in radii):
            out.append((narrow, [None]))
        return out

    def _inputs(self, sources: Sequence[Source], context_um: float | None) -> Inputs:
        d, f = self.data, self.features

        def made(fold: int | None) -> np.ndarray:
            parts = [f.of(source, fold) for source in sources]
            x = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            return with_context(x, d.coords_um, d.sections, context_um, None if fold is None else self.folds[fold])

        # spots have the same neighbours in all folds where these are of whole sections
        shared = all(source.network == "frozen" for source in sources) and (context_um is None or not self._cuts)
        return Inputs(lambda: made(None), None if shared else made)

    @cached_property
    def _cuts(self) -> bool:
        return any(cuts_sections(self.data.sections, fold) for fold in self.folds)

    def _once(self, fit: Callable[[Inputs], T], sources: Sequence[Source], context_um: float | None) -> T:
        """Return what `fit`, the ``tried`` or ``final`` of a head, makes of some features.

        What it makes of tiles alone is kept, since it is asked for twice: beside context, and for tiles without
        positions.
        """
        if context_um is not None or any(source.field for source in sources):
            return fit(self._inputs(sources, context_um))
        key = (fit, tuple(sources))
        if key not in self._known:
            self._known[key] = fit(self._inputs(sources, None))
        return cast(T, self._known[key])

    def _errors(self, tried: Sequence[Tried]) -> np.ndarray:
        """Return the held-out error by candidate and setting, mean over folds weighted by held-out spots."""
        return np.array([mean_error(one.errors, self.folds) for one in tried])

    @cached_property
    def spread(self) -> float:
        """Relative difference of held-out errors that says little, from the numbers of held-out groups and spots."""
        groups = np.unique(np.concatenate([self.data.groups[fold.held_out] for fold in self.folds]))
        return spread(len(groups), sum(len(fold.held_out) for fold in self.folds))

    def _members(
        self, name: str, readout: Readout, sources: list[list[Source]], radii: Sequence[float | None], *, inner: bool
    ) -> tuple[list[Member], list[list[Member]], pd.DataFrame]:
        """Return heads fitted on all training spots; with `inner` those of folds; the settings that were tried.

        Radius, depth, rank and penalty are settings alike. There is a head per radius, and of adapted features one per
        adapter that predicts, all with the same settings.
        """
        fits = self.fits(name.partition(":")[2], readout)
        candidates = [(radius, parts) for radius in radii for parts in sources]
        tried = [self._once(fits.tried, parts, radius) for radius, parts in candidates]
        errors = processes.broadcast(self._errors(tried))
        weights = setting_weights(errors, readout.selection, self.spread)
        made: list[Member] = []
        folds: list[list[Member]] = [[] for _ in self.folds]
        for radius in radii:
            at = [i for i, (r, _) in enumerate(candidates) if r == radius and weights[i].any()]
            if not at:
                continue
            share = float(weights[at].sum())
            own, read = ([tried[i] for i in at], weights[at] / share), [candidates[i][1] for i in at]
            by_adapter = self._by_adapter(read)
            for parts in by_adapter:
                fitted = [self._once(fits.final, part, radius) for part in parts]
                head = linear_head(fits, *own, parts, fitted, fold=None, context_um=radius)
                made.append(Member(name, share / len(by_adapter), head))
            for fold in range(len(self.folds) if inner else 0):
                fitted = [tried[i].folds[fold] for i in at]
                head = linear_head(fits, *own, read, fitted, fold=fold, context_um=radius)
                folds[fold].append(Member(name, share, head))
        network, _, kind = name.partition(":")
        rows = [
            {
                "network": network, "head": kind, "depth": parts[0].depth, "context_um": radius or 0.0,
                "fields": sum(source.field > 0 for source in parts),
                "rank": 0 if rank is None else rank, "alpha": alpha, "error": errors[i, j], "weight": weights[i, j],
            }
            for i, (radius, parts) in enumerate(candidates)
            for j, (rank, alpha) in enumerate(fits.settings)
        ]  # fmt: skip
        return made, folds, pd.DataFrame(rows)

    def _by_adapter(self, read: list[list[Source]]) -> list[list[list[Source]]]:
        """Return sources by candidate for every adapter that predicts; as they are, if none is adapted."""
        if not any(source.network == "adapted" for parts in read for source in parts):
            return [read]
        return [
            [[s._replace(adapter=number) if s.network == "adapted" else s for s in parts] for parts in read]
            for number in range(len(self.features.adapted))
        ]

    def held_out(self, reading: Reading, fold: int) -> np.ndarray:
        """Return the scores of the held-out spots of a fold, by the reading that was fitted without them."""
        rows, d = self.folds[fold].held_out, self.data
        features = {source: self.features.of(source, fold)[rows] for source in reading.sources}
        return reading.placed_scores(features, d.coords_um[rows], d.sections[rows])

    def smoothed(self, fitted: Fitted, readout: Readout) -> Fitted:
        """Return the reading with the smoothing of its predictions whose held-out error is the smallest.

        The radius is that of the readout, or one of several for ``"auto"``; the weight may be 0. Some genes stand for
        all of them.
        """
        given = readout.smooth_um
        radii = ([] if given is None else [given]) if given != "auto" else self._radii
        if not radii:
            return fitted
        errors = np.zeros((len(radii), len(_SMOOTH_WEIGHTS)))
        genes = evenly_spaced(self.data.expression.shape[1], _SMOOTH_GENES)
        for i, (reading, fold) in enumerate(zip(fitted.folds, self.folds, strict=True)):
            rows, d = fold.held_out, self.data
            scores = self.held_out(reading, i)
            weights = np.ones(len(rows)) if d.weights is None else d.weights[rows]
            predicted = reading.expression(scores, genes)
            rest = dense(d.expression[rows][:, genes]) - predicted
            if d.panels is not None:
                rest = np.where(d.panels.of(rows, genes), rest, 0.0)
            for j, radius in enumerate(radii):
                mean = neighbour_means(d.coords_um[rows], d.sections[rows], radius) @ scores
                step = reading.expression(mean.astype(np.float32), genes) - predicted
                if d.panels is not None:
                    step = np.where(d.panels.of(rows, genes), step, 0.0)
                linear, square = weights @ (rest * step).sum(axis=1), weights @ (step * step).sum(axis=1)
                errors[j] += _SMOOTH_WEIGHTS**2 * square - 2 * _SMOOTH_WEIGHTS * linear
        best, k = divmod(int(processes.broadcast(int(errors.argmin()))), errors.shape[1])
        if not k:
            logger.info("Smoothing of predictions: none lowers the held-out error.")
            return fitted
        radius, weight = radii[best], float(_SMOOTH_WEIGHTS[k])
        logger.hint("Smoothing: predictions are mixed with %.0f %% of their mean within %g um.", 100 * weight, radius)
        return replace(
            fitted,
            reading=replace(fitted.reading, smooth_um=radius, smooth_weight=weight),
            folds=[replace(reading, smooth_um=radius, smooth_weight=weight) for reading in fitted.folds],
        )

    def radii(self, readout: Readout) -> tuple[float | None, ...]:
        """Return the radii of the spatial context to average or to choose from; None is no context."""
        if readout.context_um != "auto":
            return (readout.context_um,)
        return (None, *self._radii)

    @cached_property
    def _radii(self) -> list[float]:
        """Radii within which spots have several neighbours and not too many; the nearest ones count as several."""
        d = self.data
        found = []
        nearest = pitch_um(d.coords_um, d.sections)
        for radius in RADII_UM:
            # spots farther apart than a radius: the nearest ones in its place
            tried = math.ceil(nearest * _PITCH) if radius < nearest < _WIDEST * radius else radius
            count = float(np.median(n_neighbours(d.coords_um, d.sections, tried)))
            if _NEIGHBOURS[0] <= count <= _NEIGHBOURS[1]:
                found.append(float(tried))
        return sorted(set(found))


def n_neighbours(coords_um: np.ndarray, sections: np.ndarray, radius_um: float, sample: int = 2000) -> np.ndarray:
    """Return the number of neighbours of (a sample of) the spots within a radius, in their section."""
    from scipy.spatial import cKDTree

    at = evenly_spaced(len(coords_um), sample)
    counts = np.zeros(len(at), dtype=np.int64)
    for section in np.unique(sections[at]):
        rows = np.flatnonzero(sections == section)
        own = np.flatnonzero(sections[at] == section)
        tree = cKDTree(coords_um[rows])
        counts[own] = tree.query_ball_point(coords_um[at[own]], radius_um * (1 + 1e-3), return_length=True) - 1
    return counts
