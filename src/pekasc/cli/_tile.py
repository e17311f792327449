"""`pekasc tile`: `pp.tile` on objects with spots, `pp.tile_grid` on slides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pekasc._settings import get_logger
from pekasc.cli import _arguments as arguments
from pekasc.cli._batch import MADE, Job, plan, read_list, run
from pekasc.cli._output import working
from pekasc.cli._sources import image_of, open_source, table_of

logger = get_logger(__name__)


def tile(
    out: arguments.OutFolder,
    sources: arguments.Sources = None,
    list_file: arguments.ListFile = None,
    tile_px: arguments.TilePx = None,
    mpp: arguments.Mpp = None,
    image_mpp: arguments.ImageMpp = None,
    scene: arguments.Scene = None,
    um_coordinate_system: arguments.UmSystem = None,
    array: arguments.Array = None,
    table_name: arguments.AnyTable = None,
    image_name: arguments.ImageName = None,
    stride_um: arguments.StrideUm = None,
    shape: arguments.Shape = None,
    shapes: arguments.Shapes = None,
    tissue: arguments.Tissue = None,
    min_tissue: arguments.MinTissue = None,
    min_sharpness: arguments.MinSharpness = None,
    max_pen: arguments.MaxPen = None,
    config: arguments.Config = None,
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Tile sections around their spots, slides on a grid.

    Writes each as a zarr folder of a SpatialData, its image included. To predict a slide, this step is not needed.
    """
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        grid = arguments.grid_arguments(
            stride_um=stride_um, shape=shape, shapes=shapes, tissue=tissue, min_tissue=min_tissue,
            min_sharpness=min_sharpness, max_pen=max_pen,
        )  # fmt: skip
        arguments.check_before_the_first_slide(grid, image_mpp)
        both = arguments.given(tile_px=tile_px, mpp=mpp, image_mpp=image_mpp, um_coordinate_system=um_coordinate_system)
        spots = arguments.given(array=array)

        def work(job: Job, part: Path, made: Mapping[str, Any]) -> dict[str, Any]:
            from pekasc.pp import tile as tile_spots
            from pekasc.pp import tile_grid

            sdata = open_source(job.source, name=job.name, image_mpp=image_mpp, scene=scene)
            table = table_of(sdata, table_name)
            idle = [*(grid if table is not None else spots)]
            if idle:
                what = "tiled around its spots" if table is not None else "tiled on a grid"
                logger.hint("%s is %s, where there is no use for %s.", job.source, what, ", ".join(idle))
            if table is None:
                table = "grid"
                tile_grid(sdata, image_of(sdata, image_name), **both, **grid)
            else:
                tile_spots(sdata, table_name=table, **both, **spots)
            sdata.attrs["pekasc"] = {**sdata.attrs.get("pekasc", {}), MADE: dict(made)}
            sdata.write(part)
            return {"table": table, "n_tiles": int(sdata[table].obs["tile_inside"].notna().sum())}

        jobs = plan(read_list(sources, list_file), out)
        settings = {"command": "tile", **both, **spots, **grid}
        settings |= arguments.given(table_name=table_name, image_name=image_name, scene=scene)
        run(jobs, out, work, settings, output)
