"""`pekasc predict`: expression of slides and of objects with tiles, one zarr folder each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pekasc._options import Compute, resolve, unused_in_embedding
from pekasc._paths import is_hub
from pekasc.cli import _arguments as arguments
from pekasc.cli._batch import MADE, Job, plan, read_list, run
from pekasc.cli._options import option_object
from pekasc.cli._output import one_line, working
from pekasc.cli._sources import STORES, image_of, open_source, table_of, without_pixels

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from pekasc.models import Adapter

_GRID = "grid"


def predict(
    context: typer.Context,
    adapter: arguments.Adapter,
    out: arguments.OutFolder,
    sources: arguments.Sources = None,
    list_file: arguments.ListFile = None,
    genes: arguments.GenesToPredict = None,
    image_mpp: arguments.ImageMpp = None,
    scene: arguments.Scene = None,
    table_name: arguments.AnyTable = None,
    image_name: arguments.ImageName = None,
    stride_um: arguments.StrideUm = None,
    shape: arguments.Shape = None,
    shapes: arguments.Shapes = None,
    tissue: arguments.Tissue = None,
    min_tissue: arguments.MinTissue = None,
    min_sharpness: arguments.MinSharpness = None,
    max_pen: arguments.MaxPen = None,
    measured: arguments.Measured = None,
    measured_table: arguments.MeasuredTable = None,
    compute: arguments.ComputeFields = None,
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Predict expression of slides or tiled sections.

    Slides are tiled on a grid, on tissue, with the tile size of the adapter. Each source gives one zarr folder of a
    SpatialData: tiles, table and a small image; its predictions are in a store in DIR/predictions, and
    pekasc.io.attach_predictions brings them back. Finished ones are skipped, an interrupted one is continued, and
    several processes can share a list and an output folder. With --measured, sections with spots get a grid too, whose
    predictions are pulled to what was measured.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        how = option_object(context, "compute", compute)
        grid = arguments.grid_arguments(
            stride_um=stride_um, shape=shape, shapes=shapes, tissue=tissue, min_tissue=min_tissue,
            min_sharpness=min_sharpness, max_pen=max_pen,
        )  # fmt: skip
        arguments.check_before_the_first_slide(grid, image_mpp)
        _check_measured(measured, measured_table, table_name)
        paths = read_list(sources, list_file)
        try:
            resolve(how, Compute, "compute", unused=unused_in_embedding(stored=True))
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(one_line(error), param_hint="--compute") from None
        adapter = adapter_folder(adapter)
        settings = {"command": "predict", "adapter": _digest(adapter), **grid}
        settings |= arguments.given(
            genes=sorted(genes) if genes else None, image_mpp=image_mpp, scene=scene, table_name=table_name,
            image_name=image_name, measured=measured, measured_table=measured_table,
        )  # fmt: skip
        jobs = plan(paths, out)
        load = cache(lambda: load_adapter(adapter, genes))
        if any(not job.target.exists() for job in jobs):
            load()  # before the first slide; where everything is finished, the seconds that PyTorch takes are saved
        source: dict[str, Any] = {
            "table_name": table_name, "image_name": image_name, "image_mpp": image_mpp, "scene": scene,
            "measured": measured, "measured_table": measured_table,
        }  # fmt: skip

        def work(job: Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
            sdata, table, pull = _tiled(job, load(), grid=grid, **source)
            return _predict(
                sdata, table, load(), out / STORES / job.target.name, part, made, genes=genes, compute=how,
                progress=output.bars, **pull,
            )  # fmt: skip

        run(jobs, out, work, settings, output)


def _predict(
    sdata: SpatialData, table: str, adapter: Adapter, store: Path, part: Path, made: Mapping[str, Any], *,
    genes: list[str] | None, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Predict into a store, write the result to a folder, and return what there is to say of it."""
    from pekasc.tl import predict_expression

    predict_expression(sdata, adapter, table_name=table, genes=genes, store=store.absolute(), **how)
    result = without_pixels(sdata, table)
    result.attrs["pekasc"] = {**result.attrs.get("pekasc", {}), MADE: dict(made)}
    result.write(part)
    tiles = result[table].obs["tile_inside"].notna()
    return {
        "store": str(store), "table": table, "n_tiles": int(tiles.sum()), "n_genes": len(genes or adapter.genes),
    }  # fmt: skip


def adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter, which is fetched if it is on the model hub."""
    if not is_hub(path):
        return path
    from pekasc.models.adapter import fetch

    try:
        return fetch(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(one_line(error), param_hint="--adapter") from None


def _digest(folder: Path) -> str:
    """Return a digest of an adapter: its record names those of its files."""
    record = folder / "pekasc.json"
    if not record.is_file():
        raise typer.BadParameter(
            f"{folder} holds no adapter of pekasc (no pekasc.json): give the folder that `pekasc fit --out` wrote.",
            param_hint="--adapter",
        )
    return hashlib.sha256(record.read_bytes()).hexdigest()[:16]


def load_adapter(folder: Path, genes: Sequence[str] | None) -> Adapter:
    """Load the adapter before anything else: without it nothing can be done."""
    from pekasc.models import Adapter

    try:
        adapter = Adapter.load(adapter_folder(folder))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(one_line(error), param_hint="--adapter") from None
    unknown = sorted({*(genes or ())} - {*adapter.genes})
    if unknown:
        raise typer.BadParameter(
            f"The adapter does not predict {unknown[:5]}, but {len(adapter.genes)} others, such as "
            f"{list(adapter.genes[:3])}: `pekasc info` says more.",
            param_hint="--genes",
        )
    return adapter


def _tiled(
    job: Job, adapter: Adapter, *, table_name: str | None, image_name: str | None, image_mpp: float | None,
    scene: str | None, measured: str | None, measured_table: str | None, grid: Mapping[str, Any],
) -> tuple[SpatialData, str, dict[str, Any]]:  # fmt: skip
    """Open a source and tile it for the adapter where it has no table, or where a map between its spots is wanted.

    Return it, the name of the table to predict, and how predictions are pulled to measured spots.
    """
    from pekasc.pp import tile, tile_grid

    sdata = open_source(job.source, name=job.name, image_mpp=image_mpp, scene=scene)
    size: dict[str, Any] = {"tile_px": adapter.spec.tile_px, "mpp": adapter.spec.mpp, "image_mpp": image_mpp}
    table = table_of(sdata, table_name if measured is None else measured_table)
    pull: dict[str, Any] = {}
    if measured is not None:
        if table is None:
            raise ValueError(f"{job.source} has no table, and --measured needs one of measured spots: leave it out.")
        pull = {"measured": measured, "measured_table": table}
    if table is None or measured is not None:
        tile_grid(sdata, image_of(sdata, image_name), table_added=_GRID, **size, **grid)
        return sdata, _GRID, pull
    if grid:
        raise ValueError(f"{job.source} has a table, so no grid is made: leave out {', '.join(grid)}.")
    if image_mpp is not None:
        tile(sdata, table_name=table, **size)
    return sdata, table, pull


def _check_measured(measured: str | None, measured_table: str | None, table_name: str | None) -> None:
    from pekasc._measured import check_measured  # loads anndata

    try:
        check_measured(measured, measured_table)
    except ValueError as error:
        raise typer.BadParameter(one_line(error), param_hint="--measured") from None
    if measured is not None and table_name is not None:
        raise typer.BadParameter(
            "predictions of a grid are pulled to measured spots: name their table with --measured-table.",
            param_hint="--table-name",
        )
