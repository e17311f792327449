"""The colours of a section's tissue, measured under its tiles by squidpy's estimator, and its map to a reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

from pekasc._sections._overview import tissue_mask
from pekasc._sections._resolve import Section
from pekasc._sections._tiled import section_readers
from pekasc._sections._tissue import quiet
from pekasc.tiling import Stain, StainMap, TileSpec, mean_stain, pen_pixels, stain_spec

_MOST = 1_000_000  # pixels that colours are measured on
_LEAST = 500  # of 8 um: 0.03 square millimetres
_DARK = 1.5  # mean optical density of tissue: H&E has 0.2 to 0.8
_FLAT = 1e-3  # standard deviation in Ruderman's space below which there is one colour only


def coarse_tiles(section: Section, spec: TileSpec, *, every: bool = False) -> np.ndarray:
    """Return tiles of a section at about 8 um per pixel, (k, side, side, 3) uint8, from a coarse level of its image.

    At most as many as hold a million pixels, spread over the section; with `every`, all in their order.
    """
    small = stain_spec(spec)
    (reader,) = section_readers([replace(section, stain=None)], small)
    index = np.arange(reader.n) if every else reader.canonical_order
    if not every:
        step = max(1, -(-reader.n * small.tile_px**2 // _MOST))
        index = index[::step]
    tiles = reader.read(index)
    reader.release()
    return tiles


def stain_of(tiles: np.ndarray, method: str, where: str) -> Stain:
    """Measure the colours of tissue with :func:`squidpy.experimental.im.fit_stain_reference`.

    Tissue are pixels more saturated than glass (Otsu's threshold, capped) that are neither black nor a pen's. The
    result does not depend on the order of the tiles.

    Parameters
    ----------
    tiles
        (n, side, side, 3) uint8, at about 8 um per pixel.
    method
        ``"reinhard"`` or ``"macenko"``.
    where
        What the tiles are of, for errors.

    Raises
    ------
    ValueError
        If there is too little tissue, or its colours are not those of haematoxylin and eosin.
    """
    pixels = tiles.reshape(-1, 3)
    on_tissue = tissue_mask(pixels) & ~pen_pixels(pixels) if len(pixels) else np.zeros(0, dtype=bool)
    pixels = pixels[on_tissue]
    if len(pixels) < _LEAST:
        raise ValueError(
            f"{where}: {len(pixels)} of {len(on_tissue)} pixels of 8 um under its tiles show tissue, and the colours "
            f"of a stain are measured on {_LEAST} or more. Tile more of the tissue, leave the section out, or fit "
            "without `Readout.stain` (to predict: use an adapter fitted without it)."
        )
    # sorted, so that rounding does not depend on the order of the tiles
    code = np.sort(pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32))
    code = code[:: -(-len(code) // _MOST)]
    pixels = np.stack([code >> 16, (code >> 8) & 255, code & 255], axis=-1).astype(np.uint8)
    _check_he(pixels, where)
    found = _squidpy_reference(pixels, method, where)
    if method == "reinhard":
        if min(found.sigma) < _FLAT:
            raise ValueError(f"{_not_he(where)}: its tissue has a single colour.")
        return Stain(method, tuple(found.mu), tuple(found.sigma))
    return Stain(method, tuple(found.stain_matrix[:, 0]), tuple(found.stain_matrix[:, 1]))


def _squidpy_reference(pixels: np.ndarray, method: str, where: str):  # type: ignore[no-untyped-def]
    import squidpy as sq

    # an image of its own, of tissue alone: squidpy wants a mask, and would read a section's at one level
    sdata = SpatialData(
        images={"image": Image2DModel.parse(np.ascontiguousarray(pixels.T[:, None]), dims=("c", "y", "x"))},
        labels={"image_tissue": Labels2DModel.parse(np.ones((1, len(pixels)), np.uint8), dims=("y", "x"))},
    )
    try:
        with quiet("spatialdata._logging"):
            return sq.experimental.im.fit_stain_reference(sdata, "image", method=method)
    except (RuntimeError, ValueError, np.linalg.LinAlgError) as error:  # squidpy's StainFittingError is private
        raise ValueError(f"{_not_he(where)}: {error}") from error


def _check_he(pixels: np.ndarray, where: str) -> None:
    """Check that tissue absorbs as haematoxylin and eosin do: green most of all, and not as the black of fluorescence.

    Raises
    ------
    ValueError
        If it does not.
    """
    density = -np.log((pixels.astype(np.float64) + 1) / 256).mean(axis=0)
    red, green, blue = density
    if density.mean() > _DARK:
        raise ValueError(
            f"{_not_he(where)}: its mean colour is {pixels.mean(axis=0).round().astype(int).tolist()}, darker than a "
            "stained section in transmitted light."
        )
    if green < 1.02 * max(red, blue):
        raise ValueError(
            f"{_not_he(where)}: its tissue does not absorb green most of all (optical density of red, green and blue: "
            f"{red:.2f}, {green:.2f}, {blue:.2f})."
        )


def _not_he(where: str) -> str:
    return (
        f"{where} does not look like haematoxylin and eosin, which a stain map needs (for other stains, leave "
        "`Readout.stain` at None)"
    )


def section_stain(section: Section, spec: TileSpec, method: str) -> Stain:
    """Return the colours of the tissue under a section's tiles."""
    return stain_of(coarse_tiles(section, spec), method, f"Section {section.name!r}")


def reference_stain(sections: Iterable[Section], spec: TileSpec, method: str) -> tuple[Stain, list[Stain]]:
    """Return the mean colours of training sections, which is their reference, and those of each."""
    own = [section_stain(section, spec, method) for section in sections]
    return mean_stain(own), own


def with_stain(
    sections: Sequence[Section], spec: TileSpec, reference: Stain | None, own: Sequence[Stain] | None = None
) -> list[Section]:
    """Return sections whose tiles are brought to a reference when they are read; None leaves them as they are.

    `own` are their colours where they are known already.
    """
    if reference is None:
        return list(sections)
    if own is None:
        own = [section_stain(section, spec, reference.method) for section in sections]
    return [replace(section, stain=StainMap(stain, reference)) for section, stain in zip(sections, own, strict=True)]
