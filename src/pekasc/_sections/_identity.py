"""Which tissue is this: where training tiles lay, and which tiles of another object lie there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.spatial import cKDTree

from pekasc._sections._resolve import Section


def places(sections: Iterable[Section]) -> dict[str, np.ndarray]:
    """Return the tile centres of every image, by what it shows: (n, 2) x, y in level-0 pixels.

    Neither the section's name nor its pixel size is part of it: the same tissue under another name stays known.
    """
    found: dict[str, list[np.ndarray]] = {}
    for section in sections:
        for name in section.picture_ids():
            found.setdefault(name, []).append(section.centres_px)
    return {name: np.concatenate(centres) for name, centres in found.items()}


def trained_rows(sections: Iterable[Section], side_um: float, trained_on: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the table rows whose centre lies within half a tile (the widest that is read) of a trained one's."""
    rows = [np.empty(0, dtype=np.int64)]
    for section in sections:
        known = [trained_on[name] for name in section.picture_ids() if name in trained_on]
        if not known:
            continue
        # on the coarser of an anisotropic pixel's two sides: rather a spot too many than a leak
        side_px = side_um * np.linalg.norm(section.um_to_px, axis=1).max()
        rows.append(section.rows[cKDTree(np.concatenate(known)).query(section.centres_px)[0] < side_px / 2])
    return np.concatenate(rows)
