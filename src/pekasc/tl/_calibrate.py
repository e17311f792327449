"""`tl.calibrate`: intervals around predictions, by how far off they are on groups that the model has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import (
    TARGETS,
    Matrix,
    count_totals,
    counts,
    dense,
    gene_columns,
    gene_names,
    no_overlap_message,
    target_matrix,
)
from pekasc._keys import GRID, TILES, read_uns
from pekasc._obsm import measured_target
from pekasc._options import Compute, resolve, unused_in_embedding
from pekasc._sections import check_table, get_table, section_labels, tiled_table
from pekasc._settings import get_logger
from pekasc._text import number
from pekasc._warnings import warn_user
from pekasc.models import Adapter
from pekasc.models.trust import (
    EXACT,
    FEW_GROUPS,
    MOST_SPOTS,
    UNSEEN,
    Block,
    Calibration,
    check_groups,
    check_level,
    from_held_out,
    group_quantiles,
    held_out,
    usable,
)
from pekasc.tl._panels import measured_entries
from pekasc.tl._predict_checks import other_sections
from pekasc.tl._predict_genes import columns_of, columns_of_totals, warn_of_other_totals
from pekasc.tl._predict_rows import LayerSpec, layer_parts, tile_scores, trained_on
from pekasc.tl._read import ensure_tiles, untiled_on_error
from pekasc.tl._section_features import on_device
from pekasc.tl._select import default_groups, obs_groups

logger = get_logger(__name__)

_ROWS = 4096  # predicted at once
_KEPT = 2**29  # bytes of predictions
_LEAST_SPOTS = 200  # of a group that are kept
_GENES = 512  # scored at once


def calibrate(
    adapter: Adapter,
    sdata: SpatialData | None = None,
    *,
    groups: str | None = None,
    level: float = 0.9,
    guarantee: Literal["approximate", "exact"] = "approximate",
    layer: str | None = None,
    gene_key: str | None = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    table_name: str = "table",
    key: str = TILES,
    random_state: int = 0,
    progress: bool = True,
) -> Adapter:
    """Give an adapter intervals around its predictions, per gene, with coverage on groups that it has not seen.

    Intervals belong to counts. Around the predicted rate, counts of a spot are negative binomial at its total; mean
    and dispersion of every gene are those of held-out spots. How wide the interval must be follows from scores on
    held-out *groups* (conformal prediction): spots of one section are not exchangeable, those of exchangeable patients
    are alike. Values of another target have intervals of residuals.

    Without `sdata`, scores are those of the held-out training groups that the fit kept: at most three inner folds, by
    models that saw less than the last fit. With it, those of sections that the adapter never saw.

    Two intervals come out. That of the **rate** is what a slide that nobody sequenced has;
    :func:`pekasc.tl.predict_expression` writes it beside the prediction. That of a **measurement** at a given total is
    :func:`pekasc.get.interval`, and its coverage is what :func:`pekasc.tl.evaluate` reports.

    Parameters
    ----------
    adapter
        An adapter from :func:`pekasc.tl.fit_adapter`.
    sdata
        Sections with measured expression that the adapter was not trained on.
    groups
        Column of obs with the groups of `sdata`. By default ``"patient"``, if there are two or more, else sections.
    level
        Probability that an interval holds the measurement, above 0 and below 1.
    guarantee
        ``"approximate"``: groups count alike, and nothing is promised. ``"exact"``: the level holds, gene by gene, for
        a spot drawn from a new group that is exchangeable with those of `sdata`, on average over spots and such groups.
        Over K groups it reaches K / (K + 1): 0.9 needs nine. No group may be one of the training, and no section or
        patient in two.
    layer
        Layer of the counts in `sdata`, or of the values as stored. By default that of the training, if it is there.
    gene_key
        Column of var with the gene names of the adapter; by default ``var_names``.
    compute
        A :class:`pekasc.Compute`, or a mapping of its fields: ``device``, ``precision``, ``embed_batch_size``,
        ``max_memory`` and ``client``.
    table_name, key
        Names of the table and of its tiles.
    random_state
        Seed. Counts are discrete: a score is drawn within the step of their distribution.
    progress
        Show a progress bar.

    Returns
    -------
    A new :class:`pekasc.Adapter` with intervals, which is saved with it; that given stays as it was.

    Raises
    ------
    TypeError
        If `adapter` is no adapter.
    ValueError
        If `level` or `guarantee` is invalid, there are too few groups for the level, the adapter was trained on tissue
        of `sdata`, it has no held-out predictions (saved by an earlier version) and there is no `sdata`, or arguments
        about `sdata` are given without it.
    KeyError
        If a column or layer is not there.

    References
    ----------
    Lee, Barber, Willett. Distribution-free inference with hierarchical data. arXiv:2306.06342. Scores of counts:
    randomised probability integral transform.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, train=["P1S1_spots", "P2S1_spots"], progress=False)
    >>> adapter = pk.tl.calibrate(adapter)
    >>> pk.tl.predict_expression(sdata, adapter, progress=False)
    >>> low, high = pk.get.interval(sdata)
    >>> low.shape == sdata["table"].shape
    True
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"`adapter` must be a pekasc.Adapter, got {type(adapter).__name__}.")
    check_level(level, guarantee)
    if sdata is None:
        given = {"groups": groups, "layer": layer, "gene_key": gene_key, "compute": compute}
        useless = [name for name, value in given.items() if value is not None]
        if useless:
            raise ValueError(f"`{useless[0]}=` does nothing without `sdata=`: give sections, or leave it out.")
        made = _from_fit(adapter, level, guarantee)
    else:
        if adapter.held_out is None and guarantee == EXACT:
            raise ValueError(
                "This adapter has no held-out predictions, which the noise of an exact interval is taken from: it was "
                'saved by an earlier version. Fit it again, or take `guarantee="approximate"`.'
            )
        how = on_device(resolve(compute, Compute, "compute", unused=unused_in_embedding()))
        table_name = tiled_table(sdata, table_name)
        with untiled_on_error(sdata, table_name=table_name, key=key):
            random = np.random.default_rng(random_state)
            promised = (level, guarantee)
            found = _unseen(adapter, sdata, groups, promised, layer, gene_key, how, table_name, key, progress, random)
        made = _from_sections(adapter, found, level, guarantee, random)
    without = int(np.isnan(made.threshold).sum())
    if without == len(adapter.genes):
        raise ValueError(
            f"No gene has an interval at level {level:g}: each was measured by too few of the {len(made.groups)} "
            "groups, never varied, or lies farther off than any interval reaches. Lower `level`, or add groups."
        )
    logger.hint("%s.%s", made.text, f" {number(without, 'gene')} without an interval." if without else "")
    if len(made.groups) < FEW_GROUPS:
        warn_user(
            f"Intervals from {number(len(made.groups), 'group')}: how far groups differ is hardly "
            "known from so few, and intervals may cover less in a new one. Calibrate on more sections that the "
            "adapter never saw (`sdata=`)."
        )
    return replace(adapter, calibration=made)


def _from_fit(adapter: Adapter, level: float, guarantee: str) -> Calibration:
    if guarantee == EXACT:
        raise ValueError(
            '`guarantee="exact"` needs sections that the adapter never saw: give them as `sdata=`. The inner folds of '
            "a fit, at most three, promise nothing about the model that was fitted last."
        )
    if adapter.held_out is None:
        raise ValueError(
            "This adapter has no held-out predictions: it was saved by an earlier version. Fit it again, or calibrate "
            "it on sections that it never saw (`sdata=`)."
        )
    return from_held_out(adapter.held_out, level)


@dataclass(frozen=True, eq=False)
class _Unseen:
    """Predicted and measured values of sections that the adapter never saw.

    Parameters
    ----------
    groups
        Names of the groups.
    blocks
        Some spots of every group, section by section.
    """

    groups: list[str]
    blocks: list[Block]


def _unseen(
    adapter: Adapter, sdata: SpatialData, groups: str | None, promised: tuple[float, str], layer: str | None,
    gene_key: str | None, compute: Compute, table_name: str, key: str, progress: bool, random: np.random.Generator,
) -> _Unseen:  # fmt: skip
    table = get_table(sdata, table_name)
    check_table(table)
    measured = _measured(table, adapter, layer, gene_key)
    sections, spec = ensure_tiles(sdata, table_name=table_name, key=key, spec=adapter.spec)
    adapter.check_tiles(spec.tile_px, spec.mpp)
    tiled = np.zeros(table.n_obs, dtype=bool)
    tiled[np.concatenate([section.rows for section in sections])] = True
    rows = np.flatnonzero(tiled & measured.rows)
    if not rows.size:
        raise ValueError("No spot of `sdata` has both a tile and measured values, so there is nothing to calibrate on.")
    trained = trained_on(adapter, sections, spec, table.n_obs)[rows]
    if trained.any():
        seen = sorted(set(section_labels(table)[rows[trained]]))
        raise ValueError(
            f"The adapter was trained on {int(trained.sum())} of the {rows.size} measured spots, in {seen}, where its "
            "errors are smaller than on new tissue. Calibrate on other sections"
            f"{other_sections(sdata, sections, seen, key)}, or without `sdata=`, on what was held out inside the "
            "training."
        )
    label = obs_groups(table, default_groups(table, rows) if groups is None else groups, rows)
    names = [str(name) for name in dict.fromkeys(np.sort(label))]
    check_groups(len(names), *promised)
    _check_apart(adapter, table, rows, label, exact=promised[1] == EXACT)
    most = int(np.clip(_KEPT // (4 * len(adapter.genes) * len(names)), _LEAST_SPOTS, MOST_SPOTS))
    kept = np.sort(np.concatenate([_some(rows[label == name], most, random) for name in np.unique(label)]))
    scores, _ = tile_scores(
        adapter, sections, spec, n_obs=table.n_obs, store=None, compute=compute, progress=progress
    )  # fmt: skip
    adapter = replace(adapter, reading=scores.reading)
    every = np.arange(len(adapter.genes))
    spots = LayerSpec((table.n_obs, every.size), every, every, read_uns(table, GRID) is not None)
    parts = [slice(start, min(start + _ROWS, table.n_obs)) for start in range(0, table.n_obs, _ROWS)]
    parts = [part for part in parts if ((kept >= part.start) & (kept < part.stop)).any()]
    predicted = np.concatenate(
        [
            values[kept[(kept >= part.start) & (kept < part.stop)] - part.start]
            for part, values in layer_parts(adapter, scores, sections, spots, parts)
        ]
    )
    group_of = dict(zip(rows, label.astype(str), strict=True))
    group, section = np.array([group_of[row] for row in kept]), section_labels(table)[kept]
    blocks = []
    for index, name in enumerate(names):
        for one in np.unique(section[group == name]):
            at = np.flatnonzero((group == name) & (section == one))
            known = measured.known(table, kept[at])
            blocks.append(
                Block(
                    name, index, partial(_columns, predicted[at]), partial(_columns, measured.values[kept[at]]),
                    None if measured.totals is None else measured.totals[kept[at]], known,
                )
            )  # fmt: skip
    return _Unseen(names, blocks)


def _some(rows: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    return rows if rows.size <= most else random.choice(rows, most, replace=False)


def _check_apart(adapter: Adapter, table: AnnData, rows: np.ndarray, label: np.ndarray, *, exact: bool) -> None:
    """Check that groups are none of the training, and that neither a section nor a patient is in two of them."""
    why = ""
    known = sorted(set(label.astype(str)) & set(adapter.info["groups"]))
    if known:
        why = f"{known[:3]} are names of training groups: more tissue of a training patient is no new group"
    for what, values in (("section", section_labels(table)[rows]), ("patient", table.obs.get("patient"))):
        if why or values is None:
            continue
        values = np.asarray(values if what == "section" else values.astype(str).to_numpy()[rows])
        split = pd.Series(label.astype(str)).groupby(values).nunique()
        if (split > 1).any():
            why = f"{what} {split.index[split > 1][0]!r} is in {split.max()} groups, which are not independent then"
    if why and exact:
        raise ValueError(f'`guarantee="exact"` does not hold: {why}. Take other sections or `groups=`.')
    if why:
        warn_user(f"Intervals may cover less in a new group: {why}.")


def _columns(values: Matrix, part: slice) -> np.ndarray:
    return dense(values[:, part])


@dataclass(frozen=True, eq=False)
class _Measured:
    """Measured values of an adapter's genes or columns, (n_obs, genes), in a table.

    Parameters
    ----------
    values
        Counts, or values of another target.
    totals
        Total count of every row; None of another target.
    rows
        Rows that were measured.
    columns
        Columns of the table; -1 where it lacks a gene. None of a target in obsm, which has all columns.
    """

    values: Matrix
    totals: np.ndarray | None
    rows: np.ndarray
    columns: np.ndarray | None

    def known(self, table: AnnData, rows: np.ndarray) -> np.ndarray:
        """Return which genes a section measured, (genes,) bool."""
        if self.columns is None:
            return np.ones(self.values.shape[1], dtype=bool)
        there = self.columns >= 0
        entries = measured_entries(table, rows[:1], self.columns[there])
        known = there.copy()
        if entries is not None:
            known[there] = entries[0]
        return known


def _measured(table: AnnData, adapter: Adapter, layer: str | None, gene_key: str | None) -> _Measured:
    if layer is None:
        layer = adapter.info.get("layer") or None
        layer = layer if layer in table.layers else None
    target = adapter.target_key
    if target is not None:
        values = measured_target(table, target, pd.Index(adapter.genes))
        return _Measured(values, None, np.isfinite(values).all(axis=1), None)
    of_genes = gene_columns(table)
    names = gene_names(table, gene_key, of_genes)
    columns = columns_of(names, adapter.genes, of_genes)
    if (columns < 0).all():
        raise ValueError(no_overlap_message(names, adapter.genes, table))
    if (columns < 0).any():
        missing = [gene for gene, i in zip(adapter.genes, columns, strict=True) if i < 0]
        warn_user(
            f"Genes that are not in the table get no interval: {len(missing)} of the adapter's {len(adapter.genes)} "
            f"(such as {missing[:3]})."
        )
    if adapter.info["target"] == TARGETS["as_is"]:
        values = target_matrix(table, layer, "as_is")[:, np.maximum(columns, 0)]
        return _Measured(values, None, np.ones(table.n_obs, dtype=bool), columns)
    raw = counts(table, layer)
    over = columns_of_totals(adapter, names, of_genes)
    over = of_genes if over is None else over
    warn_of_other_totals(adapter, over.size)
    totals = count_totals(raw, over)
    return _Measured(raw[:, np.maximum(columns, 0)], totals, totals > 0, columns)


def _from_sections(
    adapter: Adapter, found: _Unseen, level: float, guarantee: str, random: np.random.Generator
) -> Calibration:
    n_genes = len(adapter.genes)
    if adapter.held_out is None:
        return replace(from_held_out(held_out(found.blocks, n_genes), level), source=UNSEEN)
    noise, threshold = adapter.held_out.noise, np.empty(n_genes)
    for start in range(0, n_genes, _GENES):
        part = slice(start, min(start + _GENES, n_genes))
        of = noise.take(part)
        by_group = []
        for name in found.groups:
            own = []
            for block in (block for block in found.blocks if block.group == name):
                ends = of.scores(block.predicted(part), block.measured(part), block.totals)
                own.append(np.where(block.known[part], of.drawn(ends, random), np.nan))
            by_group.append(np.concatenate(own))
        threshold[part] = group_quantiles(by_group, level, exact=guarantee == EXACT)
    return Calibration(noise, usable(noise, threshold), float(level), guarantee, tuple(found.groups), UNSEEN)
