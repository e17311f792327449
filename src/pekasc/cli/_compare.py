"""`pekasc compare`: methods compared on held-out groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pekasc.cli import _arguments as arguments
from pekasc.cli._fit import names_or_files, open_tiled
from pekasc.cli._options import option_object
from pekasc.cli._output import working

_RIVAL = "frozen-best"


def compare(
    context: typer.Context,
    sources: arguments.Zarrs,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="CSV file for the scores of each fold and section.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Folder for finished fits: an interrupted call goes on from it."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods", metavar="NAME", help="A method; by default mean, frozen, frozen-best and bone. Repeat."
        ),
    ] = None,
    encoders: Annotated[
        list[str] | None,
        typer.Option("--encoders", metavar="NAME", help="An encoder; by default tiny. Can be repeated."),
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="NAME", help="Teacher; by default pca.")] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="COLUMN", help="Column of obs with groups to hold out in turn.")
    ] = None,
    folds: Annotated[str | None, typer.Option("--folds", metavar="COLUMN", help="Column of obs with folds.")] = None,
    genes: Annotated[
        list[str] | None,
        typer.Option(
            "--genes", metavar="NAME", help="Gene set, gene, or file of genes; by default svg and hvg. Repeat."
        ),
    ] = None,
    n_genes: Annotated[int | None, typer.Option("--n-genes", metavar="N", help="Genes in each set.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", metavar="NAME", help="nested or hest.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seeds", metavar="SEED", help="Seed. Can be repeated.")] = None,
    layer: Annotated[str | None, typer.Option("--layer", metavar="NAME", help="Layer with counts.")] = None,
    gene_key: Annotated[str | None, typer.Option("--gene-key", metavar="COLUMN", help="Column of var.")] = None,
    tile_px: arguments.TilePx = None,
    mpp: arguments.Mpp = None,
    image_mpp: arguments.ImageMpp = None,
    um_coordinate_system: arguments.UmSystem = None,
    array: arguments.Array = None,
    table_name: arguments.TableName = "table",
    recipe: arguments.RecipeFields = None,
    readout: arguments.ReadoutFields = None,
    compute: arguments.ComputeFields = None,
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Compare methods on held-out groups.

    All fitting and selection happen inside the training folds.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        options = {
            "recipe": option_object(context, "recipe", recipe),
            "readout": option_object(context, "readout", readout),
            "compute": option_object(context, "compute", compute),
        }
        call = arguments.given(
            methods=methods or None, encoders=encoders or None, teacher=teacher, groups=groups, folds=folds,
            genes=names_or_files(genes), n_genes=n_genes, protocol=protocol, seeds=seeds or None, layer=layer,
            gene_key=gene_key, store=store,
        )  # fmt: skip
        sdata = open_tiled(
            sources, table_name, tile_px=tile_px, mpp=mpp, image_mpp=image_mpp, array=array,
            um_coordinate_system=um_coordinate_system,
        )  # fmt: skip
        from pekasc.get import comparison
        from pekasc.tl import cross_validate

        frame = cross_validate(sdata, table_name=table_name, progress=output.bars, **call, **options)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(out, index=False)
        found = set(frame["method"])
        summary = comparison(frame, rival=_RIVAL if _RIVAL in found else str(frame["method"].iloc[0])).reset_index()
        for row in summary.to_dict("records"):
            output.result(row, "")
        if not as_json:
            output.result({}, summary.to_string(index=False))
