"""A layer that is not there: what to do, by what the table says of predictions under its name."""

from __future__ import annotations

from anndata import AnnData

from pekasc._measured import prediction_record
from pekasc._obsm import recorded_targets


def missing_layer(
    table: AnnData, layer: str, table_name: str = "table", *, of_target: str = "it is in `obsm` (target {!r})"
) -> KeyError:
    """Return the error about a layer of predictions that a table lacks: they are in a store, or not made yet.

    `of_target` says what to do where something else than genes was predicted, with a place for its key.
    """
    there = [name for name in table.layers if name is not None]
    named = "" if table_name == "table" else f", table_name={table_name!r}"
    how = f"Predict first: `pekasc.tl.predict_expression(sdata, adapter{named})`."
    if "store" in prediction_record(table, layer):
        how = "Its predictions are in a store: `pekasc.io.attach_predictions(sdata)` brings them back."
    elif targets := [key for key, _ in recorded_targets(table, layer)]:
        how = f"What was predicted under that name is no gene: {of_target.format(targets[0])}."
    return KeyError(f"Layer {layer!r} not found. Available layers: {there}. {how}")
