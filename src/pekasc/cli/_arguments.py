"""Options that several commands have, under the names of the arguments of the calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pekasc._paths import is_address
from pekasc.cli._options import read_config
from pekasc.cli._output import one_line

_NOTHING = ("none", "false")  # as Python and TOML say it


def no_addresses(value: Any) -> Any:
    """Refuse addresses on the network where paths of a file system are needed; the callback of such arguments."""
    for path in value if isinstance(value, list | tuple) else [value]:
        if path is not None and is_address(path):
            raise typer.BadParameter(
                f"{str(path)!r} is an address: fetch what is there into a folder first, and copy results when they are "
                "done."
            )
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=read_config, is_eager=True, metavar="FILE",
        help="TOML file with tables [recipe], [readout], [compute], [tile] and one named after the command. The "
        "command line wins over the file.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Write a JSON object for each result to stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Verbosity = Annotated[
    str | None,
    typer.Option("--verbosity", metavar="LEVEL", help="How much is logged: warning, hint (the default), info, debug."),
]
RecipeFields = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", metavar="FIELD=VALUE", help="A field of pekasc.Recipe, or a preset (paper). Can be repeated."
    ),
]
ReadoutFields = Annotated[
    list[str] | None,
    typer.Option(
        "--readout", metavar="FIELD=VALUE", help="A field of pekasc.Readout, or a preset (paper). Can be repeated."
    ),
]
ComputeFields = Annotated[
    list[str] | None,
    typer.Option("--compute", metavar="FIELD=VALUE", help="A field of pekasc.Compute. Can be repeated."),
]
Sources = Annotated[
    list[Path] | None,
    typer.Argument(
        callback=no_addresses,
        metavar="SLIDE_OR_ZARR",
        help="Slides (TIFF, SVS and others) or zarr folders of SpatialData.",
    ),
]
Zarrs = Annotated[
    list[Path], typer.Argument(callback=no_addresses, metavar="ZARR", help="Zarr folders of SpatialData.")
]
ListFile = Annotated[
    Path | None, typer.Option("--list", metavar="FILE", help="File with further paths, one a line; # starts a comment.")
]
OutFolder = Annotated[
    Path,
    typer.Option(
        "--out", callback=no_addresses, metavar="DIR", help="Folder for the results, one zarr folder for each source."
    ),
]
TableName = Annotated[str, typer.Option("--table-name", metavar="NAME", help="Name of the table.")]
AnyTable = Annotated[
    str | None,
    typer.Option(
        "--table-name", metavar="NAME", help="Name of the table of a zarr folder; by default 'table', or the only one."
    ),
]
ImageName = Annotated[
    str | None,
    typer.Option(
        "--image-name", metavar="NAME", help="Image to tile in a zarr folder without table; else the only one."
    ),
]
TilePx = Annotated[int | None, typer.Option("--tile-px", metavar="PX", help="Side of a tile in pixels.")]
Mpp = Annotated[float | None, typer.Option("--mpp", metavar="UM", help="Pixel size of the tiles in um.")]
ImageMpp = Annotated[
    float | None,
    typer.Option("--image-mpp", metavar="UM", help="Pixel size of the image in um; by default as the file says."),
]
Scene = Annotated[
    str | None,
    typer.Option("--scene", metavar="NAME", help="Index or name of a scene of a slide; by default the largest."),
]
UmSystem = Annotated[
    str | None,
    typer.Option("--um-coordinate-system", metavar="NAME", help="A coordinate system in um, for the pixel size."),
]
Array = Annotated[
    str | None,
    typer.Option("--array", metavar="NAME", help="visium, visium_hd or st: the pixel size from the array's pitch."),
]
StrideUm = Annotated[
    float | None,
    typer.Option("--stride-um", metavar="UM", help="Distance of neighbouring tiles of a grid; by default their side."),
]
Measured = Annotated[
    str | None,
    typer.Option(
        "--measured",
        metavar="METHOD",
        help="kriging: of a section with spots, predict a grid on its image, pulled to what the spots measured.",
    ),
]
MeasuredTable = Annotated[
    str | None,
    typer.Option(
        "--measured-table", metavar="NAME", help="Table of the measured spots; by default 'table', or the only one."
    ),
]
Shape = Annotated[str | None, typer.Option("--shape", metavar="NAME", help="Shape of the grid: square or hexagon.")]
Shapes = Annotated[
    str | None, typer.Option("--shapes", metavar="NAME", help="Shapes, for each of which a tile is made: no grid.")
]
Tissue = Annotated[
    str | None,
    typer.Option("--tissue", metavar="NAME", help="detect, the name of shapes or labels, or none to take all tiles."),
]
MinTissue = Annotated[
    str | None, typer.Option("--min-tissue", metavar="FRACTION", help="Least fraction of a tile on tissue, or none.")
]
MinSharpness = Annotated[
    str | None, typer.Option("--min-sharpness", metavar="VALUE", help="auto, a least sharpness of a tile, or none.")
]
MaxPen = Annotated[
    str | None, typer.Option("--max-pen", metavar="FRACTION", help="Largest fraction of a tile in ink, or none.")
]

Encoder = Annotated[str | None, typer.Option("--encoder", metavar="NAME", help="Encoder; by default tiny.")]
Encoders = Annotated[
    list[str] | None, typer.Option("--encoders", metavar="NAME", help="An encoder; by default tiny. Can be repeated.")
]
Teacher = Annotated[str | None, typer.Option("--teacher", metavar="NAME", help="Teacher; by default pca.")]
Method = Annotated[
    str | None, typer.Option("--method", metavar="NAME", help="Method; by default bone. none: the frozen encoder.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", metavar="NAME", help="A method; by default mean, frozen, frozen-best and bone. Repeat."),
]
Train = Annotated[
    list[str] | None,
    typer.Option("--train", metavar="NAME", help="Section to train on; by default all. Can be repeated."),
]
HeldOut = Annotated[
    str | None, typer.Option("--groups", metavar="COLUMN", help="Column of obs with groups to hold out in turn.")
]
Folds = Annotated[str | None, typer.Option("--folds", metavar="COLUMN", help="Column of obs with folds.")]
Genes = Annotated[
    list[str] | None,
    typer.Option("--genes", metavar="NAME", help="A gene, or a file of genes, one a line. Can be repeated."),
]
Panels = Annotated[
    list[str] | None,
    typer.Option(
        "--panels",
        metavar="REGION=GENES",
        help="Genes that a region measured: a file, one a line, or a boolean column of var. Repeat for each region.",
    ),
]
GeneSets = Annotated[
    list[str] | None,
    typer.Option("--genes", metavar="NAME", help="Gene set, gene, or file of genes; by default svg and hvg. Repeat."),
]
GenesToPredict = Annotated[
    list[str] | None,
    typer.Option("--genes", metavar="NAME", help="A gene to predict, by default all. Can be repeated."),
]
NGenes = Annotated[int | None, typer.Option("--n-genes", metavar="N", help="Genes in each set.")]
Protocol = Annotated[str | None, typer.Option("--protocol", metavar="NAME", help="nested or hest.")]
Seeds = Annotated[list[int] | None, typer.Option("--seeds", metavar="SEED", help="Seed. Can be repeated.")]
Seed = Annotated[int | None, typer.Option("--random-state", metavar="SEED", help="Seed.")]
Layer = Annotated[str | None, typer.Option("--layer", metavar="NAME", help="Layer with counts.")]
Target = Annotated[
    str | None,
    typer.Option("--target", metavar="NAME", help="log1p (the default), as_is, or obsm:KEY for its columns."),
]
GeneKey = Annotated[str | None, typer.Option("--gene-key", metavar="COLUMN", help="Column of var.")]
Adapter = Annotated[Path, typer.Option("--adapter", metavar="DIR", help="Folder of the adapter, or hf-hub:OWNER/NAME.")]
AdapterOut = Annotated[
    Path, typer.Option("--out", callback=no_addresses, metavar="DIR", help="Folder for the adapter.")
]
ScoresOut = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="CSV file for the scores of each fold and section.")
]
Store = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Folder for finished fits: an interrupted call goes on from it."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep the state of the fit beside the output, and go on from it if it is there."),
]


def given(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that were given, so that a call has its own defaults for the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def grid_arguments(
    *,
    stride_um: float | None,
    shape: str | None,
    shapes: str | None,
    tissue: str | None,
    min_tissue: str | None,
    min_sharpness: str | None,
    max_pen: str | None,
) -> dict[str, Any]:
    """Return arguments of :func:`pekasc.pp.tile_grid` from options, those that were given.

    Raises
    ------
    typer.BadParameter
        If a threshold is no number.
    """
    out = given(stride_um=stride_um, shape=shape, shapes=shapes, tissue=tissue)
    if tissue is not None and tissue.lower() in _NOTHING:
        out["tissue"] = False
    thresholds = {"min_tissue": min_tissue, "min_sharpness": min_sharpness, "max_pen": max_pen}
    for name, text in given(**thresholds).items():
        out[name] = _threshold(name, text)
    return out


def check_before_the_first_slide(grid: Mapping[str, Any], image_mpp: float | None) -> None:
    """Check what no slide can change, so that a wrong argument does not fail once for each slide.

    Raises
    ------
    typer.BadParameter
        If an argument is wrong.
    """
    if not grid and image_mpp is None:
        return
    from pekasc._sections import check_mpp
    from pekasc.tiling import check_grid

    try:
        check_grid(**{name: value for name, value in grid.items() if name != "tissue"})
        if image_mpp is not None:
            check_mpp(image_mpp, "`image_mpp`")
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(one_line(error)) from None


def _threshold(name: str, text: str) -> float | str | None:
    if text.lower() in _NOTHING:
        return None
    if name == "min_sharpness" and text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number.", param_hint=f"--{name.replace('_', '-')}") from None
