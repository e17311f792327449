"""OME metadata: images, channels, and what would make a reader work for hours."""

from __future__ import annotations

import pytest

from pekasc.io._tiff_ome import check_ome, ome_images

XML = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
  <Image ID="Image:0"><Pixels SizeX="90" SizeY="60" SizeC="3" PhysicalSizeX="0.5" PhysicalSizeXUnit="mm">
    <Channel Name="Red" Color="-16776961"/><Channel Fluor="DAPI"/><Channel Color="blue"/>
    <TiffData IFD="0" PlaneCount="3"/>
  </Pixels></Image>
  <Image ID="Image:1"><Pixels SizeX="9" SizeY="6" SizeC="3" PhysicalSizeX="5" PhysicalSizeY="6"/></Image>
</OME>"""


def test_images_and_channels() -> None:
    images = ome_images(XML)
    assert [(image.width, image.height) for image in images] == [(90, 60), (9, 6)]
    assert images[0].physical == {"X": ("0.5", "mm")} and images[1].physical == {"X": ("5", "µm"), "Y": ("6", "µm")}
    red, dapi, blue = images[0].channels
    assert (red.name, red.colour, red.fluorescent) == ("Red", 0xFF0000FF, False)
    assert (dapi.name, dapi.colour, dapi.fluorescent) == (None, None, True)
    assert blue.colour is None


def test_an_image_is_known_by_its_size() -> None:
    images = ome_images(XML)
    assert images.matching(1, 9, 6) is images[1]
    assert images.matching(0, 9, 6) is images[1]
    assert images.matching(7, 90, 60) is images[0]
    assert images.matching(0, 91, 60) is None


@pytest.mark.parametrize("text", [None, "", "no XML", XML[:300]])
def test_what_is_no_xml_describes_no_image(text: str | None) -> None:
    assert ome_images(text) == []
    check_ome(text, 1)


def test_numbers_that_are_none() -> None:
    text = XML.replace('SizeX="90"', 'SizeX="many"').replace('IFD="0"', 'IFD="x"')
    assert ome_images(text)[0].width == -1
    check_ome(text, 1)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('PlaneCount="3"', f'PlaneCount="{10**12}"', "tells of pages"),
        ('IFD="0"', f'IFD="-{10**12}"', "tells of pages"),
        ('SizeC="3"', f'SizeC="3" SizeT="{10**9}"', "3000000000 planes, and the file has 700 pages"),
        ("<Channel Name", "<ModuloAlongT Start='0' End='1e12'/><Channel Name", "ModuloAlong"),
        ("<TiffData ", "<TiffData/>" * 1500 + "<TiffData ", "over and over"),
    ],
)
def test_metadata_that_would_make_a_reader_work_for_hours(old: str, new: str, match: str) -> None:
    check_ome(XML, 700)
    with pytest.raises(ValueError, match=match):
        check_ome(XML.replace(old, new, 1), 700)
