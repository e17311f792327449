"""Stain maps: the colours of one section brought to those of a reference, pixel by pixel. Pure arrays.

The transformations are those of :func:`squidpy.experimental.im.normalize_stains`. Sources: Reinhard et al., Color
transfer between images, IEEE CG&A 2001, in the colour space of Ruderman et al., JOSA A 1998; Macenko et al., A method
for normalizing histology slides for quantitative analysis, ISBI 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numba import njit

from pekasc._digests import sha256
from pekasc._options import STAINS
from pekasc.tiling import _resample
from pekasc.tiling._geometry import TileSpec
from pekasc.tiling._parallel import in_threads, n_threads

STAIN_UM = 8.0  # pixel size at which the colours of tissue are measured

# Ruderman's cone responses and decorrelated space, as Reinhard et al. write them
_RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_LMS_TO_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [1.0, -1.0, 0.0]])
_WHITE = np.uint32(0xFFFFFF)
_KNOWN = np.uint32(1 << 24)
_MOST, _LEAST = 100.0, 1e-4  # of the numbers of a stain, and of their standard deviations: colours have none beyond
_LEAST_PART = 4  # minimum number of tiles per thread


@dataclass(frozen=True)
class Stain:
    """The colours of the tissue of one section, or of a reference.

    Parameters
    ----------
    method
        ``"reinhard"`` or ``"macenko"``.
    first, second
        Of Reinhard: mean and standard deviation of the three channels of Ruderman's space. Of Macenko: the directions
        of haematoxylin and of eosin in optical density, of length 1.
    """

    method: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.method not in STAINS:
            raise ValueError(f"Stain method {self.method!r} is not known: choose one of {list(STAINS)}.")
        for name in ("first", "second"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.shape != (3,) or not (np.abs(values) <= _MOST).all():  # NaN is not
                raise ValueError(
                    f"`{name}` of a stain must be three numbers of absolute value at most {_MOST:g}, got "
                    f"{getattr(self, name)!r}."
                )
            # decimals that are the same whatever library computed them
            object.__setattr__(self, name, tuple(float(f"{value:.6g}") for value in values))
        second = np.array(self.second)
        if self.method == "reinhard" and second.min() < _LEAST:
            raise ValueError(f"The standard deviations of a stain must be at least {_LEAST:g}, got {self.second}.")
        lengths = np.linalg.norm([self.first, self.second], axis=1)
        if self.method == "macenko" and (np.abs(lengths - 1) > 1e-3).any():
            raise ValueError(f"The directions of a stain must have length 1, got {self.first} and {self.second}.")
        if self.method == "macenko" and np.linalg.norm(np.cross(self.first, self.second)) < 1e-3:
            raise ValueError(
                f"The directions of haematoxylin and eosin must differ, got {self.first} and {self.second}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return method and numbers, for JSON."""
        return {"method": self.method, "first": list(self.first), "second": list(self.second)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stain:
        """Return the stain that :meth:`to_dict` wrote.

        Raises
        ------
        ValueError
            If a field is missing or wrong.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping) or sorted(values) != sorted(names):
            got = list(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"A stain has the fields {names}, got {got}.")
        for name in names[1:]:
            numbers = values[name]
            # whole numbers of hundreds of digits, which JSON may hold, are no floating-point numbers
            if not isinstance(numbers, list) or not all(
                isinstance(number, float | int) and not isinstance(number, bool) and abs(number) <= _MOST
                for number in numbers
            ):
                raise ValueError(
                    f"`{name}` of a stain must be a list of numbers of absolute value at most {_MOST:g}, got "
                    f"{str(numbers)[:100]}."
                )
        return cls(values["method"], tuple(values["first"]), tuple(values["second"]))

    @property
    def _matrix(self) -> np.ndarray:
        """Directions of haematoxylin, eosin and what is neither, as columns."""
        third = np.cross(self.first, self.second)
        return np.column_stack([self.first, self.second, third / np.linalg.norm(third)])


def mean_stain(stains: Sequence[Stain]) -> Stain:
    """Return the mean of several sections' colours, each of which counts alike: the reference of a fit."""
    first, second = (np.mean([getattr(stain, name) for stain in stains], axis=0) for name in ("first", "second"))
    if stains[0].method == "macenko":
        first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    return Stain(stains[0].method, tuple(first), tuple(second))


@dataclass(frozen=True)
class StainMap:
    """The map from the colours of one section to those of a reference; call it with tiles.

    White stays white: it is what lies outside of an image.

    Parameters
    ----------
    source
        Colours of the section.
    reference
        Colours to bring them to.
    """

    source: Stain
    reference: Stain

    def __post_init__(self) -> None:
        if self.source.method != self.reference.method:
            raise ValueError(
                f"A stain measured by {self.source.method!r} cannot be mapped to a reference of "
                f"{self.reference.method!r}: use one method for both."
            )

    @property
    def digest(self) -> str:
        """SHA-256 of method and numbers."""
        return sha256(f"stain 1 {self.source.to_dict()} {self.reference.to_dict()}")

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Return tiles, (..., 3) uint8, with their colours brought to the reference; those given stay as they are."""
        out = np.array(tiles, order="C")
        if out.dtype != np.uint8 or not out.shape or out.shape[-1] != 3:
            raise ValueError(f"Tiles must be uint8 with three channels last, got {out.dtype} of shape {out.shape}.")
        self.recolour(out.reshape(-1, 3))
        return out

    def recolour(self, pixels: np.ndarray) -> None:
        """Bring pixels to the reference, in place.

        Parameters
        ----------
        pixels
            (n, 3) uint8, contiguous.
        """
        table, terms = self._kept()
        _recolour(pixels, table, *terms)

    def recolour_tiles(self, tiles: np.ndarray) -> None:
        """Bring tiles to the reference, in place and in parallel.

        Parameters
        ----------
        tiles
            (n, y, x, 3) uint8, contiguous.
        """
        step = max(_LEAST_PART, -(-len(tiles) // n_threads()))
        in_threads(self.recolour, [tiles[i : i + step].reshape(-1, 3) for i in range(0, len(tiles), step)])

    def release(self) -> None:
        """Forget the colours that were computed."""
        self.__dict__.pop("_table", None)

    def _kept(self) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Return the table of colours that were computed so far, and the terms of the map."""
        kept = self.__dict__.get("_table")
        if kept is None:
            # of 64 MB, memory is taken for those parts only that the section's colours fall into
            table = np.zeros(1 << 24, dtype=np.uint32)
            table[_WHITE] = _KNOWN | _WHITE
            kept = table, self._terms()
            self.__dict__["_table"] = kept
        return kept

    def _terms(self) -> tuple[np.ndarray, ...]:
        """Return the matrices and the offset of ``outer @ (exp(inner @ log(before @ rgb + 1) + offset) - 1)``."""
        if self.source.method == "reinhard":
            scale = np.diag(np.divide(self.reference.second, self.source.second))
            back = np.linalg.inv(_LMS_TO_LAB)
            offset = back @ (np.array(self.reference.first) - scale @ np.array(self.source.first))
            return _RGB_TO_LMS, back @ scale @ _LMS_TO_LAB, offset, np.linalg.inv(_RGB_TO_LMS)
        # optical density against white: only the directions of the stains change, not how much of them there is
        inner = self.reference._matrix @ np.linalg.pinv(self.source._matrix)
        white = np.full(3, np.log(256.0))
        return np.eye(3), inner, white - inner @ white, np.eye(3)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}


@njit(nogil=True, cache=True)
def _recolour(pixels, table, before, inner, offset, outer):  # type: ignore[no-untyped-def]
    """Map pixels in place. A colour is computed when it is first met, and looked up from then on.

    Threads may compute one colour at the same time: both write the same value.
    """
    logs = np.empty(3)
    out = np.empty(3)
    for i in range(pixels.shape[0]):
        key = (np.uint32(pixels[i, 0]) << 16) | (np.uint32(pixels[i, 1]) << 8) | np.uint32(pixels[i, 2])
        found = table[key]
        if found == 0:
            for j in range(3):
                value = 1.0
                for k in range(3):
                    value += before[j, k] * pixels[i, k]
                logs[j] = np.log(value)
            for j in range(3):
                value = offset[j]
                for k in range(3):
                    value += inner[j, k] * logs[k]
                # beyond this, every channel is saturated
                out[j] = np.exp(min(value, 50.0)) - 1.0
            found = np.uint32(1 << 24)
            for j in range(3):
                value = 0.0
                for k in range(3):
                    value += outer[j, k] * out[k]
                grey = np.uint32(min(max(np.floor(value + 0.5), 0.0), 255.0))
                found |= grey << np.uint32(8 * (2 - j))
            table[key] = found
        pixels[i, 0] = (found >> 16) & 255
        pixels[i, 1] = (found >> 8) & 255
        pixels[i, 2] = found & 255


class StainedTiles:
    """Tiles of a source, each brought to a reference by the map of its section.

    Parameters
    ----------
    source
        The tiles as they are.
    maps
        The maps.
    which
        (n,) map of every tile; -1 leaves it as it is.
    """

    def __init__(self, source: Any, maps: Sequence[StainMap], which: np.ndarray) -> None:
        self.source, self.maps, self.which = source, list(maps), np.asarray(which)
        self.n, self.tile_px, self.reading_order = source.n, source.tile_px, source.reading_order

    def read(self, index: np.ndarray) -> np.ndarray:
        """Read tiles, (k, tile_px, tile_px, 3) uint8, in the order of `index`."""
        tiles: np.ndarray = self.source.read(index)
        which = self.which[np.asarray(index)]
        for number in np.unique(which[which >= 0]).tolist():
            for other, each in enumerate(self.maps):
                if other != number:
                    each.release()
            at = which == number
            part = tiles[at]
            self.maps[number].recolour_tiles(part)
            tiles[at] = part
        return tiles

    def release(self) -> None:
        """Drop what is kept between calls."""
        self.source.release()
        for each in self.maps:
            each.release()


def stain_spec(spec: TileSpec) -> TileSpec:
    """Return the size of tiles with the same field of view and pixels of about 8 um, for the colours of tissue."""
    side = max(1, round(spec.side_um / STAIN_UM))
    return TileSpec(side, spec.side_um / side)


def coarsened(tiles: np.ndarray, spec: TileSpec) -> np.ndarray:
    """Return tiles, (n, side, side, 3) uint8, resampled to the size of :func:`stain_spec`."""
    side = stain_spec(spec).tile_px
    step = tiles.shape[1] / side
    out = np.empty((len(tiles), side, side, 3), np.uint8)
    for tile, small in zip(tiles, out, strict=True):
        window = np.ascontiguousarray(np.moveaxis(tile, -1, 0))
        _resample.resample_axes(window, 0.0, step, 0.0, step, False, small)
    return out
