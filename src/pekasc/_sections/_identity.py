"""Identity of tissue: find tiles that overlap the training tiles of an adapter, in any object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.spatial import cKDTree

from pekasc._sections._resolve import Section


def places(sections: Iterable[Section]) -> dict[str, np.ndarray]:
    """Return the tile centres of every image, (n, 2) x, y in level-0 pixels, by a digest of the image's content.

    Names and pixel sizes are not part of the digest, so that renamed sections are recognised.
    """
    found: dict[str, list[np.ndarray]] = {}
    for section in sections:
        for name in section.picture_ids():
            found.setdefault(name, []).append(section.centres_px)
    return {name: np.concatenate(centres) for name, centres in found.items()}


def trained_rows(sections: Iterable[Section], side_um: float, trained_on: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the table rows whose centre is closer than half of `side_um` to that of a training tile."""
    rows = [np.empty(0, dtype=np.int64)]
    for section in sections:
        known = [trained_on[name] for name in section.picture_ids() if name in trained_on]
        if not known:
            continue
        # with anisotropic pixels, the larger distance: better one spot too many than a leak
        side_px = side_um * np.linalg.norm(section.um_to_px, axis=1).max()
        rows.append(section.rows[cKDTree(np.concatenate(known)).query(section.centres_px)[0] < side_px / 2])
    return np.concatenate(rows)
