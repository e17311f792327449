"""Check arrays that are given to an adapter without an object: tiles of wider fields of view, and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

TOLERANCE = 0.02  # relative difference up to which pixel sizes count as equal, as elsewhere


def field_tiles(
    tiles: np.ndarray, fields: Mapping[float, np.ndarray] | None, wanted: Sequence[float]
) -> list[np.ndarray]:
    """Return the tiles of wider fields of view in the order of `wanted`, widths in um; none if none are given."""
    if fields is None:
        return []
    if not isinstance(fields, Mapping):
        example = f"{wanted[0]:g}" if wanted else "448"
        raise TypeError(
            f"`fields` must map widths in um to tiles, such as {{{example}: wide}}, got {type(fields).__name__}."
        )
    if wrong := [width for width in fields if isinstance(width, bool) or not isinstance(width, Real)]:
        raise TypeError(f"`fields` must map widths in um to tiles, got {wrong[0]!r} as a width.")
    given = {float(width): np.asarray(array) for width, array in fields.items()}
    if not wanted and given:
        raise ValueError("This adapter reads no wider field of view: leave `fields=` out.")
    found = [next((w for w in given if abs(w / width - 1) <= TOLERANCE), None) for width in wanted]
    if None in found or len(given) != len(wanted):
        listed = ", ".join(f"{width:g}" for width in wanted)
        raise ValueError(
            f"`fields=` must hold tiles of {listed} um around the same centres, `fields={{um: tiles}}`; got tiles of "
            f"{sorted(given)} um. Or leave it out: then heads that were fitted on the tiles alone predict."
        )
    arrays = [given[w] for w in found if w is not None]
    for width, array in zip(wanted, arrays, strict=True):
        if array.shape != tiles.shape:
            raise ValueError(f"`fields`: the tiles of {width:g} um have shape {array.shape}, the others {tiles.shape}.")
    return arrays


def positions(n: int, coords_um: np.ndarray, section: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in um and the sections of `n` tiles, by default a single one, checked."""
    places = np.asarray(coords_um)
    if places.dtype.kind not in "iuf":
        raise TypeError(f"`coords_um` must hold numbers, positions in um, got dtype {places.dtype}.")
    places = places.astype(np.float64)
    sections = np.zeros(n) if section is None else np.asarray(section)
    if places.shape != (n, 2) or sections.shape != (n,):
        raise ValueError(
            f"`coords_um` must have shape ({n}, 2) and `section` ({n},) for {n} tiles, got {places.shape} and "
            f"{sections.shape}."
        )
    bad = int((~np.isfinite(places)).any(axis=1).sum())
    if bad:
        raise ValueError(f"`coords_um` is NaN or infinite for {bad} of {n} tiles: leave these out.")
    if sections.dtype == object:
        sections = sections.astype(str)
    return places, sections
