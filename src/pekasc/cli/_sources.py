"""What a command reads: slides, SpatialData zarr folders, several of them joined; and objects without their pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pekasc._paths import is_zarr
from pekasc._settings import get_logger

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = get_logger(__name__)

STORES = "predictions"  # folder of the stores in an output folder
_THUMBNAIL_PX = 2048


def open_source(path: Path, *, name: str, image_mpp: float | None, scene: str | None) -> SpatialData:
    """Open a slide or a SpatialData zarr folder, lazily.

    Parameters
    ----------
    path
        The file or folder.
    name
        Name of the image of a slide.
    image_mpp
        Pixel size of a slide in um.
    scene
        Index or name of a scene of a slide.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is neither.
    """
    if path.is_dir():
        return open_zarr(path)
    from pekasc.io import read_slide

    number = int(scene) if scene is not None and scene.isdecimal() else scene
    return read_slide(path, name=name, image_mpp=image_mpp, scene=number)


def open_zarr(path: Path) -> SpatialData:
    """Open a SpatialData zarr folder, lazily.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is no such folder.
    """
    import spatialdata

    if not path.exists():
        raise FileNotFoundError(f"{path} is not there.")
    if not is_zarr(path):
        raise ValueError(f"{path} is no zarr folder of a SpatialData.")
    return spatialdata.read_zarr(path)


def with_predictions(path: Path) -> SpatialData:
    """Open a SpatialData zarr folder with its predictions, of which `pekasc predict` keeps the store beside it."""
    from pekasc.io import attach_predictions

    sdata = open_zarr(path)
    beside = path.absolute().parent / STORES / path.name
    with suppress(KeyError):  # predictions that are in the object itself
        attach_predictions(sdata, store=beside if beside.is_dir() else None)
    return sdata


def joined(paths: Sequence[Path], table_name: str, *, same_tiles: bool) -> SpatialData:
    """Open several SpatialData zarr folders as one object, with the genes that all have.

    With `same_tiles`, their tiles must be of one size.

    Raises
    ------
    ValueError
        If elements of two have the same name, the tables do not annotate elements, or the tiles differ in size.
    """
    import spatialdata

    parts = [open_zarr(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    missing = [str(path) for path, part in zip(paths, parts, strict=True) if table_name not in part.tables]
    if missing:
        raise ValueError(
            f"There is no table {table_name!r} in {', '.join(missing)}: give another --table-name, or leave these out."
        )
    counts = Counter(name for part in parts for _, name, _ in part.gen_spatial_elements())
    twice = sorted(name for name, n in counts.items() if n > 1)
    if twice:
        raise ValueError(
            f"Several of the {len(parts)} objects have elements of the same name: {', '.join(twice[:5])}. Give the "
            "sections names of their own, or join them yourself (`spatialdata.concatenate({name: sdata, ...}, "
            "concatenate_tables=True)`)."
        )
    tables = [part.tables[table_name] for part in parts]
    tiles = {_tile_size(table) for table in tables}
    if same_tiles and len(tiles) > 1:
        raise ValueError("The objects are not tiled alike: give --tile-px and --mpp, which tile them all anew.")
    parts = [part.subset([*[name for _, name, _ in part.gen_spatial_elements()], table_name]) for part in parts]
    # "unique": pixel sizes and tiles are recorded by image and by region, so that nothing has two values
    out = spatialdata.concatenate(parts, concatenate_tables=True, uns_merge="unique", attrs_merge="unique")
    dropped = {*tables[0].var_names}.union(*(table.var_names for table in tables)) - {*out.tables[table_name].var_names}
    if dropped:
        logger.hint("%d genes that not all objects have are left out.", len(dropped))
    return out


def _tile_size(table: Any) -> tuple[Any, Any] | None:
    from pekasc._keys import TILES, read_uns

    record = read_uns(table, TILES)
    return None if record is None else (record.get("tile_px"), record.get("mpp"))


def table_of(sdata: SpatialData, table_name: str | None) -> str | None:
    """Return the name of the table to predict into: the one named, else ``"table"``, else the only one; None if none.

    Raises
    ------
    ValueError
        If there are several.
    """
    if table_name is not None:
        return table_name
    names = list(sdata.tables)
    if not names or "table" in names:
        return "table" if names else None
    if len(names) > 1:
        raise ValueError(f"There are several tables: {names}. Give --table-name.")
    return names[0]


def image_of(sdata: SpatialData, image_name: str | None) -> str:
    """Return the name of the image to tile: the one named, else the only one.

    Raises
    ------
    ValueError
        If there is none, or several.
    """
    if image_name is not None:
        return image_name
    names = list(sdata.images)
    if len(names) != 1:
        raise ValueError(f"There is {'no image' if not names else f'more than one image: {names}. Give --image-name'}.")
    return names[0]


def without_pixels(sdata: SpatialData, table_name: str) -> SpatialData:
    """Return shapes and a table of an object, with images of at most 2048 px in the place of its own.

    An image lies where it did; of a slide, its pixel size is known from what was recorded of the whole one.
    """
    from spatialdata import SpatialData

    return SpatialData(
        images={name: thumbnail(image) for name, image in sdata.images.items()},
        shapes=dict(sdata.shapes),
        tables={table_name: sdata.tables[table_name]},
        attrs=dict(sdata.attrs),
    )


def thumbnail(image: Any) -> Any:
    """Return an image of at most 2048 px, lazily: its coarsest level of 1024 px or more, averaged down."""
    import numpy as np
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale, Sequence, get_transformation

    levels = [image] if not hasattr(image, "children") else [next(iter(level.values())) for level in image.values()]
    fine = [level for level in levels if max(level.shape[1:]) >= _THUMBNAIL_PX // 2]
    level = fine[-1] if fine else levels[0]
    factor = -(-max(level.shape[1:]) // _THUMBNAIL_PX)
    pixels = level.data
    systems = get_transformation(level, get_all=True)
    if factor > 1:
        import dask.array as da

        pixels = da.coarsen(np.mean, da.asarray(pixels), {1: factor, 2: factor}, trim_excess=True)
        pixels = pixels.round().astype(level.dtype)
        scale = Scale([factor, factor], axes=("x", "y"))
        systems = {name: Sequence([scale, transformation]) for name, transformation in systems.items()}
    return Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=list(level.coords["c"].values), transformations=systems
    )
