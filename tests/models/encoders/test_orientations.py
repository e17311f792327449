"""The eight orientations of a tile, in memory and on a device."""

from __future__ import annotations

import numpy as np
import torch

from pekasc.models.encoders._orientations import orient, orient_tensor


def test_orient_gives_the_eight_orientations() -> None:
    base = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    sides = orient(np.stack([base] * 16), np.arange(16) % 8)
    got = {t.tobytes() for t in sides}
    expected = {np.rot90(side, k).tobytes() for side in (base, base[:, ::-1]) for k in range(4)}
    assert got == expected and len(expected) == 8
    np.testing.assert_array_equal(sides[:8], sides[8:])
    np.testing.assert_array_equal(sides[0], base)  # 0 is as it is
    # the same as on a device, before the frozen blocks
    tiles = torch.from_numpy(base)[None]
    for number in range(8):
        np.testing.assert_array_equal(orient_tensor(tiles, number, (1, 2))[0].numpy(), sides[number])
