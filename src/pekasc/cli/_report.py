"""`pekasc report`: an HTML page about an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pekasc.cli import _arguments as arguments
from pekasc.cli._fit import names_or_files
from pekasc.cli._output import working
from pekasc.cli._predict import load_adapter
from pekasc.cli._sources import table_of, with_predictions


def report(
    adapter: arguments.Adapter,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write, which must not exist.")],
    sdata: Annotated[
        Path | None, typer.Argument(metavar="ZARR", help="Zarr folder with predictions of the adapter.")
    ] = None,
    genes: Annotated[
        list[str] | None,
        typer.Option("--genes", metavar="NAME", help="A gene to map, by default the three best. Can be repeated."),
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="COLUMN", help="Column of obs for scores; by default sections.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="NAME", help="The predictions; by default peka.")
    ] = None,
    table_name: arguments.AnyTable = None,
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Write an HTML report on an adapter.

    One file that opens offline: what the adapter was trained on, how far each gene can be trusted, and what not to use
    it for. With what `pekasc predict` wrote, also scores, maps and novelty there.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        if out.exists():  # before anything is read
            raise typer.BadParameter(
                f"{out} exists, and a report replaces nothing: delete it, or give another name.", param_hint="--out"
            )
        call: dict[str, Any] = arguments.given(groups=groups, layer=layer, genes=names_or_files(genes))
        if sdata is None and (idle := [*call, *(["table_name"] if table_name else [])]):
            raise typer.BadParameter(f"--{idle[0].replace('_', '-')} does nothing without ZARR.")
        made = load_adapter(adapter, call.get("genes"))
        source = None
        if sdata is not None:
            source = with_predictions(sdata)
            call["table_name"] = table_of(source, table_name) or "table"
        from pekasc import report as write

        write(made, out, source, **call)
        output.result({"adapter": str(adapter), "report": str(out), "status": "done"}, f"{adapter}: {out}")
