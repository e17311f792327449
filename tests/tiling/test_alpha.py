"""A fourth channel: alpha of two kinds, or none."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.tiling import Alpha, on_white

COLOUR = np.array([200, 100, 0])


@pytest.mark.parametrize("share", [0, 51, 128, 255])
def test_transparent_is_white_whether_colours_were_multiplied_or_not(share: int) -> None:
    truth = COLOUR * (share / 255) + 255 * (1 - share / 255)
    plain = np.array([[[*COLOUR, share]]], np.uint8)
    multiplied = np.array([[[*np.rint(COLOUR * (share / 255)), share]]], np.uint8)
    for pixels, alpha in ((plain, Alpha.UNASSOCIATED), (multiplied, Alpha.ASSOCIATED)):
        before = pixels.copy()
        out = on_white(pixels, alpha)
        assert out.dtype == np.uint8 and out.flags["C_CONTIGUOUS"] and np.array_equal(pixels, before)
        np.testing.assert_allclose(out[0, 0], truth, atol=0.51)


def test_what_is_no_alpha_is_ignored() -> None:
    pixels = np.array([[[*COLOUR, 7]]], np.uint8)
    assert np.array_equal(on_white(pixels, Alpha.NONE)[0, 0], COLOUR)
    assert np.array_equal(on_white(pixels[..., :3], Alpha.NONE)[0, 0], COLOUR)


def test_colours_brighter_than_their_alpha_do_not_wrap() -> None:
    assert (on_white(np.array([[[200, 200, 200, 100]]], np.uint8), Alpha.ASSOCIATED) == 255).all()
