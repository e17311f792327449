"""Resolve the sections of a SpatialData: rows, centres in pixels and micrometers, pixel size, image pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from geopandas import GeoDataFrame
from spatialdata import SpatialData

from pekasc._keys import BARCODE
from pekasc._sections._images import (
    affine,
    choose_image,
    coordinate_systems,
    has_image,
    image_pyramid,
    image_size,
    transform,
)
from pekasc._sections._overview import picture_digest
from pekasc._sections._patches import check_patches, join_patches, open_patches, patch_record
from pekasc._sections._pixel_size import (
    ARRAYS,
    VISIUM_DIAMETERS_UM,
    VISIUM_SPOT_UM,
    array_pixel_size,
    check_mpp,
    choose_pixel_size,
    fitting_arrays,
    lattice_pixel_size,
    nearest_orthogonal,
    warn_of_pixels,
)
from pekasc._sections._records import recorded_pixel_sizes
from pekasc._sections._shapes import check_cells, in_micrometers, shapes_of
from pekasc._sections._slides import images_of
from pekasc._sections._table import (
    check_spatialdata,
    check_table,
    examples,
    get_table,
    grid_index,
    region_rows,
    table_keys,
)
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.tiling import ImagePyramid, PatchFile, StainMap

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Section:
    """One tissue section: its image, and the positions of its observations on it.

    Attributes
    ----------
    name
        The region: name of the element that the table annotates.
    shapes_name
        The shapes: the region, or, if that is labels, the shapes that carry its ids.
    image_name, coordinate_system
        The image, and the coordinate system that it shares with the shapes. For stored patches: the image that they
        were cut from, which need not exist.
    rows
        Indices of the observations in the table, ascending.
    ids, shape_ids
        Instance ids of the observations, and ids of their shapes; the same, unless the region is labels.
    centres_px
        Centres, (n, 2) x, y in level-0 pixels of the image.
    centres_um
        Centres, (n, 2) x, y in um.
    um_to_px
        (2, 2) matrix from offsets in um to offsets in level-0 pixels.
    shapes_to_px
        (3, 3) affine matrix from the shapes' own coordinates to level-0 pixels.
    mpp, mpp_source
        Pixel size of level 0 in um, and its source.
    size_px
        Width and height of level 0; (0, 0) if unknown.
    pyramid
        The image; None if there are only stored patches.
    patches, patch_rows, patch_side_px
        The stored patches, if tiles are taken from them, the row of the file for each observation (-1: none), and the
        side of a patch in level-0 pixels.
    patches_id
        Digest of the section's stored patches, whether tiles are taken from them or not.
    stain
        Map that brings the colours of its tiles to those of an adapter's training sections; None leaves them.
    """

    name: str
    shapes_name: str
    image_name: str
    coordinate_system: str
    rows: np.ndarray
    ids: np.ndarray
    shape_ids: np.ndarray
    centres_px: np.ndarray
    centres_um: np.ndarray
    um_to_px: np.ndarray
    shapes_to_px: np.ndarray
    mpp: float
    mpp_source: str
    size_px: tuple[int, int]
    pyramid: ImagePyramid | None
    patches: PatchFile | None = None
    patch_rows: np.ndarray | None = None
    patch_side_px: float = float("nan")
    patches_id: str = ""
    stain: StainMap | None = None

    def take(self, keep: np.ndarray) -> Section:
        """Return the section with a subset of its observations, given by a mask or by indices."""
        return replace(
            self,
            rows=self.rows[keep],
            ids=self.ids[keep],
            shape_ids=self.shape_ids[keep],
            centres_px=self.centres_px[keep],
            centres_um=self.centres_um[keep],
            patch_rows=None if self.patch_rows is None else self.patch_rows[keep],
        )

    def picture_ids(self) -> list[str]:
        """Return the digests of the section's image and of its stored patches, those that exist."""
        ids = [] if self.pyramid is None else [picture_digest(self.pyramid)]
        return [*ids, self.patches_id] if self.patches_id else ids


def resolve_sections(
    sdata: SpatialData,
    *,
    table_name: str = "table",
    images: Mapping[str, str] | None = None,
    image_mpp: float | Mapping[str, float] | None = None,
    um_coordinate_system: str | None = None,
    array: str | None = None,
    patches: bool | None = None,
    strict: bool = True,
) -> list[Section]:
    """Return the sections of a table, one per region; for the arguments, see :func:`pekasc.pp.tile`.

    Raises
    ------
    KeyError
        If a table, column, region, image, coordinate system or stored patches do not exist.
    ValueError
        If the table's names or ids are not unique, rows have no shape, the image or its pixel size is ambiguous, or
        the image is not RGB of uint8.
    """
    check_spatialdata(sdata)
    table = get_table(sdata, table_name)
    check_table(table)
    by_region = region_rows(table)
    found = {region: shapes_of(sdata, table, region) for region in by_region}
    for region, (name, column) in found.items():
        if name != region:
            logger.hint("section %s: labels; using the shapes %s, whose ids are in obs[%r].", region, name, column)
    shapes = {region: sdata.shapes[name] for region, (name, _) in found.items()}
    _check_arguments(sdata, by_region, images, image_mpp, um_coordinate_system, array)
    sections = []
    for region, rows in by_region.items():
        stored = patch_record(table, region)
        if patches and stored is None:
            raise KeyError(
                f"`patches=True`, but no stored patches are recorded for section {region!r}: a reader such as "
                "`pekasc.io.read_hest` does that where it finds them."
            )
        there = has_image(sdata, region, images, shapes)
        from_patches = bool(patches) or (patches is None and stored is not None and not there)
        if from_patches and stored is not None and not there:
            image_name = stored["image"]
        else:
            image_name = choose_image(sdata, region, images, shapes)
        section = _place(sdata, table, region, found[region], rows, image_name, um_coordinate_system)
        sources = _pixel_sizes(sdata, table, section, image_mpp, um_coordinate_system, array)
        mpp, source = choose_pixel_size(
            sources,
            region=region,
            image_name=image_name,
            size_px=section.size_px,
            arrays=() if sources else _fitting_arrays(table, section),
            circles="radius" in shapes[region] and "array_row" not in table.obs,
            strict=strict,
        )
        section = scaled(sdata, section, mpp, source, um_coordinate_system)
        sections.append(with_patches(table, section) if from_patches else section)
    if isinstance(image_mpp, Mapping):
        _warn_of_unused(image_mpp, sections)
    return sections


def _warn_of_unused(image_mpp: Mapping[str, float], sections: list[Section]) -> None:
    used = list(dict.fromkeys(section.image_name for section in sections))
    unused = [name for name in image_mpp if name not in used]
    if unused:
        warn_user(
            f"`image_mpp` gives a pixel size of {', '.join(map(repr, unused))}, and no section is on that image: it is "
            f"not used. The sections are on {examples(used)}."
        )


def _check_arguments(
    sdata: SpatialData,
    regions: Mapping[str, Any],
    images: Mapping[str, str] | None,
    image_mpp: float | Mapping[str, float] | None,
    um_coordinate_system: str | None,
    array: str | None,
) -> None:
    if images is not None and not isinstance(images, Mapping):
        line = f" For one image of all: `images={dict.fromkeys(regions, images)}`." if isinstance(images, str) else ""
        raise TypeError(f"`images` must be a dict from region to image name, got {images!r}.{line}")
    for region in images or {}:
        if region not in regions:
            raise KeyError(f"`images` names the region {region!r}, the table has {list(regions)}.")
    if isinstance(image_mpp, Mapping):
        for name, value in image_mpp.items():
            if name not in images_of(sdata):
                raise KeyError(f"`image_mpp` names the image {name!r}. Available images: {list(images_of(sdata))}.")
            check_mpp(value, f"`image_mpp[{name!r}]`")
    elif image_mpp is not None:
        check_mpp(image_mpp, "`image_mpp`")
    if um_coordinate_system is not None and um_coordinate_system not in sdata.coordinate_systems:
        raise KeyError(
            f"Coordinate system {um_coordinate_system!r} not found (`um_coordinate_system=`). "
            f"Available coordinate systems: {sorted(sdata.coordinate_systems)}."
        )
    if array is not None and array not in ARRAYS:
        raise ValueError(f"`array={array!r}` is not known, use one of {list(ARRAYS)}.")


def _place(
    sdata: SpatialData,
    table: AnnData,
    region: str,
    found: tuple[str, str],
    rows: np.ndarray,
    image_name: str,
    um_coordinate_system: str | None,
) -> Section:
    """Return a section in pixels, still without pixel size and micrometers; `found` is what `shapes_of` returned."""
    shapes_name, column = found
    shapes = sdata.shapes[shapes_name]
    stored = patch_record(table, region)
    _, _, instance_key = table_keys(table)
    ids, shape_ids = (table.obs[key].to_numpy()[rows] for key in (instance_key, column))
    centres_in_shapes = centroids(shapes, shape_ids, shapes_name)
    check_cells(table, rows, shapes_name, shapes, shape_ids)
    pyramid = None
    image = images_of(sdata).get(image_name)
    if image is not None:
        pyramid, size_px = image_pyramid(image_name, image), image_size(image)
        system, shapes_to_px = shared_system(sdata, shapes_name, image_name, um_coordinate_system)
    else:
        system, shapes_to_px, size_px = _patch_system(shapes, region, stored, um_coordinate_system)
    centres = transform(shapes_to_px, centres_in_shapes)
    return Section(
        name=region,
        shapes_name=shapes_name,
        image_name=image_name,
        coordinate_system=system,
        rows=rows.astype(np.int64),
        ids=ids,
        shape_ids=shape_ids,
        centres_px=centres,
        centres_um=np.full_like(centres, np.nan),
        um_to_px=np.full((2, 2), np.nan),
        shapes_to_px=shapes_to_px,
        mpp=np.nan,
        mpp_source="",
        size_px=size_px,
        pyramid=pyramid,
        patches_id="" if stored is None else stored["id"],
    )


def _patch_system(
    shapes: GeoDataFrame, region: str, stored: Mapping[str, Any] | None, um_coordinate_system: str | None
) -> tuple[str, np.ndarray, tuple[int, int]]:
    """Return the coordinate system of stored patches, the matrix from shapes to it, and the size of their image."""
    system = None if stored is None else stored["coordinate_system"]
    if stored is None or system not in coordinate_systems(shapes):
        raise ValueError(
            f"Section {region!r} has no image, and its shapes (in {sorted(coordinate_systems(shapes))}) are not in the "
            f"coordinate system of stored patches, {system!r}. Read the sample again, or add its image."
        )
    if um_coordinate_system is not None:
        raise ValueError(
            f"`um_coordinate_system={um_coordinate_system!r}` needs an image, and section {region!r} has stored "
            "patches only. Leave it out: the reader recorded the pixel size, or give `image_mpp=`."
        )
    width, height = (int(n) for n in stored["size_px"])
    return system, affine(shapes, system), (width, height)


def with_patches(table: AnnData, section: Section) -> Section:
    """Return the section with tiles from its stored patches, after checking them against its spots."""
    stored = patch_record(table, section.name)
    if stored is None or BARCODE not in table.obs:
        raise KeyError(
            f"The tiles of section {section.name!r} are stored patches, but "
            + ("their record is" if stored is None else f"the column {BARCODE!r} that joins them to spots is")
            + " not in the table any more. Read the sample again."
        )
    file = open_patches(section.name, stored)
    rows = join_patches(file, table.obs[BARCODE].iloc[section.rows], section.name)
    check_patches(file, rows, section.centres_px, stored["side_px"], section.name)
    return replace(section, patches=file, patch_rows=rows, patch_side_px=float(stored["side_px"]))


def centroids(shapes: GeoDataFrame, ids: np.ndarray, region: str) -> np.ndarray:
    """Return the centroids of the shapes with these ids, in the shapes' own coordinates."""
    if not shapes.index.is_unique:
        repeated = shapes.index[shapes.index.duplicated()].unique()
        raise ValueError(f"The index of the shapes {region!r} has duplicates: {examples(repeated)}. Renumber it.")
    positions = shapes.index.get_indexer(pd.Index(ids))
    missing = ids[positions < 0]
    if missing.size:
        hint = ""
        if missing.size == ids.size:
            hint = f" (ids like {examples(ids, 1)} in the table, {examples(shapes.index, 1)} in the shapes)"
        raise ValueError(
            f"{missing.size} of {ids.size} table rows have no shape in {region!r}: {examples(missing)}{hint}. "
            "Leave them out of the table, or correct the instance ids."
        )
    geometry = shapes.geometry.iloc[positions]
    invalid = ~geometry.is_valid.to_numpy() & np.isfinite(geometry.bounds.to_numpy()).all(axis=1)
    if invalid.any():
        # the centroid of a self-crossing polygon can lie outside of its bounds
        geometry = geometry.copy()
        geometry.iloc[np.flatnonzero(invalid)] = shapely.make_valid(geometry.to_numpy()[invalid])
        logger.hint(
            "section %s: %d of %d shapes are not valid (self-crossing?), ids %s; repaired with shapely.make_valid.",
            region,
            int(invalid.sum()),
            invalid.size,
            examples(ids[invalid]),
        )
    centroid = geometry.centroid
    xy = np.column_stack([centroid.x.to_numpy(), centroid.y.to_numpy()]).astype(np.float64)
    bad = ~np.isfinite(xy).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} shapes in {region!r} are empty or not finite: {examples(ids[bad])}. Leave them out of "
            "the shapes and the table."
        )
    return xy


def shared_system(
    sdata: SpatialData, shapes_name: str, image_name: str, preferred: str | None
) -> tuple[str, np.ndarray]:
    """Return the coordinate system shared by shapes and image, and the matrix from shapes to level-0 pixels."""
    shapes, image = sdata.shapes[shapes_name], images_of(sdata)[image_name]
    shared = coordinate_systems(shapes) & coordinate_systems(image)
    if not shared:
        raise ValueError(
            f"The image {image_name!r} (in {sorted(coordinate_systems(image))}) and the shapes {shapes_name!r} "
            f"(in {sorted(coordinate_systems(shapes))}) share no coordinate system. Add one with "
            "`spatialdata.transformations.set_transformation(image, ..., to_coordinate_system=...)`."
        )
    # deterministic: the system in um first, then "global", then by name
    order = sorted(shared, key=lambda name: (name != preferred, name != "global", name))
    maps = {name: np.linalg.inv(affine(image, name)) @ affine(shapes, name) for name in order}
    x0, y0, x1, y1 = shapes.total_bounds
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)
    tolerance = max(0.5, 1e-3 * np.hypot(*image_size(image)))  # scale factors are rounded
    reference = transform(maps[order[0]], corners)
    for name in order[1:]:
        off = np.linalg.norm(transform(maps[name], corners) - reference, axis=1).max()
        if off > tolerance:
            raise ValueError(
                f"The shapes {shapes_name!r} lie elsewhere on the image {image_name!r} by the coordinate system "
                f"{name!r} than by {order[0]!r}: up to {off:.4g} px apart. Remove the wrong one with "
                "`spatialdata.transformations.remove_transformation`."
            )
    return order[0], maps[order[0]]


def _um_map(sdata: SpatialData, section: Section, um_coordinate_system: str) -> np.ndarray:
    """Return the 3 x 3 matrix from level-0 pixels to the system in um, through the image or through the shapes."""
    image = images_of(sdata)[section.image_name]
    if um_coordinate_system in coordinate_systems(image):
        return affine(image, um_coordinate_system)
    shapes = sdata.shapes[section.shapes_name]
    if um_coordinate_system in coordinate_systems(shapes):
        return np.asarray(affine(shapes, um_coordinate_system) @ np.linalg.inv(section.shapes_to_px))
    raise ValueError(
        f"Neither the image {section.image_name!r} nor the shapes {section.shapes_name!r} are in the coordinate system "
        f"{um_coordinate_system!r} (`um_coordinate_system=`); they are in "
        f"{sorted(coordinate_systems(image) | coordinate_systems(shapes))}. Name one of these that is in um, or give "
        "`image_mpp=`."
    )


def _pixel_sizes(
    sdata: SpatialData,
    table: AnnData,
    section: Section,
    image_mpp: float | Mapping[str, float] | None,
    um_coordinate_system: str | None,
    array: str | None,
) -> dict[str, float]:
    """Return the pixel size by source, explicit ones first."""
    sources: dict[str, float] = {}
    if isinstance(image_mpp, Real):
        sources["image_mpp"] = float(image_mpp)
    elif isinstance(image_mpp, Mapping) and section.image_name in image_mpp:
        sources["image_mpp"] = float(image_mpp[section.image_name])
    if um_coordinate_system is not None:
        px_to_um = _um_map(sdata, section, um_coordinate_system)
        sources["um_coordinate_system"] = float(np.sqrt(abs(np.linalg.det(px_to_um[:2, :2]))))
    if array is not None:
        sources["array"] = _from_array(sdata, table, section, array)
    sources |= recorded_pixel_sizes(sdata, table, section.image_name, warn=not sources)
    shapes = sdata.shapes[section.shapes_name]
    if in_micrometers(table, section.rows, section.shapes_name, shapes, section.shape_ids):
        sources["cell_areas"] = 1 / _shape_scale(section)
    if array != "visium":
        lattice = _from_lattice(sdata, table, section, alone=not sources)
        if lattice is not None:
            sources["lattice"] = lattice
    if um_coordinate_system is not None:
        warn_of_pixels(um_coordinate_system, section.image_name, px_to_um, sources)
    return sources


def _numeric_index(table: AnnData, section: Section) -> tuple[np.ndarray, np.ndarray]:
    """Return array_row and array_col, NaN where they are no numbers; empty if there are none."""
    if not {"array_row", "array_col"} <= set(table.obs):
        return np.empty(0), np.empty(0)
    row, col = (
        pd.to_numeric(table.obs[c].iloc[section.rows].astype(str), errors="coerce").to_numpy(dtype=np.float64)
        for c in ("array_row", "array_col")
    )
    return row, col


def _fitting_arrays(table: AnnData, section: Section) -> list[str]:
    row, col = _numeric_index(table, section)
    if not (row.size and np.isfinite([*row, *col]).all()):
        return []
    return fitting_arrays(col, row, section.centres_px, section.name)


def _from_lattice(sdata: SpatialData, table: AnnData, section: Section, *, alone: bool) -> float | None:
    """Return the pixel size if the spots are those of a Visium slide; `alone`, after a look at their diameter."""
    row, col = _numeric_index(table, section)
    mpp = lattice_pixel_size(col, row, section.centres_px)
    if mpp is None or not alone:
        return mpp
    logger.hint(
        "section %s: the columns array_row and array_col are those of a Visium slide: %.4g um per pixel from the "
        "100 um between its spots.",
        section.name,
        mpp,
    )
    shapes = sdata.shapes[section.shapes_name]
    if "radius" in shapes:
        diameter_um = 2 * mpp * _shape_scale(section) * float(shapes["radius"].median())
        low, high = VISIUM_DIAMETERS_UM
        if not low <= diameter_um <= high:
            warn_user(
                f"Section {section.name!r}: by the 100 um between its spots, their stored diameter is "
                f"{diameter_um:.3g} um, and a Visium spot has 55 to {VISIUM_SPOT_UM:g} um. Check the radius of the "
                "shapes, or give `image_mpp=`.",
            )
    return mpp


def _shape_scale(section: Section) -> float:
    """Return level-0 pixels per unit of the shapes' own coordinates."""
    return float(np.sqrt(abs(np.linalg.det(section.shapes_to_px[:2, :2]))))


def _grid_index(table: AnnData, column: str, section: Section) -> np.ndarray:
    return grid_index(table.obs[column].iloc[section.rows], column, section.name)


def _from_array(sdata: SpatialData, table: AnnData, section: Section, array: str) -> float:
    missing = [column for column in ("array_row", "array_col") if column not in table.obs]
    if not missing:
        row, col = (_grid_index(table, c, section) for c in ("array_row", "array_col"))
        return array_pixel_size(array, col, row, section.centres_px, section.name)
    shapes = sdata.shapes[section.shapes_name]
    if array != "visium" or "radius" not in shapes:
        raise KeyError(
            f'`array="{array}"` takes the pixel size from the columns array_row and array_col; '
            f"{' and '.join(missing)} not found in `table.obs`. Available columns: {list(table.obs)}. Without them, "
            "give `image_mpp=`."
        )
    diameter_px = 2 * float(shapes["radius"].median()) * _shape_scale(section)
    mpp = VISIUM_SPOT_UM / diameter_px
    logger.hint(
        "section %s: no array_row and array_col; pixel size %.4g um from the spot diameter, %.4g px for %g um.",
        section.name,
        mpp,
        diameter_px,
        VISIUM_SPOT_UM,
    )
    return mpp


def scaled(sdata: SpatialData, section: Section, mpp: float, source: str, um_coordinate_system: str | None) -> Section:
    """Return a section with positions in um: axes along its coordinate system, scale from the pixel size."""
    if um_coordinate_system is not None:
        px_to_um = _um_map(sdata, section, um_coordinate_system)
    elif section.pyramid is not None:
        px_to_um = affine(images_of(sdata)[section.image_name], section.coordinate_system)
    else:
        px_to_um = np.eye(3)
    if source == "um_coordinate_system":
        um_to_px = np.linalg.inv(px_to_um[:2, :2])
        centres_um = transform(px_to_um, section.centres_px)
    else:
        um_to_px = nearest_orthogonal(np.linalg.inv(px_to_um[:2, :2])) / mpp
        centres_um = section.centres_px @ np.linalg.inv(um_to_px).T
    mpp = float(1 / np.sqrt(abs(np.linalg.det(um_to_px))))
    return replace(section, um_to_px=um_to_px, centres_um=centres_um, mpp=mpp, mpp_source=source)
