"""A layer that is not there: what to do, by what the table says of predictions under its name."""

from __future__ import annotations

from collections.abc import Sequence

from anndata import AnnData

from pekasc._measured import prediction_record
from pekasc._obsm import recorded_targets


def missing_layer(
    table: AnnData,
    layer: str,
    table_name: str = "table",
    *,
    of_target: str = "it is in `obsm` (target {!r})",
    measured: bool = False,
) -> KeyError:
    """Return the error about a layer of predictions that a table lacks: they are in a store, or not made yet.

    `of_target` says what to do where something else than genes was predicted, with a place for its key.
    A layer of `measured` values is made by no prediction.
    """
    there = [name for name in table.layers if name is not None]
    if measured:
        return KeyError(f"Layer {layer!r} not found. Available layers: {there}.")
    named = "" if table_name == "table" else f", table_name={table_name!r}"
    how = f"Predict first: `pekasc.tl.predict_expression(sdata, adapter{named})`."
    if "store" in prediction_record(table, layer):
        how = "Its predictions are in a store: `pekasc.io.attach_predictions(sdata)` brings them back."
    elif targets := [key for key, _ in recorded_targets(table, layer)]:
        how = f"What was predicted under that name is no gene: {of_target.format(targets[0])}."
    return KeyError(f"Layer {layer!r} not found. Available layers: {there}. {how}")


def no_values(layer: str, genes: Sequence[str], where: str) -> ValueError:
    """Return the error about genes of which a layer of predictions has no value; `where` is what was looked at."""
    return ValueError(
        f"`layers[{layer!r}]` has no values of {list(genes[:5])}{' and more' if len(genes) > 5 else ''} in {where}: "
        "they were not predicted. `pekasc.get.expression(sdata, table_name=...)` has the genes that were."
    )
