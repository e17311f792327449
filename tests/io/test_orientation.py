"""Images that are to be turned before they are shown."""

from __future__ import annotations

import pytest

from pekasc.io._orientation import check_orientation


@pytest.mark.parametrize("orientation", [1, 0])  # 0: some cameras write that they do not know
def test_upright_is_read(orientation: int) -> None:
    check_orientation(orientation, "The image 'a'")


@pytest.mark.parametrize(
    ("orientation", "how"), [(2, "mirrored left to right"), (6, "90 degrees clockwise"), (9, "not defined")]
)
def test_what_is_to_be_turned_is_refused(orientation: int, how: str) -> None:
    with pytest.raises(ValueError, match=rf"The image 'a' .* orientation {orientation} \(.*{how}\).* Write it upright"):
        check_orientation(orientation, "The image 'a'")
