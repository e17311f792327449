"""Evenly spaced indices."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc._sample import evenly_spaced


@pytest.mark.parametrize(("n", "most", "expected"), [(10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (1, 5, [0]), (0, 5, [])])
def test_some_of_many(n: int, most: int, expected: list[int]) -> None:
    found = evenly_spaced(n, most)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


def test_there_are_as_many_as_asked_for() -> None:
    assert all(len(evenly_spaced(n, most)) == min(n, most) for n in range(1, 400, 7) for most in (1, 2, 7, 128))
