"""`pekasc compare`: methods compared on held-out groups."""

from __future__ import annotations

from typing import Any

import typer

from pekasc.cli import _arguments as arguments
from pekasc.cli._fit import names_or_files, open_tiled
from pekasc.cli._options import option_objects
from pekasc.cli._output import Output, working

_RIVAL = "frozen-best"


def compare(
    context: typer.Context,
    sources: arguments.Zarrs,
    out: arguments.ScoresOut = None,
    store: arguments.Store = None,
    methods: arguments.Methods = None,
    encoders: arguments.Encoders = None,
    teacher: arguments.Teacher = None,
    groups: arguments.HeldOut = None,
    folds: arguments.Folds = None,
    genes: arguments.GeneSets = None,
    n_genes: arguments.NGenes = None,
    protocol: arguments.Protocol = None,
    seeds: arguments.Seeds = None,
    layer: arguments.Layer = None,
    gene_key: arguments.GeneKey = None,
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
        options = option_objects(context, recipe=recipe, readout=readout, compute=compute)
        call = arguments.given(
            methods=methods or None, encoders=encoders or None, teacher=teacher, groups=groups, folds=folds,
            genes=names_or_files(genes), n_genes=n_genes, protocol=protocol, seeds=seeds or None, layer=layer,
            gene_key=gene_key, store=store,
        )  # fmt: skip
        sdata = open_tiled(
            sources, table_name, tile_px=tile_px, mpp=mpp, image_mpp=image_mpp, array=array,
            um_coordinate_system=um_coordinate_system,
        )  # fmt: skip
        from pekasc.tl import cross_validate

        frame = cross_validate(sdata, table_name=table_name, progress=output.bars, **call, **options)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(out, index=False)
        _write_summary(frame, output, as_json=as_json)


def _write_summary(frame: Any, output: Output, *, as_json: bool) -> None:
    """Write one result for each method, or a table of them."""
    from pekasc.get import comparison

    found = set(frame["method"])
    summary = comparison(frame, rival=_RIVAL if _RIVAL in found else str(frame["method"].iloc[0])).reset_index()
    for row in summary.to_dict("records"):
        output.result(row, "")
    if not as_json:
        output.result({}, summary.to_string(index=False))
