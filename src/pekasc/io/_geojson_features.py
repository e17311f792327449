"""GeoJSON features as QuPath reads them: outlines in pixels, a class with its colour, measurements. Pure arrays.

RFC 7946 has the geometry; `objectType`, `classification` and `measurements` are what QuPath writes and reads beside it
(PathObjectTypeAdapters and PathIO in its source).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import shapely

OBJECT_TYPES = ("annotation", "detection", "tile")
_DIGITS = 3  # of a pixel
_QUARTER = 8  # segments of a quarter circle


def outlines(geometry: np.ndarray, radius: np.ndarray | None, to_px: np.ndarray) -> np.ndarray:
    """Return shapes as polygons in pixels, (n,) of shapely.

    Parameters
    ----------
    geometry
        Points or polygons.
    radius
        Radii of points; None for polygons.
    to_px
        (3, 3) matrix from their coordinates to pixels.
    """
    if radius is not None:
        geometry = shapely.buffer(geometry, radius, quad_segs=_QUARTER)
    return np.asarray(shapely.transform(geometry, lambda points: points @ to_px[:2, :2].T + to_px[:2, 2]))


def merged(polygons: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return one polygon for each class, the classes, and the indices of the polygons in each.

    `classes` is an index for each polygon; those below 0 have none and are left out.
    """
    names = np.unique(classes[classes >= 0])
    members = [np.flatnonzero(classes == name) for name in names]
    # polygons of a grid share edges but for rounding, which would leave slivers between them
    fine = 10.0**-_DIGITS
    unions = [shapely.union_all(shapely.make_valid(polygons[index]), grid_size=fine) for index in members]
    return np.array(unions, dtype=object), names, members


def features(
    polygons: np.ndarray, ids: Sequence[str], object_type: str, classes: Sequence[Mapping[str, Any] | None],
    names: Sequence[str], values: Iterable[np.ndarray],
) -> Iterator[str]:  # fmt: skip
    """Yield a feature for each polygon as JSON.

    Parameters
    ----------
    polygons
        (n,) in pixels.
    ids
        What tells them apart, of which ids are made that are the same in every run.
    object_type
        One of :data:`OBJECT_TYPES`.
    classes
        Name and colour of each, or None.
    names, values
        Names of the measurements, and an array with their values for each; those that are no finite numbers are left
        out, for JSON has none.
    """
    # exterior rings against the clock, as RFC 7946 has them
    rounded = shapely.transform(polygons, lambda points: np.round(points, _DIGITS))
    texts = shapely.to_geojson(shapely.reverse(shapely.normalize(rounded)))
    for text, name, group, row in zip(texts, ids, classes, values, strict=True):
        properties: dict[str, Any] = {"objectType": object_type}
        if group is not None:
            properties["classification"] = group
        measured = {key: float(value) for key, value in zip(names, row, strict=True) if np.isfinite(value)}
        if measured:
            properties["measurements"] = measured
        head = json.dumps({"type": "Feature", "id": str(uuid5(NAMESPACE_URL, name))})
        yield f'{head[:-1]}, "geometry": {text}, "properties": {json.dumps(properties, allow_nan=False)}}}'


def write_collection(out: BinaryIO | Any, found: Iterable[str]) -> int:
    """Write features as a FeatureCollection, one a line, and return how many there are."""
    out.write(b'{"type": "FeatureCollection", "features": [')
    n = 0
    for n, feature in enumerate(found, start=1):
        out.write((",\n" if n > 1 else "\n").encode() + feature.encode())
    out.write(b"\n]}\n")
    return n
