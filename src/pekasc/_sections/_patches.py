"""Stored patches of sections: their record in the table, and joining them to spots by barcode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pekasc._keys import BARCODE, PATCHES, read_uns, write_uns
from pekasc._sections._table import examples
from pekasc.tiling import PatchFile

_TOLERANCE = 0.02  # of a patch's side
_ROUNDED_PX = 2.0  # corners are rounded down to whole pixels, after half of the side was subtracted


def patch_record(table: AnnData, region: str) -> dict[str, Any] | None:
    """Return the record of a section's stored patches, or None."""
    records = read_uns(table, PATCHES)
    return records.get(region) if isinstance(records, Mapping) else None


def write_patch_records(table: AnnData, records: dict[str, dict[str, Any]]) -> None:
    """Store the records of patches by region; see :func:`describe_patches`."""
    write_uns(table, PATCHES, records)


def describe_patches(
    file: PatchFile, *, image_name: str, coordinate_system: str, side_px: float, size_px: tuple[int, int]
) -> dict[str, Any]:
    """Return the record of a section's patches.

    Parameters
    ----------
    file
        The patches.
    image_name, size_px
        Name of the image that they were cut from, which need not exist, and its width and height, or (0, 0).
    coordinate_system
        Coordinate system in pixels of that image.
    side_px
        Side of a patch in pixels of that image.
    """
    return {
        "path": str(file.path.resolve()),
        "id": file.id,
        "image": image_name,
        "coordinate_system": coordinate_system,
        "side_px": float(side_px),
        "size_px": np.asarray(size_px, dtype=np.int64),
    }


def open_patches(region: str, record: dict[str, Any]) -> PatchFile:
    """Open the patches of a section.

    Raises
    ------
    FileNotFoundError
        If the file does not exist any more.
    ValueError
        If its content has changed.
    """
    again = f'or write the new place to `table.uns["pekasc"]["{PATCHES}"][{region!r}]["path"]`'
    try:
        file = PatchFile(record["path"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The patches of section {region!r} were read from {record['path']!r}, which is not there any more. "
            f"Patches are not copied into the object: put the file back, {again}."
        ) from error
    if file.id != record["id"]:
        raise ValueError(
            f"The patches of section {region!r} in {record['path']!r} are not those that were read: the file has "
            "changed. Read the sample again."
        )
    return file


def join_patches(file: PatchFile, barcodes: pd.Series, region: str) -> np.ndarray:
    """Return the row of the file for each of `barcodes`, -1 without a patch.

    Raises
    ------
    ValueError
        If no barcode has a patch, or a barcode is not unique.
    """
    names = pd.Index(barcodes.astype(str))
    if not names.is_unique:
        raise ValueError(
            f"Section {region!r} has duplicate barcodes in `obs[{BARCODE!r}]`: "
            f"{examples(names[names.duplicated()].unique())}; which patch belongs to which spot is not known."
        )
    rows = pd.Index(file.barcodes).get_indexer(names)
    if rows.size and (rows < 0).all():
        raise ValueError(
            f"None of the {rows.size} spots of section {region!r} has a patch in {str(file.path)!r}: barcodes like "
            f"{examples(names, 1)} in the table, {examples(file.barcodes, 1)} in the file."
        )
    return np.asarray(rows, dtype=np.int64)


def patch_side_px(file: PatchFile, rows: np.ndarray, centres_px: np.ndarray, region: str) -> float:
    """Return the side of the patches in pixels of their image, from the file's attributes, or corners and centres.

    Raises
    ------
    ValueError
        If the file has neither.
    """
    if "patch_size_src" in file.attrs:
        return file.attrs["patch_size_src"]
    if file.corners_px is None:
        raise ValueError(
            f"The patches of section {region!r} ({str(file.path)!r}) say neither how large they are ('patch_size_src') "
            "nor where they lie ('coords'): they are of an early release of HEST-1k. Download them again."
        )
    there = rows >= 0
    return float(np.round(2 * np.median(centres_px[there] - file.corners_px[rows[there]])))


def check_patches(file: PatchFile, rows: np.ndarray, centres_px: np.ndarray, side_px: float, region: str) -> None:
    """Check that the patches lie around the spots they are joined to.

    Raises
    ------
    ValueError
        If they do not.
    """
    there = rows >= 0
    if file.corners_px is None or not there.any():
        return
    off = np.abs(file.corners_px[rows[there]] + side_px / 2 - centres_px[there]).max(axis=1)
    bad = off > max(_ROUNDED_PX, _TOLERANCE * side_px)
    if bad.any():
        worst = int(np.argmax(off))
        raise ValueError(
            f"Section {region!r}: {int(bad.sum())} of {off.size} patches do not lie around their spots: that of "
            f"barcode {file.barcodes[rows[there][worst]]!r} has its middle {off[worst]:.4g} px from its spot, with a "
            f"side of {side_px:.4g} px. Patches, spots and transformations must be of one image at full resolution."
        )
