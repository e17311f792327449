"""Coarse images of sections in micrometers, and the size of spots, for plots."""

from __future__ import annotations

from math import ceil

import numpy as np
from spatialdata import SpatialData

from pekasc._keys import SECTION, TILES
from pekasc._sections import Section, get_table, resolve_sections, tile_record, tiled_sections
from pekasc.pl._draw import Box
from pekasc.tiling import TileGeometry, TileReader, TileSpec

_BLOCK_PX = 256
_MAX_MEMORY = 128 * 2**20


def chosen_sections(sdata: SpatialData, section: str | list[str] | None, table_name: str, key: str) -> list[Section]:
    """Return sections by region or by ``obs["section"]``; all of them for None.

    Raises
    ------
    KeyError
        If there is no such section, or there are no tiles under another `key` than the default.
    """
    table = get_table(sdata, table_name)
    # what is not tiled yet is drawn all the same, but tiles that are named have to be there
    if isinstance(sdata, SpatialData) and (key != TILES or tile_record(table, key) is not None):
        found, _ = tiled_sections(sdata, table_name=table_name, key=key)
    else:
        found = resolve_sections(sdata, table_name=table_name)
    if section is None:
        return found
    by_name = {label(sdata, s, table_name): s for s in found} | {s.name: s for s in found}
    names = [section] if isinstance(section, str) else list(section)
    for name in names:
        if name not in by_name:
            raise KeyError(f"Section {name!r} not found. Available sections: {[s.name for s in found]}.")
    return [by_name[name] for name in names]


def label(sdata: SpatialData, section: Section, table_name: str) -> str:
    """Return the name of a section in ``obs["section"]`` if it has one, else the name of its region."""
    obs = get_table(sdata, table_name).obs
    names = obs[SECTION].iloc[section.rows].unique() if SECTION in obs else []
    return str(names[0]) if len(names) == 1 else section.name


def radii_um(sdata: SpatialData, section: Section) -> np.ndarray:
    """Return the radius of every spot in um; for other shapes, of the circle with the same area."""
    shapes = sdata.shapes[section.shapes_name].loc[section.shape_ids]
    own = shapes["radius"] if "radius" in shapes else np.sqrt(shapes.geometry.area / np.pi)
    shapes_to_um = np.linalg.inv(section.um_to_px) @ section.shapes_to_px[:2, :2]
    return np.asarray(own, dtype=np.float64) * np.sqrt(abs(np.linalg.det(shapes_to_um)))


def picture(section: Section, box: Box, max_px: int = 1000) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Return the part of a section's image in `box` (um), and its extent for :meth:`Axes.imshow`.

    It is assembled from blocks that the tile reader reads from a suitable level of the pyramid, in the orientation of
    the section's coordinate system, so that images of any size need little memory.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    mpp = max(max(width, height) / max_px, section.mpp)
    columns, rows = max(1, ceil(width / mpp)), max(1, ceil(height / mpp))
    # small boxes get small blocks, so that little of the image around them is read
    block = min(_BLOCK_PX, max(columns, rows))
    n_x, n_y = ceil(columns / block), ceil(rows / block)
    x = box[0] + (np.arange(n_x) + 0.5) * block * mpp
    y = box[1] + (np.arange(n_y) + 0.5) * block * mpp
    centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    centres_px = section.centres_px[0] + (centres - section.centres_um[0]) @ section.um_to_px.T
    geometry = TileGeometry(centres_px, section.um_to_px, TileSpec(block, mpp))
    if section.pyramid is None:  # stored patches only, without an image
        return np.full((rows, columns, 3), 255, np.uint8), (
            box[0], box[0] + columns * mpp, box[1] + rows * mpp, box[1],
        )  # fmt: skip
    reader = TileReader(section.pyramid, geometry, max_memory=_MAX_MEMORY)
    canvas = np.empty((n_y * block, n_x * block, 3), dtype=np.uint8)
    for i in range(n_y):
        blocks = reader.read(np.arange(i * n_x, (i + 1) * n_x))
        canvas[i * block : (i + 1) * block] = np.concatenate(list(blocks), axis=1)
    canvas = canvas[:rows, :columns]
    return canvas, (box[0], box[0] + columns * mpp, box[1] + rows * mpp, box[1])
