"""What the OME metadata of a TIFF says about its images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

_MOST_PLANES = 10_000
_MOST_WORK = 10**6
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
    """One image: size in pixels, size of a pixel as written (number and unit for x and y), channels, and what else.

    Attributes
    ----------
    name
        Its name, empty if it has none.
    power
        Nominal magnification of its objective as written, if it names one.
    """

    width: int
    height: int
    physical: dict[str, tuple[str, str]] = field(default_factory=dict)
    channels: list[Channel] = field(default_factory=list)
    name: str = ""
    power: str | None = None


class OmeImages(list[OmeImage]):
    """The images of a file."""

    def matching(self, number: int, width: int, height: int, name: str = "") -> OmeImage | None:
        """Return the image of this size: by its name, its number, or the first (programs leave out images)."""
        same = [image for image in self if (image.width, image.height) == (width, height)]
        same = [image for image in same if name and image.name == name] or same
        if number < len(self) and self[number] in same:
            return self[number]
        return same[0] if same else None


def check_ome(metadata: str | None, n_pages: int) -> None:
    """Check that OME metadata does not describe far more planes than there are pages, before tifffile lists them.

    Raises
    ------
    ValueError
        If it does, or describes dimensions of which no slide has any.
    """
    root = parsed_xml(metadata)
    if root is None:
        return
    work = 0
    for element in root.iter():
        tag = _tag(element)
        if tag.startswith("ModuloAlong"):
            raise ValueError("its OME metadata describes lifetimes, phases or such (ModuloAlong), not a slide")
        numbers = [v for name, v in element.attrib.items() if tag == "TiffData" and name != "UUID"]
        if tag == "Pixels":
            numbers = [element.get(f"Size{axis}", "1") for axis in "ZCT"]
            planes = math.prod(_small(number) for number in numbers)
            if planes > _MOST_PLANES:
                raise ValueError(f"its OME metadata describes {planes} planes, and the file has {n_pages} pages")
        elif any(_small(number) > _MOST_PLANES for number in numbers):
            raise ValueError(f"its OME metadata tells of pages {numbers}, and the file has {n_pages}")
        work += n_pages if tag == "TiffData" else 0
    if work > _MOST_WORK:
        raise ValueError(f"its OME metadata lists the {n_pages} pages of the file over and over")


def _small(number: str) -> int:
    try:
        return abs(int(number))
    except ValueError:  # tifffile's error is as good
        return 1


def parsed_xml(metadata: str | None) -> ElementTree.Element | None:
    """Return the root of XML, None where there is none or it is damaged; entities that explode are refused by expat."""
    if not metadata:
        return None
    try:
        return ElementTree.fromstring(metadata)
    except (ElementTree.ParseError, ValueError):  # ValueError: of encodings
        return None


def ome_images(metadata: str | None) -> OmeImages:
    """Return the images that OME metadata describes; none where it is missing or no XML."""
    found = OmeImages()
    root = parsed_xml(metadata)
    if root is None:
        return found
    elements = list(root.iter())
    parents = {child: element for element in elements for child in element}
    powers = {e.get("ID"): e.get("NominalMagnification") for e in elements if _tag(e) == "Objective"}
    for pixels in elements:
        if _tag(pixels) != "Pixels":
            continue
        image = parents.get(pixels, pixels)
        objective = next((e.get("ID") for e in image if _tag(e) == "ObjectiveSettings"), None)
        physical = {
            axis: (value, pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            for axis in "XY"
            if (value := pixels.get(f"PhysicalSize{axis}")) is not None
        }
        channels = [_channel(element) for element in pixels if _tag(element) == "Channel"]
        size = _integer(pixels, "SizeX"), _integer(pixels, "SizeY")
        found.append(OmeImage(*size, physical, channels, image.get("Name") or "", powers.get(objective)))
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
