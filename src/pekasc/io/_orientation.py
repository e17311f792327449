"""The orientation that a file asks for, in TIFF's tag or in Exif data: one rule for every format."""

from __future__ import annotations

_ORIENTATIONS = {
    2: "mirrored left to right",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "mirrored and turned by 90 degrees",
    6: "turned by 90 degrees clockwise",
    7: "mirrored and turned by 90 degrees",
    8: "turned by 90 degrees counterclockwise",
}


def check_orientation(orientation: int, what: str) -> None:
    """Refuse an image whose file asks for it to be turned or mirrored before it is shown.

    Spots are in pixels as they are stored for some programs and as they are shown for others: which, nobody says.

    Raises
    ------
    ValueError
        If the orientation is not 1, or 0 (undefined).
    """
    if orientation not in (0, 1):  # 0 is how some cameras write that they do not know
        how = _ORIENTATIONS.get(orientation, "which is not defined")
        raise ValueError(
            f"{what} says that it is to be shown otherwise than it is stored: orientation {orientation:d} ({how}). "
            "Programs differ in obeying this. Write it upright, for instance with `vips autorot`, and see that "
            "coordinates of spots belong to that."
        )
