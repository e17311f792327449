"""Sections: the only room that knows SpatialData's regions, images, transforms and pixel sizes.

A section is one tissue section: an image, the shapes element of its spots, and the rows of the table whose region is
that element. Everything else in pekasc sees arrays.
"""

from __future__ import annotations

from pekasc._sections._images import image_id, overview
from pekasc._sections._resolve import Section, resolve_sections
from pekasc._sections._table import check_table, examples, get_table, region_rows, section_labels, writable_table
from pekasc._sections._tiled import positions_um, section_readers, tile_record, tiled_sections

__all__ = [
    "Section",
    "check_table",
    "examples",
    "get_table",
    "image_id",
    "overview",
    "positions_um",
    "region_rows",
    "resolve_sections",
    "section_labels",
    "section_readers",
    "tile_record",
    "tiled_sections",
    "writable_table",
]
