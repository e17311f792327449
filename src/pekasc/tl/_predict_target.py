"""Predict a target that is no gene, the columns of an obsm, into a DataFrame in obsm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from pekasc._keys import GRID, bound_keys, check_free, feature_key, novelty_key, read_uns, target_key, write_uns
from pekasc._measured import prediction_record
from pekasc._obsm import target_label
from pekasc._options import RESULT_MEMORY, Compute
from pekasc._sections import get_table, writable_table
from pekasc.models import Adapter
from pekasc.models.trust import interval_record
from pekasc.tl._predict_checks import adapter_record, check_columns, check_size, check_stride, check_trained
from pekasc.tl._predict_rows import LayerSpec, layer_parts, tile_scores, trained_on
from pekasc.tl._predict_trust import abstained, bounds, left_out, warn_of_novel_sections
from pekasc.tl._read import ensure_tiles, untiled_on_error


def predict_target(
    sdata: SpatialData, adapter: Adapter, target: str, *, key_added: str, store: str | Path | None, compute: Compute,
    abstain: float | None, table_name: str, key: str, progress: bool, **of_genes: Any,
) -> None:  # fmt: skip
    """Predict the columns of ``obsm[target]``; see :func:`predict_expression`.

    `of_genes` are arguments that only predictions of genes have.
    """
    given = [f"{name}=" for name, value in of_genes.items() if value is not None]
    if given:
        raise ValueError(
            f"`{given[0]}` does nothing with this adapter, which predicts no genes but the {len(adapter.genes)} "
            f"columns of {target_label(target)}: leave it out."
        )
    name, features_name = target_key(key_added, target), feature_key(key_added)
    table = get_table(sdata, table_name)
    check_columns(table, key_added)
    check_free(table, name, "prediction", slot="obsm")
    for bound in bound_keys(name):
        if bound in table.obsm and "intervals" not in prediction_record(table, name):
            raise ValueError(
                f"`key_added={key_added!r}` would replace `obsm[{bound!r}]`, which was not written by this call. "
                "Choose another key, or rename it."
            )
    check_free(table, features_name, "features", slot="obsm")
    n, k = table.n_obs, len(adapter.genes)
    max_memory = compute.memory(RESULT_MEMORY)
    check_size(n, k, max_memory, target_label(target))
    with untiled_on_error(sdata, table_name=table_name, key=key):
        sections, spec = ensure_tiles(sdata, table_name=table_name, key=key, spec=adapter.spec)
        adapter.check_tiles(spec.tile_px, spec.mpp)
        trained = trained_on(adapter, sections, spec, n)
        check_trained(table, key_added, target, trained)
        scores, fields_um = tile_scores(
            adapter, sections, spec, n_obs=n, store=store, compute=compute, progress=progress
        )  # fmt: skip
        adapter = replace(adapter, reading=scores.reading)  # without wider fields, radii may be others
        every = np.arange(k)
        p_values = scores.p_values(n, sections)
        layer = LayerSpec((n, k), every, every, read_uns(table, GRID) is not None, left_out(p_values, abstain))
        if layer.grid:
            check_stride(adapter, sections)
        ((_, values),) = layer_parts(adapter, scores, sections, layer, [slice(0, n)])
        adapted = scores.features.by_row(n, max_memory, scores.n_adapted)
    record = {
        **adapter_record(adapter), "fields_um": list(fields_um), "obsm": target, "key_added": key_added,
        "n_predicted": k, "tile_px": spec.tile_px, "mpp": spec.mpp,
    }  # fmt: skip
    table = writable_table(sdata, table_name)
    before = prediction_record(table, name)
    frame = pd.DataFrame(values, index=table.obs_names, columns=list(adapter.genes))
    table.obsm[name] = frame
    if "intervals" in before:  # what an earlier, calibrated prediction wrote
        for bound in bound_keys(name):
            table.obsm.pop(bound, None)
    if adapter.calibration is not None:
        record |= {"intervals": interval_record(adapter.calibration, every, list(adapter.genes))}
        record |= abstained(layer.left_out, abstain)
        ends = bounds(record["intervals"], values, frame.columns)
        for bound, found in zip(bound_keys(name), ends, strict=True):
            table.obsm[bound] = pd.DataFrame(found, index=table.obs_names, columns=frame.columns)
        if p_values is not None:
            table.obs[novelty_key(key_added)] = p_values
        warn_of_novel_sections(p_values, sections, trained)
    table.obsm[features_name] = adapted
    table.obs[f"{key_added}_train"] = trained
    write_uns(table, name, record, kind="prediction")
    write_uns(table, features_name, record, kind="features")
