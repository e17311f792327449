"""Sections of a SpatialData: regions, images, transformations, pixel sizes and tiles.

A section is one tissue section: an image, the shapes element of its spots, and the rows of the table whose region is
that element. Only this room handles the elements of a SpatialData; the rest of pekasc works on arrays.
"""

from __future__ import annotations

from pekasc._sections._identity import places, tissue_of, trained_rows
from pekasc._sections._overview import overview, tissue_mask
from pekasc._sections._patches import (
    check_patches,
    describe_patches,
    join_patches,
    patch_side_px,
    write_patch_records,
)
from pekasc._sections._pixel_size import ARRAYS, MPP_LIMITS, PixelSizeUnknown, array_pixel_size, check_mpp
from pekasc._sections._raster import px_of_shapes, px_to_systems, raster_element, um_to_px
from pekasc._sections._records import pixel_size_records, record_on_images
from pekasc._sections._resolve import Section, resolve_sections
from pekasc._sections._slide_section import shape_centres, slide_section
from pekasc._sections._slides import OnWhite, images_of
from pekasc._sections._stain import coarse_tiles, reference_stain, stain_of, with_stain
from pekasc._sections._table import (
    annotate_alike,
    by_row,
    check_spatialdata,
    check_table,
    examples,
    get_table,
    grid_index,
    in_tissue,
    present_table,
    section_labels,
    table_digest,
    writable_table,
)
from pekasc._sections._tiled import (
    check_tile_key,
    positions_um,
    section_readers,
    tile_call,
    tile_record,
    tiled_sections,
    tiled_table,
)
from pekasc._sections._tissue import TissueMask, tissue_of_slide

__all__ = [
    "ARRAYS",
    "MPP_LIMITS",
    "OnWhite",
    "PixelSizeUnknown",
    "Section",
    "TissueMask",
    "annotate_alike",
    "array_pixel_size",
    "by_row",
    "check_mpp",
    "check_patches",
    "check_spatialdata",
    "check_table",
    "check_tile_key",
    "coarse_tiles",
    "describe_patches",
    "examples",
    "get_table",
    "grid_index",
    "in_tissue",
    "images_of",
    "join_patches",
    "overview",
    "patch_side_px",
    "pixel_size_records",
    "places",
    "positions_um",
    "present_table",
    "px_of_shapes",
    "px_to_systems",
    "raster_element",
    "record_on_images",
    "reference_stain",
    "resolve_sections",
    "section_labels",
    "section_readers",
    "shape_centres",
    "slide_section",
    "stain_of",
    "table_digest",
    "tile_call",
    "tile_record",
    "tiled_sections",
    "tiled_table",
    "tissue_mask",
    "tissue_of_slide",
    "tissue_of",
    "trained_rows",
    "um_to_px",
    "with_stain",
    "writable_table",
    "write_patch_records",
]
