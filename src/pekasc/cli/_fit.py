"""`pekasc fit`: an adapter from sections with measured expression."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pekasc.cli import _arguments as arguments
from pekasc.cli._options import option_object
from pekasc.cli._output import working
from pekasc.cli._sources import joined

if TYPE_CHECKING:
    from spatialdata import SpatialData


def fit(
    context: typer.Context,
    sources: arguments.Zarrs,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the adapter.")],
    encoder: Annotated[str | None, typer.Option("--encoder", metavar="NAME", help="Encoder; by default tiny.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="NAME", help="Teacher; by default pca.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="Method; by default bone. none: the frozen encoder.")
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="NAME", help="Section to train on; by default all. Can be repeated."),
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", metavar="COLUMN", help="Column of obs with groups to hold out in turn.")
    ] = None,
    genes: Annotated[
        list[str] | None,
        typer.Option("--genes", metavar="NAME", help="A gene, or a file of genes, one a line. Can be repeated."),
    ] = None,
    layer: Annotated[str | None, typer.Option("--layer", metavar="NAME", help="Layer with counts.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="log1p (the default) or as_is.")
    ] = None,
    gene_key: Annotated[str | None, typer.Option("--gene-key", metavar="COLUMN", help="Column of var.")] = None,
    random_state: Annotated[int | None, typer.Option("--random-state", metavar="SEED", help="Seed.")] = None,
    tile_px: arguments.TilePx = None,
    mpp: arguments.Mpp = None,
    image_mpp: arguments.ImageMpp = None,
    um_coordinate_system: arguments.UmSystem = None,
    array: arguments.Array = None,
    table_name: arguments.TableName = "table",
    recipe: arguments.RecipeFields = None,
    readout: arguments.ReadoutFields = None,
    compute: arguments.ComputeFields = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the state of the fit beside the output, and go on from it if it is there."),
    ] = False,
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Train an adapter on sections with measured expression.

    Sections without tiles are tiled first, and all of them where an option about tiles is given.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        options = {
            "recipe": option_object(context, "recipe", recipe),
            "readout": option_object(context, "readout", readout),
            "compute": option_object(context, "compute", compute),
        }
        _check_out(out)
        state = out.with_name(f"{out.name}.resume")
        if resume:
            options["compute"] = _resumed(options["compute"], state)
        call = arguments.given(
            encoder=encoder, teacher=teacher, train=train or None, groups=groups, layer=layer, target=target,
            gene_key=gene_key, random_state=random_state, genes=names_or_files(genes),
        )  # fmt: skip
        if method is not None:
            call["method"] = None if method.lower() == "none" else method
        sdata = open_tiled(
            sources, table_name, tile_px=tile_px, mpp=mpp, image_mpp=image_mpp, array=array,
            um_coordinate_system=um_coordinate_system,
        )  # fmt: skip
        from pekasc.cli._info import describe_adapter
        from pekasc.tl import fit_adapter

        adapter = fit_adapter(sdata, table_name=table_name, progress=output.bars, **call, **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        adapter.save(out)
        if resume and state.is_dir():
            shutil.rmtree(state)
        output.result({"output": str(out), **describe_adapter(adapter)}, f"{adapter}\nsaved to {out}")


def _check_out(out: Path) -> None:
    """Refuse, before the training, a folder that the adapter could not be saved to after it."""
    if out.exists() and not (out.is_dir() and ((out / "pekasc.json").is_file() or not any(out.iterdir()))):
        raise typer.BadParameter(f"{out} is there and holds no adapter of pekasc.", param_hint="--out")


def _resumed(compute: Any, state: Path) -> Any:
    from pekasc._options import Compute

    if isinstance(compute, Compute):
        return compute if compute.resume is not None else compute.replace(resume=state)
    return {"resume": str(state), **(compute or {})}


def names_or_files(given: list[str] | None) -> list[str] | None:
    """Return names, and those in files, one a line."""
    if not given:
        return None
    names: list[str] = []
    for text in given:
        is_file = Path(text).is_file()
        lines = Path(text).read_text(encoding="utf-8").splitlines() if is_file else [text]
        names += [line.strip() for line in lines if line.strip()]
    return names


def open_tiled(sources: list[Path], table_name: str, **tiles: Any) -> SpatialData:
    """Open and join sections, and tile them if there is an argument about tiles."""
    from pekasc.pp import tile

    how = arguments.given(**tiles)
    sdata = joined(sources, table_name, same_tiles=not how)
    if how:
        tile(sdata, table_name=table_name, **how)
    return sdata
