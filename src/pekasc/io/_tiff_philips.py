"""What the description of a Philips TIFF says about the pixels of its slide.

Source: Philips Digital Pathology, "TIFF image format export" (an XML tree of DataObjects with attributes of DICOM), as
OpenSlide reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from pekasc.io._tiff_ome import parsed_xml

_SPACING = "DICOM_PIXEL_SPACING"
_IMAGE_TYPE = "PIM_DP_IMAGE_TYPE"


def philips_spacing(text: str) -> list[str] | None:
    """Return the pixel spacing of the slide in mm, as written, along x and y; None where there is none.

    DICOM writes the distance between rows, along y, first.
    """
    if _SPACING not in text or "<DataObject" not in text[:4096]:
        return None
    root = parsed_xml(text)
    if root is None:
        return []
    for image in root.iter("DataObject"):
        own = dict(_attributes(image))
        # beside the slide there are its label and an overview
        if _words(own.get(_IMAGE_TYPE, "")) != ["WSI"]:
            continue
        # levels have spacings of their own, the finest first
        spacing = own.get(_SPACING) or next((text for o in image.iter("DataObject") for text in _spacings(o)), "")
        return _words(spacing)[::-1]
    return None


def _attributes(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for attribute in element.findall("Attribute"):
        yield attribute.get("Name", ""), attribute.text or ""


def _spacings(element: ElementTree.Element) -> list[str]:
    return [text for name, text in _attributes(element) if name == _SPACING]


def _words(text: str) -> list[str]:
    """Return the values of a list that is written as ``"1" "2"``."""
    return re.findall(r'[^\s"\\]+', text)
