"""`pekasc fit`: an adapter from sections with measured expression."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pekasc.cli import _arguments as arguments
from pekasc.cli._options import option_objects
from pekasc.cli._output import working
from pekasc.cli._sources import joined

if TYPE_CHECKING:
    from spatialdata import SpatialData


def fit(
    context: typer.Context,
    sources: arguments.Zarrs,
    out: arguments.AdapterOut,
    encoder: arguments.Encoder = None,
    teacher: arguments.Teacher = None,
    method: arguments.Method = None,
    train: arguments.Train = None,
    groups: arguments.HeldOut = None,
    genes: arguments.Genes = None,
    panels: arguments.Panels = None,
    layer: arguments.Layer = None,
    target: arguments.Target = None,
    gene_key: arguments.GeneKey = None,
    random_state: arguments.Seed = None,
    tile_px: arguments.TilePx = None,
    mpp: arguments.Mpp = None,
    image_mpp: arguments.ImageMpp = None,
    um_coordinate_system: arguments.UmSystem = None,
    array: arguments.Array = None,
    table_name: arguments.TableName = "table",
    recipe: arguments.RecipeFields = None,
    readout: arguments.ReadoutFields = None,
    compute: arguments.ComputeFields = None,
    resume: arguments.Resume = False,
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Train an adapter on sections with measured expression.

    Sections without tiles are tiled first, and all of them where an option about tiles is given.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        options = option_objects(context, recipe=recipe, readout=readout, compute=compute)
        _check_out(out)
        state = out.with_name(f"{out.name}.resume")
        if resume:
            options["compute"] = _resumed(options["compute"], state)
        call = arguments.given(
            encoder=encoder, teacher=teacher, train=train or None, groups=groups, layer=layer,
            target=_target(target), gene_key=gene_key, random_state=random_state, genes=names_or_files(genes),
            panels=_panels(panels),
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


def _target(text: str | None) -> Any:
    """Return what the call takes: obsm:KEY is a target that is no gene."""
    kind, colon, key = (text or "").partition(":")
    return {kind: key} if colon else text


def _panels(given: list[str] | None) -> dict[str, list[str] | str | None] | None:
    """Return the genes of each region, from a file or as the name of a column of var."""
    if not given:
        return None
    out: dict[str, list[str] | str | None] = {}
    for text in given:
        region, _, genes = text.partition("=")
        if not region or not genes:
            raise typer.BadParameter(f"{text} must be REGION=FILE or REGION=COLUMN.", param_hint="--panels")
        if region in out:
            raise typer.BadParameter(f"{region} is named twice.", param_hint="--panels")
        out[region] = names_or_files([genes]) if Path(genes).is_file() else genes
    return out


def _check_out(out: Path) -> None:
    """Refuse, before the training, a folder that the adapter could not be saved to after it."""
    if out.exists() and not (out.is_dir() and ((out / "pekasc.json").is_file() or not any(out.iterdir()))):
        raise typer.BadParameter(
            f"{out} is there and holds no adapter of pekasc, so it is not replaced: give another folder, or delete it.",
            param_hint="--out",
        )


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
