"""`pekasc evaluate`: scores of predicted against measured expression."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pekasc.cli import _arguments as arguments
from pekasc.cli._output import finish, working
from pekasc.cli._sources import with_predictions

_SCORES = ("pearson", "ceiling", "reached", "spearman", "rmse", "morans_i_ratio")


def evaluate(
    sources: arguments.Zarrs,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="CSV file for the scores of each gene and group.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="NAME", help="The predictions; by default peka.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="KEY", help="Key of the obsm that was predicted, in the place of genes."),
    ] = None,
    truth: Annotated[
        str | None, typer.Option("--truth", metavar="NAME", help="Layer to compare with; by default from the counts.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="COLUMN", help="Column of obs; by default sections.")
    ] = None,
    include_train: Annotated[bool, typer.Option("--include-train", help="Score training spots as well.")] = False,
    counts_layer: Annotated[
        str | None, typer.Option("--counts-layer", metavar="NAME", help="Layer with counts.")
    ] = None,
    table_name: arguments.TableName = "table",
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Score predicted against measured expression.

    Takes what `pekasc predict` wrote, and shows the median over genes for each group. Spots that the adapter was
    trained on are left out.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        import pandas as pd

        from pekasc import tl

        call = arguments.given(layer=layer, target=target, truth=truth, groups=groups, counts_layer=counts_layer)
        failures: dict[str, str] = {}
        frames: list[pd.DataFrame] = []
        for source in sources:
            try:
                sdata = with_predictions(source)
                scores = tl.evaluate(sdata, include_train=include_train, table_name=table_name, **call)
            except Exception as error:  # noqa: BLE001 (one object must not stop the others; all that failed are named)
                failures[str(source)] = output.reason(error)
                output.result({"source": str(source), "status": "failed", "reason": failures[str(source)]}, "")
                continue
            frames.append(scores.assign(source=str(source)))
            for group, rows in scores.groupby("group", sort=False):
                record = _summary(rows)
                text = ", ".join(f"{name} {value:.3g}" for name, value in record.items())
                output.result(
                    {"source": str(source), "status": "done", "group": str(group), **record},
                    f"{source} {group}: {text}",
                )
        if out is not None and frames:
            out.parent.mkdir(parents=True, exist_ok=True)
            pd.concat(frames).to_csv(out, index=False)
        finish(output, failures, len(frames))


def _summary(rows: Any) -> dict[str, float]:
    """Return the number of genes and spots of a group, and the median of each score over genes."""
    medians = {f"{name}_median": rows[name].median() for name in _SCORES}
    return {"n_genes": len(rows), "n_spots": int(rows["n_spots"].iloc[0]), **medians}
