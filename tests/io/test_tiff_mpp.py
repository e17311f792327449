"""The pixel size of a TIFF: its sources agree, or the error names both."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import pekasc as pk
from pekasc.io._tiff_mpp import tiff_mpp

PIXELS = np.full((64, 96, 3), 200, np.uint8)
APERIO = "Aperio Image Library v12\r\n{size} (256x256) JPEG/RGB Q=70|AppMag = 40|MPP = {mpp}"


def write(path: Path, **how: Any) -> Path:
    tifffile.imwrite(path, PIXELS, **{"photometric": "rgb", "metadata": None, "tile": (32, 32)} | how)
    return path


def per_cm(mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def ome(value: Any, unit: str | None = "µm", y: Any = None) -> dict[str, Any]:
    meta = {"axes": "YXS", "PhysicalSizeX": value, "PhysicalSizeY": value if y is None else y}
    units = {} if unit is None else {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    return {"metadata": meta | units, "ome": True}


def aperio(mpp: Any, size: str = "96x64") -> dict[str, Any]:
    return {"description": APERIO.format(mpp=mpp, size=size).encode()}


def philips(x: Any, y: Any = None) -> dict[str, Any]:
    """Return the description of a Philips TIFF: a label, the slide, and the levels of it, in mm between rows first."""
    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">&quot;{}&quot; &quot;{}&quot;</Attribute>'
    of_type = '<DataObject><Attribute Name="PIM_DP_IMAGE_TYPE">{}</Attribute>'
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>'
        f"{of_type.format('LABELIMAGE')}{spacing.format(0.01, 0.01)}</DataObject>"
        f"{of_type.format('WSI')}{spacing.format(x if y is None else y, x)}<Attribute Name='PIIM'><Array><DataObject>"
        f"{spacing.format(0.008, 0.008)}</DataObject></Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    return {"description": text.encode()}


@pytest.mark.parametrize(
    ("how", "mpp"),
    [
        (philips(0.00025), 0.25),
        (philips(0.00025) | per_cm(0.2505), 0.25),
        (philips(0.00025, "many") | per_cm(0.5), 0.5),
        (aperio(0.25), 0.25),
        (aperio(0.25) | per_cm(0.2505), 0.25),
        (aperio(0.25) | {"resolution": (72, 72), "resolutionunit": "INCH"}, 0.25),
        (aperio(0.25, "9999x8888 [10,20 96x64]"), 0.25),
        (aperio(0.25, "9999x8888 [0,0,96x64]"), 0.25),
        (aperio(0.25, "384x256") | per_cm(1.0), 1.0),  # saved again at a quarter of its size
        (aperio(0.25, "384x256") | per_cm(0.25), 0.25),  # a part of it
        (aperio("abc") | per_cm(0.5), 0.5),
        (ome(0.25) | per_cm(0.25), 0.25),
        (ome(0.25, None), 0.25),
        (ome(250, "nm"), 0.25),
        (ome(2.5e-5, "cm") | per_cm(0.25), 0.25),
        (ome(1, "pixel") | per_cm(0.25), 0.25),
        (ome("nan") | per_cm(0.25), 0.25),
        ({"resolution": (4e3, 4e3), "resolutionunit": 4}, 0.25),
        ({"resolution": (101600, 101600), "resolutionunit": "INCH"}, 0.25),
        ({"imagej": True, "metadata": {"unit": "um"}, "resolution": (4, 4), "tile": None}, 0.25),
        ({"imagej": True, "metadata": {"unit": "\\u00B5m"}, "resolution": (4, 4), "tile": None}, 0.25),
        ({"imagej": True, "metadata": {"unit": "inch"}, "resolution": (101600, 101600), "tile": None}, 0.25),
    ],
)
def test_sources_that_agree(tmp_path: Path, how: dict[str, Any], mpp: float) -> None:
    assert tiff_mpp(write(tmp_path / "s.tif", **how)).mpp == pytest.approx(mpp, rel=1e-3)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            aperio(0.25) | per_cm(0.5),
            r"0\.25 um per pixel by its description .* but 0\.5 um per pixel by its res",
        ),
        (aperio(0.25, "384x256") | per_cm(0.5), r"0\.5 um per pixel by its resolution tags, but .* 0\.25 .* 384 x 256"),
        (ome(0.25) | per_cm(0.26), r"0\.25 um per pixel by its OME metadata, but 0\.26 um per pixel by its resolution"),
        (
            philips(0.00025) | per_cm(0.5),
            r"0\.25 um per pixel by its description \(DICOM_P.*, but 0\.5 um per pixel by",
        ),
    ],
)
def test_sources_that_disagree_are_both_named(tmp_path: Path, how: dict[str, Any], match: str) -> None:
    file = write(tmp_path / "s.tif", **how)
    with pytest.raises(ValueError, match=rf"'s\.tif' says two pixel sizes: {match}.*`image_mpp=`"):
        pk.io.read_slide(file)
    assert pk.io.read_slide(file, image_mpp=0.5).attrs["pekasc"]["image_mpp"] == {"s": 0.5}


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (
            {"resolution": (72, 72), "resolutionunit": "INCH"},
            r"352\.8 um per pixel \(72 dots per inch\), which no",
        ),
        ({"resolution": (1e4, 2e4), "resolutionunit": "CENTIMETER"}, "1 x 0.5 um per pixel, which is not square"),
        ({"resolution": (2, 2), "resolutionunit": "NONE"}, "2 pixels per unit, without a unit"),
        ({"resolution": ((0, 1), (0, 1)), "resolutionunit": "INCH"}, "no positive number"),
        (aperio(0.25, "384x256"), "0.25 um per pixel for an image of 384 x 256 pixels, while this one has 96 x 64"),
        (philips(0.00025, 0.0005), "0.25 x 0.5 um per pixel, which is not square"),
        (philips("x", "-1"), "x x -1 mm per pixel, which is no size"),
        (philips(0.00025, "1&quot; &quot;2"), "0.00025 x 2 x 1 mm per pixel, which is no size"),
        ({"description": philips(1)["description"][:-3]}, r"description \(DICOM_PIXEL_SPACING\) cannot be read"),
        (aperio("-1"), "says '-1' um per pixel, which is no size"),
        (aperio("1e999"), "which is no size"),
        (ome(0.25, "furlong"), "0.25 'furlong' per pixel, a unit that is not known"),
        (ome(0.25, "reference frame"), "which is no length"),
        (ome("inf"), "'inf' µm per pixel, which is no size"),
        (ome(0.25, y=0.5), "0.25 x 0.5 um per pixel, which is not square"),
        ({"description": b"<?xml version='1.0'?><OME><Image><Pix", "ome": False}, "cannot be read"),
        ({"imagej": True, "metadata": {"unit": "furlong"}, "resolution": (4, 4), "tile": None}, "pixels per 'furlong'"),
    ],
)
def test_what_is_not_used_is_said(
    tmp_path: Path, how: dict[str, Any], match: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pekasc"):
        sdata = pk.io.read_slide(write(tmp_path / "s.tif", **how))
    assert re.search(rf"pixel size of the slide s\.tif is not known: its .*{match}.*\. Give `image_mpp=`", caplog.text)
    assert "image_mpp" not in sdata.attrs.get("pekasc", {})


def test_an_ome_image_of_another_size_says_nothing_of_this_one(tmp_path: Path) -> None:
    file = write(tmp_path / "s.tif", **ome(0.25))
    content = file.read_bytes()
    file.write_bytes(content.replace(b'SizeX="96"', b'SizeX="95"'))
    found = tiff_mpp(file)
    assert found.mpp is None and found.unused == ["its OME metadata describes no image of 96 x 64 pixels"]
