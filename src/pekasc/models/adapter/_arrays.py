"""What is given to an adapter without an object: tiles of wider fields of view, positions, and stain maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from pekasc._sections import stain_of
from pekasc._settings import get_logger
from pekasc.models.heads import Reading, offset_means, pitch_um
from pekasc.tiling import Stain, StainMap, TileSpec, coarsened

logger = get_logger(__name__)

FROM_TILES = "tiles"
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


def recoloured(
    arrays: Sequence[np.ndarray], spec: TileSpec, reference: Stain | None, stain: Any, section: np.ndarray | None
) -> list[np.ndarray]:
    """Return tiles, those of every field of view, with their colours brought to the reference of an adapter.

    Parameters
    ----------
    arrays
        The tiles, and those of wider fields of view around the same centres, (n, side, side, 3) each.
    spec
        Size of the tiles.
    reference
        The adapter's reference; None if it takes tiles as they are.
    stain
        ``"tiles"``, a map, or maps by section.
    section
        Section of every tile, (n,); None is a single one.

    Raises
    ------
    KeyError
        If a section has no map.
    TypeError, ValueError
        If there is no way to bring the tiles to the reference, or a map is another adapter's.
    """
    n = len(arrays[0])
    sections = np.zeros(n) if section is None else np.asarray(section)
    if sections.shape != (n,):
        raise ValueError(f"`section` must have shape ({n},) for {n} tiles, got {sections.shape}.")
    if reference is None:
        if stain is not None:
            raise ValueError("This adapter takes tiles as they are (it has no stain map): leave `stain=` out.")
        return list(arrays)
    if not n:
        return list(arrays)
    out = [np.array(array) for array in arrays]
    names = list(dict.fromkeys(sections.tolist()))
    for name, found in zip(names, _maps(arrays[0], spec, reference, stain, sections, names, section), strict=True):
        at = sections == name
        for array in out:
            array[at] = found(array[at])
        found.release()
    return out


def _maps(
    tiles: np.ndarray, spec: TileSpec, reference: Stain, stain: Any, sections: np.ndarray, names: list[Any],
    section: np.ndarray | None,
) -> list[StainMap]:  # fmt: skip
    """Return the map of every section in `names`."""
    ways = (
        '`stain="tiles"`, which measures their colours on these tiles (give all of a section), or '
        "`stain=pekasc.get.stain_maps(sdata, adapter)`, which has a map for every section"
    )
    if stain is None:
        raise ValueError(
            f"This adapter was trained on tiles brought to one stain ({reference.method!r}), and each section has a "
            f"map of its own: give {ways}."
        )
    if isinstance(stain, str):
        if stain != FROM_TILES:
            raise ValueError(f"`stain={stain!r}` is no stain map: give {ways}.")
        made = []
        for name in names:
            where = "These tiles" if section is None else f"The tiles of section {name!r}"
            own = tiles[sections == name]
            made.append(StainMap(stain_of(coarsened(own, spec), reference.method, where), reference))
            logger.hint("%s: colours by %r, measured on these %d tiles.", where, reference.method, len(own))
        return made
    if isinstance(stain, StainMap):
        if len(names) > 1:
            raise ValueError(
                f"`stain` is one map, and the tiles are of {len(names)} sections: map their names to maps."
            )
        return [_checked(stain, reference)]
    if not isinstance(stain, Mapping):
        raise TypeError(f"`stain` must be a stain map, maps by section or {FROM_TILES!r}, got {type(stain).__name__}.")
    if section is None and len(stain) == 1:
        return [_checked(each, reference) for each in stain.values()][: len(names)]
    if section is None:
        raise ValueError(f"`stain` has maps of {list(stain)[:5]}: say which tile is of which section (`section=`).")
    if missing := [name for name in names if name not in stain]:
        raise KeyError(f"`stain` has no map of section {missing[0]!r}, only of {list(stain)[:5]}.")
    return [_checked(stain[name], reference) for name in names]


def _checked(found: Any, reference: Stain) -> StainMap:
    if not isinstance(found, StainMap):
        raise TypeError(f"`stain` must hold stain maps, got {type(found).__name__}.")
    if found.reference != reference:
        raise ValueError(
            f"This stain map is of another adapter: it brings colours to {found.reference}, and those of this one are "
            f"{reference}. Make it with `pekasc.get.stain_maps(sdata, adapter)` of this adapter."
        )
    return found


def neighbour_matrices(
    reading: Reading, info: Mapping[str, Any], coords_um: np.ndarray, sections: np.ndarray, *, grid: bool
) -> dict[float, Any]:
    """Return the matrices that average over neighbours within every radius of a reading; see `Adapter.neighbours`."""
    used = reading.use()
    found = used.neighbours(coords_um, sections)
    if not grid:
        return found
    known = info.get("neighbour_offsets_um", {})
    if "context_offsets_um" in info and used.radii_um:  # of an earlier version
        known = {f"{used.radii_um[-1]:g}": info["context_offsets_um"]}
    # on a square grid, no place is farther from a tile than this
    tolerance = pitch_um(coords_um, sections) * np.sqrt(0.5) * (1 + 1e-3)
    for radius in found:
        offsets = np.array(known.get(f"{radius:g}", ()), dtype=np.float64).reshape(-1, 2)
        if len(offsets):
            found[radius] = offset_means(coords_um, sections, offsets, tolerance)
    return found
