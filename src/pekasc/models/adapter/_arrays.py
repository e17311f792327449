"""Check arrays that are given to an adapter without an object: tiles at further scales, and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TOLERANCE = 0.02  # relative difference up to which pixel sizes count as equal, as elsewhere


def further_tiles(
    tiles: np.ndarray, scales: Mapping[float, np.ndarray] | None, wanted: Sequence[float], mpp: float
) -> list[np.ndarray]:
    """Return the tiles of the other scales in the order of `wanted`, in um per pixel, checked against `tiles`.

    `mpp` is the pixel size of `tiles` in um.
    """
    if scales is not None and not isinstance(scales, Mapping):
        raise TypeError(
            f"`scales` must map pixel sizes in um to tiles, such as {{{2 * mpp:g}: wide}}, got {type(scales).__name__}."
        )
    given = {float(size): np.asarray(array) for size, array in (scales or {}).items()}
    found = [next((m for m in given if abs(m / size - 1) <= TOLERANCE), None) for size in wanted]
    if not wanted and given:
        raise ValueError(f"This adapter takes tiles at one scale, {mpp:g} um/px: leave `scales=` out.")
    if None in found or len(given) != len(wanted):
        listed = ", ".join(f"{size:g}" for size in wanted)
        raise ValueError(
            f"This adapter also needs tiles of {listed} um/px around the same centres: give them as "
            f"`scales={{um/px: tiles}}`; got tiles of {sorted(given)} um/px."
        )
    arrays = [given[m] for m in found if m is not None]
    for size, array in zip(wanted, arrays, strict=True):
        if array.shape != tiles.shape:
            raise ValueError(
                f"`scales`: the tiles of {size:g} um/px have shape {array.shape}, the others {tiles.shape}."
            )
    return arrays


def positions(n: int, coords_um: np.ndarray, section: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in um and the sections of `n` tiles, by default a single one, checked."""
    places = np.asarray(coords_um, dtype=np.float64)
    sections = np.zeros(n) if section is None else np.asarray(section)
    if places.shape != (n, 2) or sections.shape != (n,):
        raise ValueError(
            f"`coords_um` must have shape ({n}, 2) and `section` ({n},) for {n} tiles, got {places.shape} and "
            f"{sections.shape}."
        )
    return places, sections
