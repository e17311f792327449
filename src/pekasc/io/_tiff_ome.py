"""What the OME metadata of a TIFF says about its images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

_FLUORESCENT = ("Fluor", "EmissionWavelength", "ExcitationWavelength")


@dataclass(frozen=True)
class Channel:
    """One channel: its name, its colour (RGBA in 32 bits), and whether it is one of fluorescence."""

    name: str | None
    colour: int | None
    fluorescent: bool

    def __str__(self) -> str:
        return repr(self.name) if self.name else "without a name"


@dataclass(frozen=True)
class OmeImage:
    """One image: size in pixels, size of a pixel as written (number and unit for x and y), and channels."""

    width: int
    height: int
    physical: dict[str, tuple[str, str]] = field(default_factory=dict)
    channels: list[Channel] = field(default_factory=list)


class OmeImages(list[OmeImage]):
    """The images of a file."""

    def matching(self, number: int, width: int, height: int) -> OmeImage | None:
        """Return the image of this size: the one of that number, or the first (programs leave out images)."""
        same = [image for image in self if (image.width, image.height) == (width, height)]
        if number < len(self) and self[number] in same:
            return self[number]
        return same[0] if same else None


def ome_images(metadata: str | None) -> OmeImages:
    """Return the images that OME metadata describes; none where it is missing or no XML."""
    found = OmeImages()
    if not metadata:
        return found
    try:
        root = ElementTree.fromstring(metadata)
    except (ElementTree.ParseError, ValueError):  # ValueError: of encodings
        return found
    for pixels in root.iter():
        if _tag(pixels) != "Pixels":
            continue
        physical = {
            axis: (value, pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            for axis in "XY"
            if (value := pixels.get(f"PhysicalSize{axis}")) is not None
        }
        channels = [_channel(element) for element in pixels if _tag(element) == "Channel"]
        found.append(OmeImage(_integer(pixels, "SizeX"), _integer(pixels, "SizeY"), physical, channels))
    return found


def _channel(element: ElementTree.Element) -> Channel:
    colour = _integer(element, "Color", none=None)
    return Channel(
        element.get("Name") or None,
        None if colour is None else colour % 2**32,  # written as a signed number
        any(element.get(name) for name in _FLUORESCENT),
    )


def _integer(element: ElementTree.Element, name: str, none: Any = -1) -> Any:
    try:
        return int(element.get(name, ""))
    except ValueError:
        return none


def _tag(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]
