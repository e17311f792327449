"""`tl.evaluate`: score predicted against measured expression, per gene and group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import Matrix, log1p_of_totals
from pekasc._keys import PEKA, TILES, check_key, score_key, target_key, write_uns
from pekasc._layers import missing_layer
from pekasc._measured import as_stored, measured, measured_counts, prediction_record, was_trained_on
from pekasc._obsm import measured_target, obsm_of, predicted_target
from pekasc._sections import check_table, get_table, positions_um, section_labels, tiled_table, writable_table
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.models.trust import COUNTS
from pekasc.tl._gene_scores import LEAST, Compared, score_group
from pekasc.tl._panels import measured_entries
from pekasc.tl._select import obs_groups

logger = get_logger(__name__)

METRICS = ("pearson", "ceiling", "reached", "spearman", "rmse", "morans_i_ratio", "coverage")


def evaluate(
    data: SpatialData | AnnData,
    *,
    layer: str = PEKA,
    target: str | Mapping[str, str] | None = None,
    truth: str | None = None,
    groups: str | None = None,
    include_train: bool = False,
    counts_layer: str | None = None,
    table_name: str = "table",
    key: str = TILES,
) -> pd.DataFrame:
    """Score predicted against measured expression, per gene and group.

    Spots that the adapter was trained on are left out: their scores say nothing about new tissue. If
    ``varm["measured"]``, a boolean DataFrame of genes x regions, says that a region did not measure a gene, the gene is
    scored on the spots of the other regions only, and NaN where no region of a group measured it.

    Parameters
    ----------
    data
        A SpatialData or AnnData with predictions in ``layers[layer]``.
    layer
        The predictions: name of the layer, which is the `key_added` of :func:`pekasc.tl.predict_expression`.
    target
        Key of the obsm whose columns were predicted, for an adapter of ``target={"obsm": key}``: scores its columns
        instead of genes. Spots where one of them is NaN or infinite were not measured, and are left out.
    truth
        Layer to compare with, on the scale of the predictions; by default log1p(1e4 * count / total) of the counts,
        with the totals recorded at prediction, or, of an adapter with ``target="as_is"``, the layer it was trained on.
        With `target`, another key of obsm with the same columns.
    groups
        Column of obs; scores are taken within each group. By default sections.
    include_train
        Score training spots as well.
    counts_layer
        Layer with counts. By default ``X`` if it holds counts, else ``layers["counts"]``.
    table_name
        Name of the table in a SpatialData.
    key
        Name of the tiles, from which positions are taken.

    Returns
    -------
    One row per gene and group: ``gene``, ``group``, ``n_spots``, ``pearson``, ``ceiling`` (the largest ``pearson`` that
    counting noise allows, see Notes), ``reached`` (``pearson`` over ``ceiling``), ``spearman``, ``rmse``,
    ``variance_explained`` (1 - mean squared error over the variance of the measured values within the group, so that
    the group's own mean has 0; below 0 where a patient's level is missed, however good the map), ``morans_i_measured``,
    ``morans_i_predicted``, ``morans_i_ratio`` (predicted over measured; Moran's I over six nearest neighbours within
    sections, mean over the group's sections weighted by spots; the ratio is NaN for genes whose measured Moran's I is
    nowhere significant at 5 %). Scores of a gene that is constant in a group are NaN, and so are those of a gene that
    the group did not measure (``n_spots`` 0). Of a calibrated adapter (:func:`pekasc.tl.calibrate`), before ``rmse``:
    ``coverage``, the share of measurements in their interval at the spot's own total; ``coverage_randomised``, the same
    with the ends of an interval of counts taken in part, so that it can be the level exactly (a closed interval of
    counts covers a little more); ``width``, of the intervals on average, on the scale of the predictions; and
    ``calibration_error``, ``coverage_randomised`` less the level (below 0: intervals are too narrow in that group).

    Also writes, as mean over groups, ``var["{layer}_pearson"]``, ``var["{layer}_ceiling"]``,
    ``var["{layer}_spearman"]``, ``var["{layer}_rmse"]``, ``var["{layer}_morans_i_ratio"]`` and, of a calibrated
    adapter, ``var["{layer}_coverage"]``, and the first over the second as ``var["{layer}_reached"]``; NaN where a gene
    is not predicted. With `target`, ``gene`` is the column, and the DataFrame is kept in
    ``uns["pekasc"]["X_{layer}_{target}"]["scores"]`` instead, until the next prediction.

    Raises
    ------
    KeyError
        If a layer or column is not there.
    ValueError
        If there are no predictions, the adapter was trained on all predicted spots, or an argument does nothing with
        `target`.

    Notes
    -----
    The ceiling is the root of the reliability of the measured values: counts are thinned into two halves, whose
    correlation is carried over to the whole depth. It is an upper bound, since it knows of no noise but that of drawing
    counts: overdispersion and dropout lower it further. Of n spots, ceilings below about n ** -0.25 (0.27 of 200 spots)
    cannot be told from 0. It is NaN where measured values are not log1p of counts (`truth`, `target`, adapters of
    ``target="as_is"``).

    References
    ----------
    Moran's I: squidpy's ``gr.spatial_autocorr``. Thinning of counts: Neufeld et al., Biostatistics 2024. Reliability of
    halves: Spearman, Brown, British Journal of Psychology 1910.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=2, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, train=["P1S1_spots"], progress=False)
    >>> pk.tl.predict_expression(sdata, adapter, progress=False)
    >>> scores = pk.tl.evaluate(sdata)
    >>> sorted(scores["group"].unique())
    ['P2S1_spots']
    """
    check_key(layer, argument="layer")
    table_name = tiled_table(data, table_name)
    table = get_table(data, table_name)
    check_table(table)
    if target is None:
        found = _of_genes(table, layer, truth, counts_layer, include_train)
    else:
        key_of_target = obsm_of({"obsm": target} if isinstance(target, str) else target)
        if counts_layer is not None:
            raise ValueError("`counts_layer=` does nothing with `target=`, whose values are compared as stored.")
        found = _of_target(table, layer, str(key_of_target), truth, include_train)
    labels = obs_groups(table, groups, found.rows)
    positions = positions_um(data, table_name=table_name, key=key)[found.rows]
    sections = section_labels(table)[found.rows]
    unplaced = ~np.isfinite(positions).all(axis=1)
    if unplaced.any():
        raise ValueError(
            f"{int(unplaced.sum())} spots of {sorted(set(sections[unplaced]))} have values in {found.where} but no "
            "position in um, since those sections came after the tiling. Run `pekasc.pp.tile(sdata)` again."
        )
    spots = Compared(
        found.names,
        found.predicted,
        found.measured,
        positions,
        sections,
        found.known,
        found.counts,
        found.totals,
        _intervals(table, found, truth),
    )
    frames = []
    for group in np.unique(labels):
        at = np.flatnonzero(labels == group)
        if at.size < LEAST:
            warn_user(f"Group {group!r} has {at.size} spots: too few to score.")
            continue
        frames.append(score_group(str(group), spots.take(at)))
    if not frames:
        raise ValueError(f"No group has the {LEAST} spots that a score needs: join groups, or leave `groups=` out.")
    scores = pd.concat(frames, ignore_index=True)
    _report_constant(scores, "genes" if target is None else "columns")
    table = writable_table(data, table_name)
    if target is not None:
        write_uns(table, found.record, {**prediction_record(table, found.record), "scores": scores}, kind="prediction")
        return scores
    wanted = [metric for metric in METRICS if metric in scores]  # coverage, if the adapter was calibrated
    mean = scores.groupby("gene", sort=False)[wanted].mean()
    mean["reached"] = _share_reached(scores)
    mean = mean.reindex(table.var_names)
    for metric in wanted:
        table.var[score_key(layer, metric)] = mean[metric].to_numpy()
    return scores


def _intervals(table: AnnData, found: _Found, truth: str | None) -> Mapping[str, Any] | None:
    """Return what is recorded of intervals around the predictions, if the measured values are what they are of."""
    record = prediction_record(table, found.record).get("intervals")
    if not isinstance(record, Mapping) or truth is not None:
        return None
    return record if (record["kind"] == COUNTS) == (found.counts is not None) else None


@dataclass(frozen=True, eq=False)
class _Found:
    """Predicted and measured values to compare.

    Parameters
    ----------
    names
        Names of the genes, or of the columns of a target.
    rows
        Rows of the table, without training spots and spots that were not measured.
    predicted, measured
        Their values, (rows, names).
    record
        Key of the record of the predictions in ``uns["pekasc"]``.
    where
        The slot of the predictions, for errors.
    known
        Which of them were measured, (rows, names) bool; None: all.
    counts, totals
        See :class:`pekasc.tl._gene_scores.Compared`.
    """

    names: pd.Index
    rows: np.ndarray
    predicted: np.ndarray
    measured: Matrix
    record: str
    where: str
    known: np.ndarray | None = None
    counts: Matrix | None = None
    totals: np.ndarray | None = None


def _of_genes(
    table: AnnData, layer: str, truth: str | None, counts_layer: str | None, include_train: bool
) -> _Found:  # fmt: skip
    if layer not in table.layers:
        raise missing_layer(table, layer, of_target="`pekasc.tl.evaluate(sdata, target={!r})`")
    predicted_all = _layer(table, layer)
    genes = ~np.isnan(predicted_all).all(axis=0)
    if not genes.any():
        raise _no_predictions(f"layers[{layer!r}]")
    rows = np.flatnonzero(~np.isnan(predicted_all[:, genes]).all(axis=1))
    rows = _without_training(table, rows, layer, include_train)
    there = _measured(table, layer, rows, np.flatnonzero(genes), truth, counts_layer)
    rows = there.rows
    predicted = predicted_all[np.ix_(rows, genes)]
    _check_whole(predicted, "genes", f"layer {layer!r}")
    known = measured_entries(table, rows, np.flatnonzero(genes))
    where = f"layers[{layer!r}]"
    return _Found(
        table.var_names[genes], rows, predicted, there.values, layer, where, known, there.counts, there.totals
    )


def _no_predictions(where: str) -> ValueError:
    return ValueError(f"{where} holds no predictions: all values are NaN. `pekasc.tl.predict_expression` writes them.")


def _of_target(table: AnnData, layer: str, key: str, truth: str | None, include_train: bool) -> _Found:
    frame = predicted_target(table, layer, key)
    where = f"obsm[{target_key(layer, key)!r}]"
    rows = np.flatnonzero(frame.notna().any(axis=1).to_numpy())
    if not rows.size:
        raise _no_predictions(where)
    rows = _without_training(table, rows, layer, include_train)
    argument = "target" if truth is None else "truth"
    values = measured_target(table, key if truth is None else truth, frame.columns, argument=argument)[rows]
    known = np.isfinite(values).all(axis=1)
    if not known.any():
        raise ValueError(
            f"obsm[{truth or key!r}] is NaN or infinite in all {rows.size} spots that could be scored: name measured "
            "values with `truth=`."
        )
    if not known.all():
        logger.hint("%d of %d spots left out: obsm[%r] has no values there.", (~known).sum(), rows.size, truth or key)
    predicted = frame.to_numpy(dtype=np.float32)[rows[known]]
    _check_whole(predicted, "columns", where)
    return _Found(frame.columns, rows[known], predicted, values[known], target_key(layer, key), where)


def _check_whole(predicted: np.ndarray, what: str, where: str) -> None:
    if np.isnan(predicted).any():
        bad = int(np.isnan(predicted).any(axis=0).sum())
        raise ValueError(
            f"{bad} {what} of {where} are predicted in some spots only: it holds predictions of several "
            "adapters. Evaluate tables of the parts that belong together."
        )


class _Measured(NamedTuple):
    """Measured expression, spots x genes, rows of the spots with measurements, and the counts and totals, if any."""

    values: Matrix
    rows: np.ndarray
    counts: Matrix | None = None
    totals: np.ndarray | None = None


def _measured(
    table: AnnData, layer: str, rows: np.ndarray, genes: np.ndarray, truth: str | None, counts_layer: str | None
) -> _Measured:
    if truth is not None:
        if truth not in table.layers:
            raise missing_layer(table, truth, measured=True)
        values = _layer(table, truth)[np.ix_(rows, genes)]
        entries = measured_entries(table, rows, genes)
        if (np.isnan(values) if entries is None else np.isnan(values) & entries).any():
            raise ValueError(
                f"The layer {truth!r} (`truth=`) has NaN in {int(np.isnan(values).any(axis=0).sum())} of the genes "
                "that are predicted: evaluate the spots and genes that were measured."
            )
        return _Measured(values, rows)
    if as_stored(table, layer):
        return _Measured(measured(table, layer, counts_layer)[0][rows][:, genes], rows)
    raw, total = measured_counts(
        table, layer, counts_layer, otherwise=", or a layer on the scale of the predictions (`truth=`)"
    )
    known = total[rows] > 0
    if not known.all():
        # spots without counts were not measured: their zeros do not mean zero expression
        logger.hint("%d of %d spots left out: they have no counts.", (~known).sum(), rows.size)
    rows = rows[known]
    raw, total = raw[rows][:, genes], total[rows]
    return _Measured(log1p_of_totals(raw, total), rows, raw, total)


def _layer(table: AnnData, layer: str) -> np.ndarray:
    value = table.layers[layer]
    return np.asarray(value.toarray() if hasattr(value, "toarray") else value, dtype=np.float32)


def _without_training(table: AnnData, rows: np.ndarray, layer: str, include_train: bool) -> np.ndarray:
    column = f"{layer}_train"
    if include_train or column not in table.obs:
        return rows
    trained = was_trained_on(table, layer)[rows]
    if trained.all():
        if "measured" in prediction_record(table, layer):
            raise ValueError(
                f"layers[{layer!r}] is pulled to what was measured at its spots, or the adapter was trained on "
                "them: no spots are left to score. Hold some out of the table of `measured_table=`, or predict without "
                "`measured=`. `include_train=True` scores these spots all the same."
            )
        raise ValueError(
            "The adapter was trained on every spot that it predicted, so no held-out spots are left to score. "
            "Hold some out (`fit_adapter(train=...)`); its scores on groups held out during training are in "
            "`adapter.gene_scores`. `include_train=True` scores training spots all the same."
        )
    if trained.any():
        pulled = ", or predictions pulled to them" if "measured" in prediction_record(table, layer) else ""
        logger.hint(
            "%d of %d spots left out: the adapter was trained on them, or within half a tile%s.",
            trained.sum(), rows.size, pulled,
        )  # fmt: skip
    return rows[~trained]


def _share_reached(scores: pd.DataFrame) -> pd.Series:
    """Return the mean correlation of every gene over the mean ceiling, of the groups that have both."""
    both = scores[scores["pearson"].notna() & scores["ceiling"].notna()]
    mean = both.groupby("gene", sort=False)[["pearson", "ceiling"]].mean()
    return (mean["pearson"] / mean["ceiling"]).where(mean["ceiling"] > 0)


def _report_constant(scores: pd.DataFrame, what: str) -> None:
    constant = scores.loc[scores["pearson"].isna() & (scores["n_spots"] > 0), "gene"].unique()
    if constant.size:
        warn_user(
            f"{constant.size} {what} are constant in a group, so their correlation there is NaN: "
            f"{list(constant[:3])}{', ...' if constant.size > 3 else ''}."
        )
