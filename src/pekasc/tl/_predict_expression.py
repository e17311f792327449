"""`tl.predict_expression`: predict expression with an adapter, into a layer or a new table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import TARGETS, gene_columns, gene_names
from pekasc._keys import (
    GRID,
    PEKA,
    TILES,
    check_free,
    check_key,
    feature_key,
    kriging_sd_key,
    novelty_key,
    read_uns,
    score_key,
    total_check_key,
    total_key,
    write_uns,
)
from pekasc._measured import check_measured, prediction_record
from pekasc._options import RESULT_MEMORY, Compute, resolve, unused_in_embedding
from pekasc._sections import (
    check_table,
    get_table,
    present_table,
    table_digest,
    tiled_table,
    writable_table,
)
from pekasc._settings import get_logger
from pekasc._totals import totals_to_record
from pekasc.models import Adapter
from pekasc.models.adapter import wanted_index
from pekasc.models.trust import interval_record
from pekasc.tl._evaluate import METRICS
from pekasc.tl._predict_checks import (
    adapter_record,
    check_columns,
    check_layer,
    check_size,
    check_stride,
    check_trained,
)
from pekasc.tl._predict_genes import columns_of, columns_of_totals, warn_of_other_totals
from pekasc.tl._predict_measured import adapter_digest, measured_pull, prediction_inputs_digest
from pekasc.tl._predict_rows import LayerSpec, layer_parts, store_predictions, tile_scores, trained_on
from pekasc.tl._predict_spots import spots_table
from pekasc.tl._predict_table import check_table_added, keep_others, new_table_of, without_genes
from pekasc.tl._predict_target import predict_target
from pekasc.tl._predict_trust import (
    abstained,
    bounds,
    check_abstain,
    left_out,
    remove_trust,
    warn_of_novel_sections,
    write_bounds,
    write_levels,
)
from pekasc.tl._read import ensure_tiles, untiled_on_error
from pekasc.tl._section_features import check_store, on_device

logger = get_logger(__name__)


def predict_expression(
    sdata: SpatialData,
    adapter: Adapter,
    *,
    key_added: str = PEKA,
    genes: Sequence[str] | None = None,
    table_added: str | None = None,
    gene_key: str | None = None,
    store: str | Path | None = None,
    abstain: float | None = None,
    measured: Literal["kriging"] | None = None,
    measured_table: str | None = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    table_name: str = "table",
    key: str = TILES,
    progress: bool = True,
) -> None:
    """Predict expression from tiles with an adapter, as a layer beside the measured counts or as a new table.

    An adapter of another target, ``fit_adapter(target={"obsm": key})``, predicts the columns of that obsm.

    Parameters
    ----------
    sdata
        Sections with tiles; tiled first, with the adapter's tile size, where they have none.
    adapter
        An adapter from :func:`pekasc.tl.fit_adapter` or :meth:`pekasc.models.Adapter.load`.
    key_added
        Name of the layer, and of the features in obsm (``"X_{key_added}"``). A target is written to
        ``obsm["X_{key_added}_{key}"]``.
    genes
        Genes to predict; by default all genes of the adapter.
    table_added
        Name of a new table for the predictions, with the adapter's genes as var and the same regions and ids; it
        replaces that of an earlier run. Use it for genes that the table lacks. A table without genes, such as that of
        :func:`pekasc.pp.tile_grid`, is replaced by one with the adapter's genes.
    gene_key
        Column of var with the gene names of the adapter; by default ``var_names``.
    store
        Folder for features and predictions, for slides and tables larger than memory. Both are computed in parts, and
        an interrupted call continues. The layer is then a dask array on the store, which the record names; writing the
        object leaves predictions in the store, and :func:`pekasc.io.attach_predictions` brings them back.
    abstain
        With a calibrated adapter (:func:`pekasc.tl.calibrate`): predict nothing, NaN, for tiles whose novelty, a
        p-value, is below this, such as 0.01. Of tissue like the training tissue, about that share is lost.
    measured
        Pull the predictions of a section that was measured at spots to what was measured there: ``"kriging"``
        interpolates measured minus predicted values to all tiles of the section and adds them. Meant for tiles between
        spots (:func:`pekasc.pp.tile_grid` with a small ``stride_um``) and for gaps. Range and noise are chosen on
        held-out blocks of spots; a gene whose residuals have no structure between spots is left as predicted. Rows
        are pulled to the spots of their region, tiles of a grid to those of the nearest region on its image.
    measured_table
        Name of the table with the spots and their counts, ``"table"`` by default. They must lie on the image of the
        tiles. Its predictions by this adapter are used if they are there, and computed, but not kept, otherwise.
    compute
        A :class:`pekasc.Compute`, or a mapping of its fields: ``device``, ``precision``, ``embed_batch_size``,
        ``max_memory`` and ``client``. The layer may take ``max_memory`` bytes, and so may the features unless `store`
        is given.
    table_name
        Name of the table; where there is none of the default name, the only table, or the only one with tiles.
    key
        Name of the tiles.
    progress
        Show a progress bar.

    Returns
    -------
    None, and writes to the table (or to the new one)

    ``layers[key_added]``
        Predicted log1p(counts per 10,000), or expression on the scale of the training data with ``target="as_is"``,
        float32; NaN where a gene or row is not predicted. In a new table, ``X`` holds
        the same, unless the table had no genes, or predictions are in a store: then it is None.
    ``obsm["X_{key_added}"]``
        The adapted features, (n_obs, n_features) float32; NaN in rows without a tile.
    ``layers["{key_added}_lower"]``, ``layers["{key_added}_upper"]``
        Of a calibrated adapter: the interval of the *rate*, float32 on the scale of the predictions: what a spot would
        show if it were sequenced without end. The interval of a measurement, which counting makes wider, is
        :func:`pekasc.get.interval`. With `store`, they are computed when they are read.
    ``layers["{key_added}_kriging_sd"]``
        With `measured`: the standard deviation of the map's error, float32 on the scale of the predictions, as
        large as errors on held-out blocks of spots are, less the noise of drawing counts (with ``target="as_is"``,
        whose noise is not known, with all of it); also of genes that are left as predicted. NaN for genes and sections
        that were not measured.
        Intervals (``"{key_added}_lower"``, ``"_upper"``) are known for plain predictions and are not written then;
        novelty and trust are those of the plain prediction.
    ``obs["{key_added}_novelty"]``
        Of a calibrated adapter: how unlike the training tiles a tile is, float32, as a p-value: the share of spots of
        held-out training sections that are at least as far from the others, or at least as like a tile with a known
        fault (a pixel size off by two, pen marks, a pale or dark stain). Small is novel. It is a statement on single
        spots of sections like those.
    ``var["{key_added}_trust"]``
        Of a calibrated adapter: categorical, ``"high"``, ``"medium"`` or ``"low"``. High: a Pearson correlation of 0.4
        or more on held-out training sections, above 0.2 in each; medium: 0.2 or more, above 0 in each.
    ``obs["{key_added}_train"]``
        Whether the adapter was trained on this tissue; :func:`pekasc.tl.evaluate` leaves such spots out. With
        `measured`, also spots that predictions were pulled to.
    ``obs["{key_added}_total"]``
        Total count of every row over the genes of the table (those that all training sections measured, if they
        differed: ``adapter.info["total_genes"]``), float64, if it has counts: the measured values that
        predictions are compared with stay the same when genes leave the table.
    ``obsm["{key_added}_total_check"]``
        Some counts of every row with numbers for their genes, float64, by which a total is known to be of the counts at
        hand.
    ``uns["pekasc"][key_added]``
        Summary of the adapter, the wider fields of view that were read (``fields_um``; none, with a warning, where the
        sections have stored patches or too little tissue around them), its scale (``target``), tile size, number of
        genes predicted and in the totals; with `measured`, by section the range, and the numbers of spots, of genes
        that are pulled or were measured, and of tiles beyond the range.
    Tiles
        Of tables that have none, that of `measured_table` too, as :func:`pekasc.pp.tile` writes them.

    An adapter of ``target={"obsm": key}`` writes no layer and no totals, but

    ``obsm["X_{key_added}_{key}"]``
        A DataFrame with the predicted columns of the target, float32; NaN in rows without a tile. It stays in memory;
        with `store`, only the features are kept there. ``uns["pekasc"]["X_{key_added}_{key}"]`` is its summary.

    Raises
    ------
    KeyError
        If one of `genes` is not predicted by the adapter.
    ValueError
        If the tiles differ in size from those of the training, no gene overlaps, the layer would take more than
        ``max_memory``, or the encoder's weights are not those of the training. If an argument is about genes and the
        adapter predicts another target. If genes and another target have one `key_added`, and their adapters were
        trained on different spots. If `measured` is unknown, or its table has no measurements of the adapter's genes,
        its spots lie on no image of the tiles, are fewer than 25, or farther from all tiles than the range.

    Warns
    -----
    UserWarning
        If the adapter was trained on the spots that predictions are pulled to: the pull is then too weak, and its
        standard deviation too small.

    References
    ----------
    Kriging of the residuals of a regression, with the noise of each measurement as its nugget:
    :cite:t:`cressie1993spatial`.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=2, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.fit_adapter(sdata, method=None, train=["P1S1_spots"], progress=False)
    >>> pk.tl.predict_expression(sdata, adapter, progress=False)
    >>> sdata["table"].layers["peka"].dtype
    dtype('float32')
    """
    if not isinstance(adapter, Adapter):
        read = f" Read it: `pekasc.Adapter.load({str(adapter)!r})`." if isinstance(adapter, str | PathLike) else ""
        raise TypeError(f"`adapter` must be a pekasc.Adapter, got {type(adapter).__name__}.{read}")
    check_key(key_added)
    check_abstain(adapter, abstain)
    check_measured(measured, measured_table)
    target = adapter.target_key
    stored = store is not None and target is None  # predictions of another target stay in memory
    how = on_device(resolve(compute, Compute, "compute", unused=unused_in_embedding(stored=stored)))
    max_memory = how.memory(RESULT_MEMORY)
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name, adapter.spec)
    check_table(table)
    if target is not None:
        predict_target(
            sdata, adapter, target, key_added=key_added, store=store, compute=how, table_name=table_name, key=key,
            progress=progress, abstain=abstain, genes=genes, table_added=table_added, gene_key=gene_key,
            measured=measured,
        )  # fmt: skip
        return
    wanted = wanted_index(adapter, genes)
    gene_of = gene_columns(table)
    names = gene_names(table, gene_key, gene_of)
    target_genes = [adapter.genes[i] for i in wanted]
    check_columns(table, key_added)
    no_genes = without_genes(table, key_added)
    new_table = no_genes or table_added is not None
    columns = np.arange(len(wanted)) if new_table else columns_of(names, target_genes, gene_of)
    limit = None if store is not None else max_memory
    with_intervals = adapter.calibration is not None and measured is None
    n_layers = 3 if with_intervals else 1 if measured is None else 2
    if new_table:
        if table_added is not None:
            check_table_added(sdata, table_added, key_added)
        check_size(table.n_obs, len(wanted), limit, n_layers=n_layers)
    else:
        check_free(table, key_added, "prediction", slot="layers")
        check_free(table, feature_key(key_added), "features", slot="obsm")
        check_layer(table, names, target_genes, columns, limit, n_layers)
    of_spots = spots_table(sdata, measured_table) if measured is not None else table_name
    with (
        untiled_on_error(sdata, table_name=table_name, key=key),
        untiled_on_error(sdata, table_name=of_spots, key=key),
    ):
        sections, spec = ensure_tiles(sdata, table_name=table_name, key=key, spec=adapter.spec)
        adapter.check_tiles(spec.tile_px, spec.mpp)
        trained, digest = trained_on(adapter, sections, spec, table.n_obs), adapter_digest(adapter)
        layer = LayerSpec(
            (table.n_obs, len(wanted) if new_table else table.n_vars),
            wanted,
            columns,
            read_uns(table, GRID) is not None,
        )
        pull = None
        if measured is not None:
            pull = measured_pull(
                sdata, adapter, sections, layer, table_name=table_name, measured_table=of_spots, key_added=key_added,
                key=key, gene_key=gene_key, store=store, abstain=abstain, compute=how, progress=progress,
            )  # fmt: skip
        at_spots = None if pull is None else pull.at_spots
        if table_added is None:
            check_trained(table, key_added, None, trained, at_spots)
        if at_spots is not None:
            trained |= at_spots
        scores, fields_um = tile_scores(
            adapter, sections, spec, n_obs=table.n_obs, store=store, compute=how, progress=progress
        )  # fmt: skip
        adapter = replace(adapter, reading=scores.reading)  # without wider fields, radii may be others
        # compute everything before anything is written
        p_values = scores.p_values(table.n_obs, sections)
        layer = replace(layer, left_out=left_out(p_values, abstain))
        if layer.grid:
            check_stride(adapter, sections)
        place: dict[str, str] = {}
        sd: Any = None
        if store is not None:
            path = check_store(store)
            kept, kept_sd = store_predictions(
                adapter, scores, sections, layer, path, dtype=how.stored_precision, progress=progress, pull=pull
            )
            values: Any = kept.layer(key_added)
            place = {"store": str(kept.path), "array": kept.name, "array_digest": kept.digest}
            if kept_sd is not None:
                sd = kept_sd.layer(kriging_sd_key(key_added))
                place |= {"sd_array": kept_sd.name, "sd_digest": kept_sd.digest}
        else:
            ((every, values),) = layer_parts(adapter, scores, sections, layer, [slice(0, table.n_obs)])
            sd = None if pull is None else pull.apply(every, values)
        adapted = scores.features.by_row(table.n_obs, max_memory, scores.n_adapted)
    record = {
        **adapter_record(adapter),
        "adapter_digest": digest,
        "prediction_inputs_digest": prediction_inputs_digest(
            sections, spec, "float32" if store is None else how.stored_precision
        ),
        "fields_um": list(fields_um),
        "n_predicted": len(wanted),
        "tile_px": spec.tile_px,
        "mpp": spec.mpp,
        **place,
        **({} if pull is None else pull.record),
    }
    log = record["target"] == TARGETS["log1p"]
    total_columns = columns_of_totals(adapter, names, gene_of)
    totals = totals_to_record(table, adapter.info.get("layer"), total_columns) if log else None
    if totals is not None:
        record |= totals[2]
        warn_of_other_totals(adapter, totals[2]["n_genes_in_total"])
    if not new_table:
        table = writable_table(sdata, table_name)
        if "layer" in adapter.info:
            record["layer"] = adapter.info["layer"]
    else:
        table_added = table_added or present_table(sdata, table_name)
        in_memory = not no_genes and store is None
        replaced = table if table_added == present_table(sdata, table_name) else None
        table = new_table_of(table, values if in_memory else None, target_genes, log=log)
        if replaced is not None:
            keep_others(table, replaced)
        record["table_added"] = table_added
    if store is not None:
        record["table_digest"] = table_digest(table)
    before, ends = prediction_record(table, key_added), None
    if adapter.calibration is not None:
        record |= {"calibrated": True, **abstained(layer.left_out, abstain)}
    if adapter.calibration is not None and with_intervals:
        there = columns >= 0
        record["intervals"] = interval_record(adapter.calibration, wanted[there], table.var_names[columns[there]])
        ends = bounds(record["intervals"], values, table.var_names)
    _write(table, key_added, values, adapted, trained, None if totals is None else totals[:2], record)
    remove_trust(table, key_added, before)
    if ends is not None:
        write_bounds(table, key_added, table.layers[key_added], ends)
    if sd is not None:
        table.layers[kriging_sd_key(key_added)] = sd
    if adapter.calibration is not None:
        write_levels(table, key_added, adapter, wanted, columns)
        if p_values is not None:
            table.obs[novelty_key(key_added)] = p_values
        warn_of_novel_sections(p_values, sections, trained)
    if new_table:
        if table_added in sdata.tables:
            del sdata.tables[table_added]
        sdata.tables[table_added] = table


def _write(
    table: AnnData, key: str, values: Any, adapted: Any, trained: np.ndarray,
    totals: tuple[np.ndarray, np.ndarray] | None, record: Mapping[str, Any],
) -> None:  # fmt: skip
    table.layers[key] = values
    table.obsm[feature_key(key)] = adapted
    table.obs[f"{key}_train"] = trained
    if totals is not None:
        table.obs[total_key(key)], table.obsm[total_check_key(key)] = totals
    else:  # those of earlier predictions
        for there, name in ((table.obs, total_key(key)), (table.obsm, total_check_key(key))):
            if name in there:
                del there[name]
    # scores of earlier predictions do not hold for these
    stale = {score_key(key, metric) for metric in METRICS} & set(table.var)
    table.var = table.var.drop(columns=list(stale))
    write_uns(table, key, record, kind="prediction")
    write_uns(table, feature_key(key), record, kind="features")
