"""The size of a file justifies that of its picture."""

from __future__ import annotations

import pytest

from pekasc.io._limits import check_size


def test_what_a_file_of_its_size_may_hold() -> None:
    check_size(4000, 5000, 100, "a")  # small altogether
    check_size(100_000, 100_000, 30_000_000, "a")  # white, as deflate writes it


@pytest.mark.parametrize(("height", "width", "match"), [(10**5, 10**5, "no compression"), (0, 5, "no pixels: 5 x 0")])
def test_what_it_may_not_hold(height: int, width: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_size(height, width, 10_000, "a")
