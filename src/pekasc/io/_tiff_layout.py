"""Which picture of a TIFF is the slide, and where its red, green and blue lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pekasc.io._orientation import check_orientation
from pekasc.io._refusal import NotReadHere
from pekasc.io._tiff_ome import Channel, check_ome, ome_images
from pekasc.tiling import Alpha

_MOST_PAGES = 5  # of one level: more than are read in any case, to be told apart
_RGB = ("red", "green", "blue")
_PACKED = (0xFF0000FF, 0x00FF00FF, 0x0000FFFF)  # the same as Color in OME metadata, RGBA
_NO_NAME = re.compile(r"(channel|ch|c)?[\s:_#-]*\d*([:_-]\d+)*", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Where the pixels of one level lie.

    Attributes
    ----------
    pages
        tifffile's pages: one with all samples, or one each for red, green and blue.
    shape
        Height and width in pixels.
    tile_px
        Height and width of a tile, or of a strip.
    tiled
        Whether there are tiles.
    samples
        Channels in all, with the alpha.
    separate
        Whether the one page stores its samples one plane after the other.
    alpha
        What a fourth sample means.
    assumed
        Whether nothing says that the channels are red, green and blue.
    """

    pages: list[Any]
    shape: tuple[int, int]
    tile_px: tuple[int, int]
    tiled: bool
    samples: int
    separate: bool
    alpha: Alpha
    assumed: bool = False


@contextmanager
def open_tiff(path: str) -> Iterator[Any]:
    """Open a file with tifffile; other files that its metadata names are not opened.

    Raises
    ------
    ValueError
        If tifffile cannot open it.
    """
    import tifffile

    try:
        file = tifffile.TiffFile(path, _multifile=False)
    except Exception as error:
        raise ValueError(f"The image {path!r} cannot be read as TIFF: {error}") from error
    with file:
        yield file


def main_series(file: Any, path: str, number: int | None = None) -> Any:
    """Return the image of a TIFF of that number, by default the largest, with its pyramid.

    Raises
    ------
    ValueError
        If there is none, or only copies of it that are smaller.
    """
    try:
        check_ome(file.ome_metadata if file.is_ome else None, len(file.pages))
        chosen = max(file.series, key=_size) if number is None else file.series[number]
        reduced = chosen.keyframe.is_reduced or chosen.keyframe.is_subifd
    except Exception as error:
        raise ValueError(f"The image {path!r} cannot be read as TIFF: {error}") from error
    if file.is_bif:
        raise NotReadHere(
            f"The image {path!r} is a slide of Ventana (BIF), whose tiles overlap by what only its own metadata say.",
            "Convert it, for instance with `vips tiffsave`.",
        )
    if reduced:
        which = "largest image" if number is None else f"image {number}"
        raise ValueError(
            f"The {which} of {path!r}, {tuple(chosen.shape)}, is a reduced copy of one that is damaged or gone."
        )
    return chosen


def _size(series: Any) -> tuple[int, bool]:
    """Return the pixels of a series, and, among those of one size, whether it has colours."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return sizes.get("Y", 0) * sizes.get("X", 0), any(sizes.get(axis) in (3, 4) for axis in "CS")


def layouts(file: Any, path: str, number: int | None = None) -> list[Layout]:
    """Return where the pixels of each level of the slide lie, finest first; `number` is that of the image.

    Raises
    ------
    ValueError
        If they are not red, green and blue of uint8, upright.
    """
    series = main_series(file, path, number)
    try:
        levels = [(str(lv.axes), tuple(lv.shape), np.dtype(lv.dtype), _pages(lv), lv.keyframe) for lv in series.levels]
        sizes = dict(zip(*levels[0][:2], strict=True))
        images = ome_images(file.ome_metadata if file.is_ome else None)
        name = str(series.name or "")
        ome = images.matching(file.series.index(series), sizes.get("X", 0), sizes.get("Y", 0), name)
        channels = ome.channels if ome is not None else _labels(file)
    except Exception as error:
        raise ValueError(f"The image {path!r} cannot be read as TIFF: {error}") from error
    return [_layout(*level, channels, f"The image {path!r} (level {i})", file) for i, level in enumerate(levels)]


def _labels(file: Any) -> list[Channel]:
    """Return the channels that ImageJ's labels name."""
    labels = (file.imagej_metadata or {}).get("Labels", []) if file.is_imagej else []
    return [Channel(str(label), None, False) for label in labels]


def _pages(series: Any) -> list[Any]:
    # damaged metadata tell of billions of pages
    return [series[i] for i in range(min(len(series), _MOST_PAGES))]


def _layout(
    axes: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    pages: list[Any],
    page: Any,
    channels: list[Channel],
    what: str,
    file: Any,
) -> Layout:
    if int(page.photometric) == 3:
        raise ValueError(
            f"{what} holds colours that are not red, green and blue: PALETTE, numbers of a table of colours. Convert "
            "it to RGB, for instance with `PIL.Image.open(file).convert('RGB')`."
        )
    sizes = dict(zip(axes, shape, strict=True))
    samples = sizes.get("S", sizes.get("C", 1))
    if axes not in ("YXS", "SYX", "CYX") or samples not in (3, 4) or dtype != np.uint8:
        hint = ""
        if dtype == np.uint16:
            hint = " Convert it to 8 bit, for instance `(pixels >> 8).astype('uint8')` where all 16 bits are used."
        elif axes.endswith("YX") and sizes.get("Q", sizes.get("I", 0)) in (3, 4):
            hint = " It has pages of one channel each and does not say which colours they are."
        raise ValueError(
            f"{what} must be RGB of uint8, but has axes {axes}, shape {shape}, {dtype} ({_name(page.photometric)})."
            f"{hint}"
        )
    if any(p is None or p.parent is not file for p in pages):
        raise ValueError(f"{what} has parts that are not in this file. Write it as one file.")
    if page.imagedepth != 1:
        raise ValueError(f"{what} is a stack of {page.imagedepth} pictures, not one.")
    _check_upright(page, what)
    _check_compression(page, what)
    extra = tuple(int(n) for n in page.extrasamples)
    if axes == "CYX":
        pages, samples = _colour_pages(pages, samples, page, channels, what), 3
        separate, alpha, assumed = False, Alpha.NONE, not any(channel.name for channel in channels)
    else:
        if len(pages) != 1:
            raise ValueError(f"{what} has its pixels in {len(pages)} pages, not in one.")
        # a channel of three samples is RGB by OME's definition, whatever the tag says
        assumed = int(page.photometric) == 1 and samples == 3 and len(channels) == 1 and not channels[0].fluorescent
        if not assumed and not _is_rgb(page):
            raise ValueError(
                f"{what} holds colours that are not red, green and blue: {_name(page.photometric)}, compression "
                f"{_name(page.compression)}. Convert it to RGB, for instance with `vips`, or open it with wsidata."
            )
        separate = axes == "SYX"
        alpha = Alpha(extra[0]) if samples == 4 and extra[:1] in ((1,), (2,)) else Alpha.NONE
    tile_px = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if min(tile_px) < 1:
        raise ValueError(f"{what} is damaged: its tiles or strips have {tile_px[1]} x {tile_px[0]} pixels.")
    return Layout(pages, (sizes["Y"], sizes["X"]), tile_px, bool(page.is_tiled), samples, separate, alpha, assumed)


def _check_upright(page: Any, what: str) -> None:
    orientation = page.tags.valueof(274)
    if orientation is not None:
        check_orientation(orientation if isinstance(orientation, int) else 0, what)
    if page.fillorder != 1 and int(page.compression) not in (6, 7):
        raise ValueError(f"{what} stores the bits of its bytes backwards (FillOrder {page.fillorder}). Write it again.")


def _check_compression(page: Any, what: str) -> None:
    from tifffile import COMPRESSION, TIFF

    why = None
    if page.compression == COMPRESSION.APERIO_JP2000_YCBC:
        why = "is compressed as JPEG 2000 of YCbCr, which does not say how it becomes RGB"
    elif page.compression not in TIFF.DECOMPRESSORS:
        why = f"has the compression {_name(page.compression)}, which tifffile does not read"
    if why is not None:
        raise NotReadHere(f"{what} {why}.", "Convert it, for instance with `vips tiffsave`.")


def _is_rgb(page: Any) -> bool:
    """Tell whether tifffile decodes the page to RGB."""
    from tifffile import COMPRESSION, PHOTOMETRIC

    if page.photometric == PHOTOMETRIC.RGB:
        return True
    # JPEG decoders convert YCbCr to RGB; Aperio's JPEG 2000 with YCbCr is not converted
    jpegs = {COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG2000}
    return page.photometric == PHOTOMETRIC.YCBCR and page.compression in jpegs


def _colour_pages(pages: list[Any], n: int, page: Any, channels: list[Channel], what: str) -> list[Any]:
    """Return the pages of red, green and blue of an image with a page for each channel."""
    said = f" They are {', '.join(map(str, channels))}." if channels else ""
    if n != 3 or len(pages) != 3:
        raise ValueError(f"{what} must be RGB, but has {n} channels in {len(pages)} pages.{said}")
    if int(page.photometric) not in (1, 2) or page.samplesperpixel != 1:
        raise ValueError(
            f"{what} holds channels that are not brightness of red, green and blue: {_name(page.photometric)}. "
            "Convert it to RGB."
        )
    order = _order(channels[:3]) if channels else [0, 1, 2]
    if order is None:
        raise ValueError(
            f"{what} must be RGB, but has three channels that are not red, green and blue.{said} If they are, name "
            "them so in the file's metadata; stains of fluorescence are no H&E."
        )
    return [pages[i] for i in order]


def _order(channels: list[Channel]) -> list[int] | None:
    """Return the places of red, green and blue; None if the channels are something else."""
    if any(channel.fluorescent for channel in channels):
        return None
    names = [(channel.name or "").strip().lower() for channel in channels]
    for spelling in (_RGB, tuple(name[0] for name in _RGB)):
        if sorted(names) == sorted(spelling):
            return [names.index(name) for name in spelling]
    if not all(_NO_NAME.fullmatch(name) for name in names):
        return None
    colours = [channel.colour for channel in channels]
    if len(set(colours)) == 1:  # none, or all white
        return [0, 1, 2]
    if set(colours) != set(_PACKED):
        return None
    return [colours.index(colour) for colour in _PACKED]


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
