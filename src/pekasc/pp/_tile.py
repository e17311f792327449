"""`pp.tile`: square tiles around observations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation

from pekasc._keys import TILE_INSIDE, TILES, check_key, read_uns, records, tile_shapes_name, write_uns
from pekasc._sections import (
    Section,
    examples,
    get_table,
    in_tissue,
    overview,
    resolve_sections,
    section_readers,
    tile_record,
    writable_table,
)
from pekasc._settings import HINT, get_logger
from pekasc._warnings import warn_user
from pekasc.pp._placement import check_placement
from pekasc.tiling import PatchReader, TileGeometry, TileReader, TileSpec

logger = get_logger(__name__)

_COARSE = 2.0  # with more upsampling than this, tiles lack the detail that encoders were trained on


def tile(
    sdata: SpatialData,
    *,
    tile_px: int = 224,
    mpp: float = 0.5,
    images: Mapping[str, str] | None = None,
    image_mpp: float | Mapping[str, float] | None = None,
    um_coordinate_system: str | None = None,
    array: str | None = None,
    patches: bool | None = None,
    table_name: str = "table",
    key_added: str = TILES,
    strict: bool = True,
) -> None:
    """Define a square tile, in physical units, around every observation.

    A section is an image, the shapes of its spots, and the table rows whose region is that shapes element; if the
    region is labels, the shapes are those that carry their ids. The image shares a coordinate system with the shapes;
    if several images show the same at different scales, the finest is used. Pixels are not copied:
    :func:`pekasc.get.tiles` reads them lazily.

    The pixel size is never guessed: it comes from `image_mpp`, `um_coordinate_system` or `array`, from what a reader or
    data set recorded in ``table.uns["pekasc"]["image_mpp"]``, or from the object itself: the lattice of a Visium slide,
    or the areas of Xenium's cells (``obs["cell_area"]``, ``obs["nucleus_area"]``), which show that the shapes are in
    um. If there are several sources, they must agree within 2 %.

    Parameters
    ----------
    sdata
        Sections: images, shapes, and a table that annotates the shapes.
    tile_px
        Side of a tile in pixels.
    mpp
        Pixel size of the tiles in um per pixel. The defaults give tiles of 112 um.
    images
        Image of each region, if several different images share its coordinate system: ``{"C2_spots": "C2_he"}``.
    image_mpp
        Pixel size of the image at full resolution, in um per pixel, or a dict from image names to pixel sizes.
    um_coordinate_system
        A coordinate system in micrometers.
    array
        ``"visium"``, ``"visium_hd"`` or ``"st"``: compute the pixel size from the pitch (100 um, the bin size in the
        region's name such as ``square_008um``, or 200 um) and the grid indices in the columns ``array_row`` and
        ``array_col``. A Visium slide is recognised by these columns without this argument. For Visium without them,
        from the stored spot diameter, which is taken as 65 um.
    patches
        Whether to use stored patches that a reader recorded (:func:`pekasc.io.read_hest`) instead of the image. None
        uses them for sections without an image. They must have the field of view of the tiles, ``tile_px * mpp``, and
        are resampled to `tile_px`; spots without a patch get no tile.
    table_name
        Name of the table.
    key_added
        Name of the tiles.
    strict
        Whether contradicting pixel sizes, and coordinates beyond doubt transposed, flipped or scaled (a third of the
        spots off the tissue, far fewer otherwise), are errors. With False they are warnings, and the
        explicit pixel size is used.

    Returns
    -------
    None, and writes

    ``sdata.shapes["{region}_{key_added}"]``
        The tiles as squares, in the coordinates of the spots, indexed by instance id. Spots with ``in_tissue`` 0 have
        none.
    ``table.obs["tile_inside"]``
        Fraction of each tile inside the image, float32; NaN without a tile, or if the image's size is unknown.
    ``table.uns["pekasc"][key_added]``
        Tile size, pixel sizes and images.

    Raises
    ------
    KeyError
        If the table, a region, an image, a column, a coordinate system or stored patches do not exist.
    ValueError
        If the pixel size is unknown or contradictory, the image is ambiguous or not RGB of uint8, names or ids are not
        unique, rows have no shape, the spots do not lie on the image, stored patches have another field of view, or the
        table has a column ``tile_inside`` of its own.
    FileNotFoundError
        If the file of stored patches does not exist any more.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    >>> pk.get.tiles(sdata).shape[1:]
    (112, 112, 3)
    """
    check_key(key_added)
    spec = TileSpec(tile_px, mpp)
    table = get_table(sdata, table_name, spec)
    sections = resolve_sections(
        sdata,
        table_name=table_name,
        images=images,
        image_mpp=image_mpp,
        um_coordinate_system=um_coordinate_system,
        array=array,
        patches=patches,
        strict=strict,
    )
    sections = [_with_patch(_in_tissue(table, section)) for section in sections]
    _check_names(sdata, table, sections, key_added)
    for section in sections:
        _check_place(section, spec, strict)
    made = make_tiles(sdata, sections, spec, table.n_obs, key_added, um_coordinate_system)
    _write(sdata, table_name, key_added, made)


@dataclass(frozen=True, eq=False)
class MadeTiles:
    """What :func:`tile` writes: squares by name, the fraction of each row's tile inside its image, and the record."""

    squares: dict[str, GeoDataFrame]
    inside: np.ndarray
    record: dict[str, Any]


def make_tiles(
    sdata: SpatialData, sections: list[Section], spec: TileSpec, n_obs: int, key: str, um_coordinate_system: str | None
) -> MadeTiles:
    """Return the tiles of sections, for a table of `n_obs` rows."""
    squares = {tile_shapes_name(section.name, key): _squares(sdata, section, spec) for section in sections}
    inside = np.full(n_obs, np.nan, dtype=np.float32)
    for section, reader in zip(sections, section_readers(sections, spec), strict=True):
        inside[section.rows] = reader.inside
        _log(section, reader, spec)
    record = {
        "tile_px": spec.tile_px,
        "mpp": spec.mpp,
        "um_coordinate_system": um_coordinate_system or "",
        "sections": {section.name: _section_record(section) for section in sections},
    }
    return MadeTiles(squares, inside, record)


def _in_tissue(table: AnnData, section: Section) -> Section:
    if "in_tissue" not in table.obs:
        return section
    keep = in_tissue(table.obs["in_tissue"].iloc[section.rows], section.name)
    if not keep.any():
        raise ValueError(
            f"Section {section.name!r}: `obs['in_tissue']` is 0 for all {keep.size} spots. Correct the column, or "
            "drop it to tile all spots."
        )
    if not keep.all():
        logger.hint("section %s: %d of %d spots left out (in_tissue is 0).", section.name, (~keep).sum(), keep.size)
    return section.take(keep)


def _with_patch(section: Section) -> Section:
    if section.patch_rows is None:
        return section
    keep = section.patch_rows >= 0
    if not keep.any():
        raise ValueError(
            f"Section {section.name!r}: none of its {keep.size} spots on tissue has a stored patch. Tile its image "
            "instead (`patches=False`), or leave it out."
        )
    if not keep.all():
        warn_user(
            f"Section {section.name!r}: {int((~keep).sum())} of {keep.size} spots have no stored patch and get no tile "
            f"(ids {examples(section.ids[~keep])}).",
        )
    return section.take(keep)


def _check_names(sdata: SpatialData, table: AnnData, sections: list[Section], key: str) -> None:
    record = tile_record(table, key)
    if record is None and read_uns(table, key) is not None:
        raise ValueError(
            f'`key_added={key!r}`: `table.uns["pekasc"][{key!r}]` holds something else, or a damaged record of tiles. '
            "Take another key, or delete it."
        )
    replaceable = {tile_shapes_name(region, key) for region in record["sections"]} if record else set()
    # names in a SpatialData are unique over all elements, ignoring case
    taken = {name.lower(): (kind, name) for kind, name, _ in sdata.gen_elements()}
    if TILE_INSIDE in table.obs and not _is_tile_inside(sdata, table, sections):
        raise ValueError(
            f"`obs[{TILE_INSIDE!r}]` is there and was not made by this call, so it is not replaced. With the table as "
            f"`adata`, rename it: `adata.obs = adata.obs.rename(columns={{{TILE_INSIDE!r}: 'my_{TILE_INSIDE}'}})`, or "
            "delete it."
        )
    for section in sections:
        name = tile_shapes_name(section.name, key)
        kind, existing = taken.get(name.lower(), ("", ""))
        ours = kind == "shapes" and existing == name
        if existing and not (ours and (name in replaceable or _are_tiles(sdata, section, sdata.shapes[name]))):
            raise ValueError(
                f"The tiles of {section.name!r} would be named {name!r}, but `sdata.{kind}[{existing!r}]` is there and "
                "was not made by this call for this table. Take another `key_added=`, or delete it."
            )


def _is_tile_inside(sdata: SpatialData, table: AnnData, sections: list[Section]) -> bool:
    """Tell whether ``obs["tile_inside"]`` is ours: fractions, with a record of tiles or, where it was lost, with tiles.

    A row without a tile has none, and joining objects drops the record but keeps the tiles.
    """
    values = table.obs[TILE_INSIDE]
    if values.dtype.kind != "f" or not values.dropna().between(0, 1).all():
        return False
    if any(tile_record(table, key) is not None for key in records(table)):
        return True
    tiled = np.zeros(table.n_obs, dtype=bool)
    for section in sections:
        for name in [name for name in sdata.shapes if name.startswith(f"{section.name}_")]:
            if _are_tiles(sdata, section, sdata.shapes[name]):
                tiled[section.rows[np.isin(section.ids, sdata.shapes[name].index)]] = True
    return bool(tiled.any() and not (values.notna().to_numpy() & ~tiled).any())


def _are_tiles(sdata: SpatialData, section: Section, frame: GeoDataFrame) -> bool:
    """Tell whether shapes are tiles of a section whose record was lost, as `spatialdata.concatenate` drops ``uns``.

    Tiles are equal parallelograms around the spots that their index names.
    """
    spots = sdata.shapes[section.shapes_name]
    # tiles of labels bear the ids of the labels
    own = section.shapes_name == section.name
    ids = frame.index if own else pd.Series(section.shape_ids, section.ids).reindex(frame.index)
    corners = shapely.get_coordinates(frame.geometry.to_numpy())
    if "radius" in frame or len(frame) == 0 or len(corners) != 5 * len(frame) or not ids.isin(spots.index).all():
        return False
    corners = corners.reshape(-1, 5, 2)
    centres = spots.geometry.loc[ids].centroid
    centres = np.column_stack([centres.x, centres.y])
    offsets = corners - centres[:, None]
    side = np.linalg.norm(offsets[0, 1] - offsets[0, 0])
    return bool(
        np.abs(offsets - offsets[:1]).max() < 1e-3 * side and np.abs(offsets[:, :4].mean(1)).max() < 1e-3 * side
    )


def _check_place(section: Section, spec: TileSpec, strict: bool) -> None:
    if min(section.size_px) == 0:
        logger.hint("section %s: image size unknown, so the position of the spots is not checked.", section.name)
        return
    side_px = spec.side_um / section.mpp
    picture = None if section.pyramid is None else overview(section.pyramid.levels)
    if picture is None:
        logger.hint("section %s: no coarse image level to find tissue in; only the borders are checked.", section.name)
    placement = check_placement(section.centres_px, section.size_px, picture, side_px)
    if placement.problem:
        message = f"Section {section.name!r} on image {section.image_name!r}: {placement.problem}"
        if strict and placement.certain:
            raise ValueError(f"{message}; `strict=False` tiles them as they are.")
        warn_user(f"{message} if that is so. They are tiled as they are.")
    off = ~placement.on_tissue
    if off.any():
        warn_user(
            f"Section {section.name!r}: {int(off.sum())} of {off.size} tiles show no tissue "
            f"(ids {examples(section.ids[off])}; {int((~placement.inside).sum())} have their centre off the image).",
        )


def _squares(sdata: SpatialData, section: Section, spec: TileSpec) -> GeoDataFrame:
    """Return the tiles as squares in the coordinates of the spots' shapes."""
    corners_px = TileGeometry(section.centres_px, section.um_to_px, spec).corners()
    px_to_shapes = np.linalg.inv(section.shapes_to_px)
    corners = corners_px @ px_to_shapes[:2, :2].T + px_to_shapes[:2, 2]
    spots = sdata.shapes[section.shapes_name]
    index = pd.Index(section.ids, name=spots.index.name if section.shapes_name == section.name else None)
    frame = GeoDataFrame(geometry=shapely.polygons(corners), index=index)
    return ShapesModel.parse(frame, transformations=dict(get_transformation(spots, get_all=True)))


def _section_record(section: Section) -> dict[str, Any]:
    return {
        "image": section.image_name,
        "coordinate_system": section.coordinate_system,
        "um_to_px": section.um_to_px,
        "shapes_to_px": section.shapes_to_px.copy(),
        "size_px": np.array(section.size_px),
        "mpp": section.mpp,
        "source": section.mpp_source,
        "patches": section.patches is not None,
    }


def _log(section: Section, reader: TileReader | PatchReader, spec: TileSpec) -> None:
    where = f"read from level {reader.level}" if isinstance(reader, TileReader) else "taken from stored patches"
    logger.hint(
        "section %s: %d tiles of %d px (%g um) on image %s, %.4g um per pixel (from %s), %s.",
        section.name,
        section.rows.size,
        spec.tile_px,
        spec.side_um,
        section.image_name,
        section.mpp,
        section.mpp_source,
        where,
    )
    if reader.upsampling > 1:
        logger.log(
            logging.WARNING if reader.upsampling > _COARSE else HINT,
            "section %s: the %s %.3g times coarser than the tiles (%.4g um against %.4g um): interpolated.",
            section.name,
            "image is" if isinstance(reader, TileReader) else "stored patches are",
            reader.upsampling,
            reader.upsampling * spec.mpp,
            spec.mpp,
        )


def _write(sdata: SpatialData, table_name: str, key: str, made: MadeTiles) -> None:
    # nothing below fails, so either everything is written or nothing
    table = writable_table(sdata, table_name)
    stale = {tile_shapes_name(region, key) for region in (tile_record(table, key) or {"sections": ()})["sections"]}
    for name in (stale | set(made.squares)) & set(sdata.shapes):
        del sdata.shapes[name]
    for name, frame in made.squares.items():
        sdata.shapes[name] = frame
    table.obs[TILE_INSIDE] = made.inside
    write_uns(table, key, made.record, kind="tiles")
