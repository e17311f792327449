"""A slide without spots as a section: its image, pixel size and orientation in um."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from spatialdata import SpatialData

from pekasc._sections._images import affine, coordinate_systems, image_pyramid, image_size, transform
from pekasc._sections._pixel_size import TOLERANCE, check_mpp, choose_pixel_size, warn_of_pixels
from pekasc._sections._records import recorded_pixel_sizes
from pekasc._sections._resolve import Section, centroids, scaled, shared_system
from pekasc._sections._slides import images_of
from pekasc._sections._table import check_spatialdata


def slide_section(
    sdata: SpatialData,
    image_name: str,
    *,
    image_mpp: float | Mapping[str, float] | None = None,
    um_coordinate_system: str | None = None,
    but: str | None = None,
) -> Section:
    """Return an image as a section without observations. The table `but` is not asked for the pixel size.

    Raises
    ------
    KeyError
        If the image or coordinate system is not there.
    ValueError
        If the image is not RGB, or its pixel size is unknown or contradictory, also between tables.
    """
    check_spatialdata(sdata)
    images = images_of(sdata)
    if not isinstance(image_name, str) or image_name not in images:
        raise KeyError(f"Image {image_name!r} not found. Available images: {list(images)}.")
    image = images[image_name]
    systems = coordinate_systems(image)
    if um_coordinate_system is not None and um_coordinate_system not in systems:
        raise KeyError(
            f"The image {image_name!r} is not in the coordinate system {um_coordinate_system!r} "
            f"(`um_coordinate_system=`), but in {sorted(systems)}."
        )
    system = um_coordinate_system or min(systems, key=lambda name: (name != "global", name))
    section = Section(
        name=image_name,
        shapes_name="",
        image_name=image_name,
        coordinate_system=system,
        rows=np.empty(0, np.int64),
        ids=np.empty(0, np.int64),
        shape_ids=np.empty(0, np.int64),
        centres_px=np.empty((0, 2)),
        centres_um=np.empty((0, 2)),
        um_to_px=np.full((2, 2), np.nan),
        shapes_to_px=np.eye(3),
        mpp=np.nan,
        mpp_source="",
        size_px=image_size(image),
        pyramid=image_pyramid(image_name, image),
    )
    sources: dict[str, float] = {}
    given = image_mpp.get(image_name) if isinstance(image_mpp, Mapping) else image_mpp
    if given is not None:
        sources["image_mpp"] = check_mpp(given, "`image_mpp`")
    if um_coordinate_system is not None:
        px_to_um = affine(image, system)
        sources["um_coordinate_system"] = float(np.sqrt(abs(np.linalg.det(px_to_um[:2, :2]))))
    explicit = bool(sources)
    sources |= _recorded(sdata, image_name, but, warn=not explicit)
    if um_coordinate_system is not None:
        warn_of_pixels(um_coordinate_system, image_name, px_to_um, sources)
    mpp, source = choose_pixel_size(
        sources, region=None, image_name=image_name, size_px=section.size_px, arrays=(), circles=False, strict=True
    )
    return scaled(sdata, section, mpp, source, um_coordinate_system)


def _recorded(sdata: SpatialData, image_name: str, but: str | None, *, warn: bool) -> dict[str, float]:
    """Return the pixel sizes that are recorded for an image in the object, and in its tables if these agree."""
    tables = {name: table for name, table in sdata.tables.items() if name != but}
    sources = {} if tables else recorded_pixel_sizes(sdata, None, image_name, warn=warn)
    by_table: dict[str, float] = {}
    for name, table in tables.items():
        found = recorded_pixel_sizes(sdata, table, image_name, warn=warn)
        if "recorded" in found:
            by_table[name] = found["recorded"]
        sources = found | sources
    if by_table and max(by_table.values()) > (1 + TOLERANCE) * min(by_table.values()):
        listed = ", ".join(f"{mpp:.4g} um in {name!r}" for name, mpp in by_table.items())
        raise ValueError(
            f"Tables record different pixel sizes of image {image_name!r}: {listed}. Correct the wrong one, "
            f'`sdata[table_name].uns["pekasc"]["image_mpp"][{image_name!r}]`.'
        )
    return sources


def shape_centres(sdata: SpatialData, name: str, image_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the centroids of shapes in level-0 pixels of an image, (n, 2), and their ids."""
    ids = sdata.shapes[name].index.to_numpy()
    _, to_px = shared_system(sdata, name, image_name, None)
    return transform(to_px, centroids(sdata.shapes[name], ids, name)), ids
