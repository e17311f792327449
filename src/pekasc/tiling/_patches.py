"""Stored patches in an HDF5 file, one row per patch, and tiles resampled from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pekasc._digests import sha256
from pekasc._h5 import H5File, opened
from pekasc.tiling import _resample
from pekasc.tiling._geometry import TileSpec
from pekasc.tiling._reader import check_index
from pekasc.tiling._stain import StainMap

_BARCODES = ("barcode", "barcodes")  # newer and older files
_ATTRIBUTES = ("pixel_size", "patch_size_src")


class PatchFile:
    """An HDF5 file of patches: ``img`` (n, side, side, 3), ``coords`` (n, 2) and ``barcode`` (n, 1).

    The file is opened for each read and closed again, so the object can be pickled.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    barcodes
        (n,) strings, unique.
    corners_px
        (n, 2) float64: x, y of the patches' upper left corners in pixels of the image that they were cut from, or None.
    side
        Pixels along the side of a stored patch.
    attrs
        Attributes of the file, where they are there: ``pixel_size`` in um, ``patch_size_src`` in pixels.
    id
        Digest of the content, 16 hex digits.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If the file is no HDF5 file, is damaged, or lacks a data set.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"The patches {str(self.path)!r} are not there.")
        self._open()

    def _open(self) -> None:
        with opened(self.path) as file:
            names = next((name for name in _BARCODES if file.is_there(name)), None)
            if not file.is_there("img") or names is None:
                raise ValueError(
                    f"The patches {str(self.path)!r} hold {file.names()}; needed are 'img' and 'barcode' "
                    "(and 'coords', where they come from)."
                )
            img = file.dataset("img")
            shape, dtype = img.shape, img.dtype
            if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or dtype != np.uint8:
                raise ValueError(
                    f"The patches {str(self.path)!r} must be uint8 of shape (n, side, side, 3), got {dtype} of {shape}."
                )
            self.barcodes = file.strings(names)
            corners = file.numbers("coords", 2).astype(np.float64) if file.is_there("coords") else None
            if corners is not None and (corners.shape[1] != 2 or not np.isfinite(corners).all()):
                raise file.wrong("coords", f"must be finite numbers of shape (n, 2), got shape {corners.shape}")
            # attributes are with the pixels, or, in some releases, with the coordinates
            stated = {name: _positive(file, name) for name in _ATTRIBUTES}
            self.attrs = {name: value for name, value in stated.items() if value is not None}
            self.n, self.side = int(shape[0]), int(shape[1])
            some = [img[i] for i in sorted({0, self.n // 2, self.n - 1} if self.n else set())]
            self.id = sha256(f"{shape} {'|'.join(self.barcodes)}", some)[:16]
        self.corners_px = corners
        for what, found in (("barcodes", self.barcodes), ("coordinates", corners)):
            if found is not None and len(found) != self.n:
                raise ValueError(f"The patches {str(self.path)!r} hold {self.n} images and {len(found)} {what}.")
        names_seen, counts = np.unique(self.barcodes.astype(str), return_counts=True)
        if (counts > 1).any():
            twice = names_seen[counts > 1]
            raise ValueError(
                f"The patches {str(self.path)!r} have duplicate barcodes: {[str(b) for b in twice[:3]]}"
                f"{', ...' if len(twice) > 3 else ''}; which patch belongs to which spot is not known."
            )

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read patches, (k, side, side, 3) uint8, in the order of `rows`.

        Raises
        ------
        OSError
            If a patch cannot be read; the message names it.
        """
        import h5py

        wanted, back = np.unique(rows, return_inverse=True)
        out = np.empty((len(wanted), self.side, self.side, 3), np.uint8)
        with h5py.File(self.path, "r") as file:
            # contiguous runs, since HDF5 is slow with lists of rows
            starts = np.flatnonzero(np.diff(wanted, prepend=-2) > 1)
            for start, stop in zip(starts, np.append(starts, len(wanted))[1:], strict=True):
                first, last = int(wanted[start]), int(wanted[stop - 1])
                try:
                    file["img"].read_direct(out, np.s_[first : last + 1], np.s_[start:stop])
                except (OSError, RuntimeError) as error:
                    raise OSError(f"Patches {first} to {last} of {str(self.path)!r} cannot be read: {error}") from error
        return out[back]


def _positive(file: H5File, name: str) -> float | None:
    """Return an attribute of the patches, a positive number, or None."""
    for part in ("img", "coords"):
        value = file.attribute(part, name)
        if value is not None:
            number = np.asarray(value).reshape(-1)
            if number.size != 1 or number.dtype.kind not in "iuf" or not 0 < float(number[0]) < np.inf:
                raise file.wrong(part, f"has an attribute {name!r} that is no positive number: {value!r}")
            return float(number[0])
    return None


class PatchReader:
    """Read the tiles of one section from stored patches with the same field of view, resampled to `tile_px`.

    Downscaling is the exact area average, upscaling linear interpolation, as in :class:`~pekasc.tiling.TileReader`.

    Parameters
    ----------
    file
        The patches.
    rows
        Row of the file for each tile.
    spec
        Size of the tiles.
    inside
        Fraction of each tile inside the image, NaN if unknown.
    stain
        Map that brings the colours of the section to a reference.

    Attributes
    ----------
    n, tile_px, inside, upsampling, reading_order, canonical_order
        As in :class:`~pekasc.tiling.TileReader`.
    """

    def __init__(
        self, file: PatchFile, rows: np.ndarray, spec: TileSpec, inside: np.ndarray, *, stain: StainMap | None = None
    ) -> None:
        self.file, self.stain = file, stain
        self.rows = check_index(rows, file.n)
        self.n = len(self.rows)
        self.tile_px = spec.tile_px
        self.inside = inside
        self.upsampling = max(1.0, spec.tile_px / file.side)
        self.reading_order = np.argsort(self.rows, kind="stable").astype(np.int64)
        self.canonical_order = self.reading_order

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        tiles = self._resampled(self.file.read(self.rows[check_index(index, self.n)]))
        if self.stain is not None:
            self.stain.recolour_tiles(tiles)
        return tiles

    def _resampled(self, patches: np.ndarray) -> np.ndarray:
        if self.tile_px == self.file.side:
            return patches
        step = self.file.side / self.tile_px
        tiles = np.empty((len(patches), self.tile_px, self.tile_px, 3), np.uint8)
        for patch, tile in zip(patches, tiles, strict=True):
            window = np.ascontiguousarray(np.moveaxis(patch, -1, 0))
            _resample.resample_axes(window, 0.0, step, 0.0, step, False, tile)
        return tiles

    def release(self) -> None:
        """Forget the colours of the stain map: no patch is kept between calls."""
        if self.stain is not None:
            self.stain.release()
