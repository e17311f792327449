"""Sections with tiles: read the record of `pp.tile`, check that nothing has changed since, and open readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._keys import GRID, TILES, read_uns, records, tile_shapes_name
from pekasc._sections._patches import patch_record
from pekasc._sections._records import recorded_pixel_sizes
from pekasc._sections._resolve import Section, _place, resolve_sections, scaled, with_patches
from pekasc._sections._shapes import shapes_of
from pekasc._sections._slides import images_of
from pekasc._sections._table import check_spatialdata, check_table, get_table, present_table, region_rows
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.tiling import PatchReader, TileGeometry, TileReader, TileSpec

logger = get_logger(__name__)

_SAME_VIEW = 0.02  # relative tolerance, since patches were cut to whole pixels


def tile_record(table: AnnData, key: str = TILES) -> dict[str, Any] | None:
    """Return the record of `pp.tile` under `key`, or None, also if it is damaged."""
    record = read_uns(table, key)
    return record if _is_tile_record(record) else None


def _is_tile_record(record: Any) -> bool:
    """Tell whether a record has what :func:`pekasc.pp.tile` writes, in types and shapes."""
    if not isinstance(record, Mapping) or not isinstance(record.get("sections"), Mapping):
        return False
    sizes: list[Any] = [record.get("tile_px"), record.get("mpp")]
    systems = [record.get("um_coordinate_system")]
    matrices: list[tuple[Any, tuple[int, ...]]] = []
    for known in record["sections"].values():
        if not isinstance(known, Mapping):
            return False
        sizes.append(known.get("mpp"))
        systems += [known.get(name) for name in ("image", "coordinate_system", "source")]
        matrices += [(known.get(name), shape) for name, shape in _MATRICES.items()]
    return (
        all(isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < 1e9 for n in sizes)
        and sizes[0] == int(sizes[0])
        and all(isinstance(name, str) for name in systems)
        and all(_numbers(value, shape) for value, shape in matrices)
    )


_MATRICES = {"um_to_px": (2, 2), "shapes_to_px": (3, 3), "size_px": (2,)}


def _numbers(value: Any, shape: tuple[int, ...]) -> bool:
    array = np.asarray(value) if isinstance(value, np.ndarray | list) and np.shape(value) == shape else None
    return array is not None and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def check_tile_key(table: AnnData, key: str, call: str) -> None:
    """Raise where a table has no tiles `key`, but others: the name is a mistake more likely than a wish for new tiles.

    `call` makes them. The default name is never a mistake.

    Raises
    ------
    KeyError
        If there are others.
    """
    others = tile_keys(table) if key != TILES and tile_record(table, key) is None else []
    if others:
        raise KeyError(f"No tiles {key!r} (there are: {', '.join(map(repr, others))}). To make them, run `{call}`.")


def tile_keys(table: AnnData) -> list[str]:
    """Return the names of the tiles that a table has."""
    return [name for name in records(table) if tile_record(table, name) is not None]


def tile_call(table: AnnData, table_name: str = "table", key: str = TILES) -> str:
    """Return the call that made the tiles of a table, or would make them, for an error."""
    grid = read_uns(table, GRID)
    if not isinstance(grid, dict):
        name = f", table_name={table_name!r}" if table_name != "table" else ""
        return f"pk.pp.tile(sdata{name}" + (f", key_added={key!r}" if key != TILES else "") + ")"
    record = tile_record(table, key) or {}
    size = "".join(f", {name}={record[name]:g}" for name in ("tile_px", "mpp") if name in record)
    where = f", shapes={grid['shapes']!r}" if grid.get("shapes") else f", stride_um={grid.get('stride_um', 0):g}"
    named = f", table_added={table_name!r}" if table_name != "grid" else ""
    return f"pk.pp.tile_grid(sdata, {grid.get('image')!r}{size}{where}{named})"


def tiled_table(sdata: Any, table_name: str) -> str:
    """Return the name of the table with tiles: the only such, if the default name is asked for and there is none."""
    if not isinstance(sdata, SpatialData) or table_name in sdata.tables or table_name != "table":
        return table_name
    if len(sdata.tables) == 1:
        return present_table(sdata, table_name)
    tiled = [str(name) for name, table in sdata.tables.items() if tile_record(table) is not None]
    if len(tiled) != 1:
        return table_name
    logger.hint("Using the only table with tiles, %r.", tiled[0])
    return tiled[0]


def tiled_sections(
    sdata: SpatialData, *, table_name: str = "table", key: str = TILES
) -> tuple[list[Section], TileSpec]:
    """Return the tiled sections of a table and the size of the tiles; rows without a tile are left out.

    Rows are joined to tiles by region and instance id, so the table may have been subset or reordered since.

    Raises
    ------
    KeyError
        If the table was not tiled.
    ValueError
        If an image, a transformation or a pixel size has changed since.
    """
    check_spatialdata(sdata)
    table = get_table(sdata, table_name)
    if table_name not in sdata.tables:
        table_name = str(next(iter(sdata.tables)))  # the only one
    call = tile_call(table, table_name, key)
    record = tile_record(table, key)
    if record is None:
        there = read_uns(table, key) is not None
        if not there:
            check_tile_key(table, key, call)
        wrong = f" (`table.uns['pekasc'][{key!r}]` is damaged, or something else: delete it)" if there else ""
        raise KeyError(f"No tiles {key!r} in the table {table_name!r}{wrong}. Run `{call}` first.")
    check_table(table)
    by_region = region_rows(table)
    sections = []
    for region in by_region.keys() & record["sections"].keys():
        section = _recorded_section(sdata, table, region, by_region[region], record, call)
        sections.append(section.take(_has_tile(sdata, section, key, call)))
    sections.sort(key=lambda section: list(by_region).index(section.name))
    _warn_of_untiled(table, by_region, sections, key, call)
    sections = [section for section in sections if section.rows.size]
    if not sections:
        raise KeyError(f"No row of the table {table_name!r} has a tile {key!r}. Run `{call}` again.")
    return sections, TileSpec(int(record["tile_px"]), float(record["mpp"]))


def _has_tile(sdata: SpatialData, section: Section, key: str, call: str) -> np.ndarray:
    name = tile_shapes_name(section.name, key)
    if name not in sdata.shapes:
        raise KeyError(f"The tiles {name!r} are not in `sdata.shapes` any more. Run `{call}` again.")
    return np.asarray(sdata.shapes[name].index.get_indexer(pd.Index(section.ids)) >= 0)


def _recorded_section(
    sdata: SpatialData, table: AnnData, region: str, rows: np.ndarray, record: dict[str, Any], call: str
) -> Section:
    """Return a section with all its rows, with image and pixel size as recorded."""
    known = record["sections"][region]
    from_patches = bool(known.get("patches", False))
    if known["image"] not in images_of(sdata) and not (from_patches and patch_record(table, region)):
        raise KeyError(
            f"Section {region!r} was tiled on the image {known['image']!r}, which is not in `sdata.images` any more: "
            f"{list(images_of(sdata))}. Run `{call}` again."
        )
    um_system = record["um_coordinate_system"] or None
    found = shapes_of(sdata, table, region)
    section = _place(sdata, table, region, found, rows, known["image"], um_system)
    mpp = known["mpp"]
    if known["source"] in ("recorded", "slide"):
        mpp = recorded_pixel_sizes(sdata, table, known["image"], warn=False).get(known["source"], mpp)
    section = scaled(sdata, section, mpp, known["source"], um_system)
    changed = _changed(section, known)
    if changed is not None:
        raise ValueError(
            f"Section {region!r}: the image, a transformation or the pixel size has changed since it was tiled "
            f"({changed}). Run `{call}` again."
        )
    return with_patches(table, section) if from_patches else section


def _changed(section: Section, known: dict[str, Any]) -> str | None:
    """Return what differs from the record, or None; a crop of the image is fine, since tiles stay the same."""
    size = np.array(section.size_px, dtype=np.float64)
    then = {name: np.asarray(known[name], dtype=np.float64) for name in ("um_to_px", "shapes_to_px", "size_px")}
    # origin of the image in the one that was tiled
    start = (then["shapes_to_px"] - section.shapes_to_px)[:2, 2]
    cropped = (size != then["size_px"]).any() and (start > -1).all() and (start + size < then["size_px"] + 1).all()
    for name, now in (("um_to_px", section.um_to_px), ("shapes_to_px", section.shapes_to_px), ("size_px", size)):
        before = then[name]
        if cropped and name == "size_px":
            continue
        if cropped and name == "shapes_to_px":
            before, now = before[:2, :2], now[:2, :2]
        if np.abs(now - before).max() > 1e-6 * np.abs(before).max():
            return f"{name} was {before.tolist()}, is {now.tolist()}"
    return None


def _warn_of_untiled(
    table: AnnData, by_region: dict[str, np.ndarray], sections: list[Section], key: str, call: str
) -> None:
    """Warn of sections and spots on tissue without tiles, since they were added after the tiling."""
    tiled = np.zeros(table.n_obs, dtype=bool)
    for section in sections:
        tiled[section.rows] = True
        if section.patches is not None:
            # spots without a stored patch cannot be tiled, and `pp.tile` warned of them
            tiled[by_region[section.name]] = True
    if "in_tissue" in table.obs:
        tiled |= table.obs["in_tissue"].astype(str).isin(["0", "0.0", "False"]).to_numpy()
    missing = {region: int((~tiled[rows]).sum()) for region, rows in by_region.items()}
    missing = {region: n for region, n in missing.items() if n}
    if missing:
        listed = ", ".join(f"{n} of {by_region[region].size} in {region!r}" for region, n in missing.items())
        warn_user(
            f"Spots without a tile {key!r} are left out: {listed}. `{call}` tiles them too.",
        )


def section_readers(
    sections: Iterable[Section], spec: TileSpec, *, further: bool = False, **kwargs: Any
) -> list[TileReader | PatchReader]:
    """Return a reader of tiles for each section; `kwargs` go to :class:`~pekasc.tiling.TileReader`.

    With `further`, `spec` is a larger field of view, which is always read from the image.

    Raises
    ------
    ValueError
        If stored patches have another field of view than the tiles, or a larger one is needed and there is no image.
    """
    return [_reader(section, spec, further, **kwargs) for section in sections]


def _reader(section: Section, spec: TileSpec, further: bool, **kwargs: Any) -> TileReader | PatchReader:
    geometry = TileGeometry(section.centres_px, section.um_to_px, spec)
    if further and section.pyramid is None:
        raise ValueError(
            f"Tiles are also needed at {spec.mpp:g} um/px, but section {section.name!r} has stored patches and no "
            "image: nothing beyond the patches is known. Read the slide too, or use one scale."
        )
    if further or section.patches is None or section.patch_rows is None:
        if section.pyramid is None:
            raise ValueError(f"Section {section.name!r} has neither an image nor stored patches to read tiles from.")
        label = f"section {section.name!r} (image {section.image_name!r})"
        return TileReader(section.pyramid, geometry, label=label, stain=section.stain, **kwargs)
    side_um = section.patch_side_px * section.mpp
    if abs(side_um / spec.side_um - 1) > _SAME_VIEW:
        raise ValueError(
            f"The stored patches of section {section.name!r} show {side_um:.4g} um, the tiles are to show "
            f"{spec.side_um:.4g} um ({spec.tile_px} px at {spec.mpp:g} um/px). The field of view of patches is fixed: "
            f"take `mpp={side_um / spec.tile_px:.4g}` with {spec.tile_px} px, or tile the image itself."
        )
    known = min(section.size_px) > 0
    inside = geometry.inside(*section.size_px) if known else np.full(len(geometry), np.nan, dtype=np.float32)
    return PatchReader(section.patches, section.patch_rows, spec, inside, stain=section.stain)


def positions_um(data: SpatialData | AnnData, *, table_name: str = "table", key: str = TILES) -> np.ndarray:
    """Return the position of every row in um, (n, 2); ``obsm["spatial"]`` of an AnnData.

    Rows without a tile have a position as well. It is NaN in sections added after the tiling, whose pixel size is
    unknown.

    Raises
    ------
    KeyError
        If an AnnData has no ``obsm["spatial"]``.
    """
    table = get_table(data, table_name)
    if isinstance(data, AnnData):
        if "spatial" not in data.obsm:
            raise KeyError(f'`obsm["spatial"]` not found. Available: {list(data.obsm)}.')
        return np.array(data.obsm["spatial"], dtype=np.float64)
    record = tile_record(table, key)
    if record is not None:
        check_table(table)
        call = tile_call(table, table_name, key)
        sections = [
            _recorded_section(data, table, region, rows, record, call)
            for region, rows in region_rows(table).items()
            if region in record["sections"]
        ]
    else:
        sections = resolve_sections(data, table_name=table_name)
    spatial = np.full((table.n_obs, 2), np.nan)
    for section in sections:
        spatial[section.rows] = section.centres_um
    return spatial
